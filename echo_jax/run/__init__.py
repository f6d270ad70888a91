"""One run from start to end: building, checks, workdir, training, evaluation, export.

In: a config and a workdir. Out: metrics, rollouts, checkpoints, exported weights.
"""
