"""Updates: from trajectories with weights to the next parameters; and what is kept of them.

In: a train state and trajectories. Out: the next state, its metrics, checkpoints.
"""
