"""Rewards to advantages."""

from collections.abc import Sequence

import numpy as np

from echo_jax.trajectory import Trajectory


def group_advantages(trajectories: Sequence[Trajectory], epsilon: float = 1e-6) -> np.ndarray:
    """Returns f32 [R]: (reward - mean) / (std + epsilon) over each group, std with ddof 0 (GRPO, arXiv 2402.03300,
    4.1.2).

    A rollout that was not scored gets 0 and is left out of its group's mean and std; so does a lone survivor's. A
    group of equal rewards gets exactly 0.
    """
    rewards = np.asarray([t.reward for t in trajectories], np.float64)
    scored = np.asarray([t.scored for t in trajectories], bool)
    groups = np.asarray([t.group for t in trajectories])
    advantages = np.zeros(len(trajectories), np.float64)
    for group in np.unique(groups):
        members = (groups == group) & scored
        if members.any() and np.ptp(rewards[members]) > 0:
            own = rewards[members]
            advantages[members] = (own - own.mean()) / (own.std() + epsilon)
    return advantages.astype(np.float32)
