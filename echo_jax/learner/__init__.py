"""Updates: from weighted trajectories to the next parameters; and checkpoints of them.

In: a train state and trajectories. Out: the next state, its metrics, checkpoints.
"""
