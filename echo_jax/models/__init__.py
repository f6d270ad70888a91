"""The transformer and its weights: sizes, parameters, adapters, published files.

In: token ids and parameters. Out: hidden states; files -> parameters -> files.
"""
