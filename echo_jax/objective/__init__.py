"""The objective: per-token weights, and the one sum that the device computes.

In: trajectories with rewards. Out: advantages, per-token weights, packed rows, the loss and its metrics.
"""
