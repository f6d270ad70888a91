"""The computations written by hand: log-probs over the LM head, attention, experts, the embedding look-up.

In: arrays on a mesh. Out: arrays, with gradients where they are trained.
"""
