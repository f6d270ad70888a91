"""Hand-written computations: log-probs over the LM head, attention, experts, the embedding look-up.

In: arrays on a mesh. Out: arrays, with gradients where training needs them.
"""
