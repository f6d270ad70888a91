"""One run from start to end: its parts, its checks, its workdir, training, evaluation, export.

In: a config and a workdir. Out: metrics, rollouts, checkpoints, exported weights.
"""
