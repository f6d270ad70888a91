"""The transformer and its weights: sizes, parameters, adapters, published files.

In: token ids and parameters. Out: hidden states. It also reads parameters from files and writes them to files.
"""
