"""The objective: what each token counts, and the one sum that the device computes.

In: trajectories with rewards. Out: advantages, per-token weights, packed rows, the loss and its metrics.
"""
