"""Sampling: a policy decodes many sessions at once.

In: the new ids of each session. Out: sampled ids, their log-probs and entropies.
"""
