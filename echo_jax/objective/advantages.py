"""Rewards to advantages."""

from collections.abc import Callable, Sequence

import numpy as np

from echo_jax.rollout.trajectory import Trajectory

EPSILON = 1e-6  # beside the standard deviation


def _normalized(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-6), std with ddof 0 (GRPO, arXiv 2402.03300, section 4.1.2)."""
    return (rewards - rewards.mean()) / (rewards.std() + EPSILON)


def _centered(rewards: np.ndarray) -> np.ndarray:
    """r - mean: no division, which favours tasks of little variance (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return rewards - rewards.mean()


def _leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """r minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    return (rewards - rewards.mean()) * len(rewards) / max(len(rewards) - 1, 1)


def _reward(rewards: np.ndarray) -> np.ndarray:
    """The reward itself: REINFORCE without a baseline (Williams 1992)."""
    return rewards


# Each maps the rewards of one group's rollouts to their advantages.
ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group": _normalized,
    "group_mean": _centered,
    "leave_one_out": _leave_one_out,
    "reward": _reward,
}


# A list of one process (of what `json` can write) -> those of all processes of the run, joined.
Pool = Callable[[list], list]


def alone(own: list) -> list:
    """The `Pool` of a process that has all rollouts of an update."""
    return own


def advantages_of(trajectories: Sequence[Trajectory], estimator: str = "group", pool: Pool = alone) -> np.ndarray:
    """Returns f32 [R], one of `ADVANTAGES` over each group.

    A rollout that was not scored gets 0 and is left out of its group's statistics. Branches of one rollout have one
    reward between them, and count once. Where a baseline is subtracted, equal rewards and a lone survivor get
    exactly 0. `pool`: where the trajectories are one process's share of an update.
    """
    advantages = np.zeros(len(trajectories))
    by_group = rewards_by_group(trajectories, pool)
    for group, members in groups_of(trajectories).items():
        rewards = by_group[group]
        if not rewards or (estimator != "reward" and np.ptp(list(rewards.values())) == 0):
            continue
        own = ADVANTAGES[estimator](np.asarray(list(rewards.values()), np.float64))
        by_rollout = dict(zip(rewards, own, strict=True))
        for i in members:
            if trajectories[i].scored:
                advantages[i] = by_rollout[trajectories[i].rollout]
    return advantages.astype(np.float32)


def rewards_by_group(trajectories: Sequence[Trajectory], pool: Pool = alone) -> dict[int, dict[int, float]]:
    """Returns {group: {rollout: reward}} of the scored rollouts of all processes, empty for a group without any."""
    rewards: dict[int, dict[int, float]] = {}
    everyone = pool([[t.rollout, t.group, t.reward if t.scored else None] for t in trajectories])
    for rollout, group, reward in sorted(everyone, key=lambda entry: entry[0]):
        own = rewards.setdefault(group, {})
        if reward is not None:
            own[rollout] = reward
    return rewards


def groups_of(trajectories: Sequence[Trajectory]) -> dict[int, list[int]]:
    """Returns {group: indices of its trajectories}."""
    groups: dict[int, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group, []).append(i)
    return groups
