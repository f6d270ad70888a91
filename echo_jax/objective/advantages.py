"""Rewards to advantages.

In: the rewards of the rollouts of one task. Out: the advantage of each rollout. An estimator is a function like those
below. To add one, add a line to `ADVANTAGES`, or name it as `module:function` in `config.loss.advantage`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system import named, user_code
from echo_jax.system.errors import UserError

EPSILON = 1e-6  # added to the standard deviation

# Maps the rewards of one group's rollouts, f64 [R], to their advantages, [R].
Estimator = Callable[[np.ndarray], np.ndarray]


class AdvantageError(UserError, ValueError):
    """An estimator did not return one finite number for each rollout."""


def group_normalized(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-6), std with ddof 0 (GRPO, arXiv 2402.03300, section 4.1.2)."""
    return _centered(rewards) / (rewards.std() + EPSILON)


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """r - mean: dividing by the std favours tasks with little variance (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return _centered(rewards)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """r minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    return _centered(rewards) * len(rewards) / max(len(rewards) - 1, 1)


def reward(rewards: np.ndarray) -> np.ndarray:
    """The reward itself: REINFORCE without a baseline (Williams 1992)."""
    return rewards


def _centered(rewards: np.ndarray) -> np.ndarray:
    """r - mean; exactly 0 for equal rewards and for a single one."""
    return np.zeros_like(rewards) if np.ptp(rewards) == 0 else rewards - rewards.mean()


ADVANTAGES: dict[str, Estimator] = {
    "group": group_normalized,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "reward": reward,
}


def find_estimator(name: str, options: Mapping[str, Any]) -> Estimator:
    """Returns the estimator of this name, a key of `ADVANTAGES` or `module:function`, with its options as keyword
    arguments.

    Raises:
      ConfigError: the estimator does not exist, or does not take these options.
    """
    found = named.find(name, ADVANTAGES, "loss.advantage")
    named.check_callable(found, name, "loss.advantage")
    named.check_options(found, options, "loss.advantage_options", given=1)
    return functools.partial(found, **options) if options else found


# Joins the lists of all processes of a run, given this process's; entries must be JSON-serialisable.
Pool = Callable[[list], list]


def alone(entries: list) -> list:
    """The `Pool` of a process that has all rollouts of an update."""
    return entries


def advantages_of(
    trajectories: Sequence[Trajectory], estimator: Estimator = group_normalized, pool: Pool = alone
) -> np.ndarray:
    """Returns f32 [R], the estimator applied to each group.

    An unscored rollout gets 0 and is left out of its group's statistics. Branches of one rollout share one reward and
    count once. `pool`: joins the processes if each has a share of the update.

    Raises:
      AdvantageError: the estimator did not return one finite number for each rollout.
    """
    advantages = np.zeros(len(trajectories))
    by_group = rewards_by_group(trajectories, pool)
    for group, members in groups_of(trajectories).items():
        rewards = by_group[group]
        if not rewards:
            continue
        values = np.asarray(list(rewards.values()), np.float64)
        name = named.name_of(estimator)
        with user_code.calling(f"the advantage estimator {name} on the rewards {values.tolist()}"):
            found = np.asarray(estimator(values.copy()))
        if found.shape != values.shape or not np.isfinite(found).all():
            raise AdvantageError(
                f"the advantage estimator {name} returned {found.tolist()} for the rewards {values.tolist()}; it must "
                "return one finite number for each"
            )
        by_rollout = dict(zip(rewards, found, strict=True))
        for i in members:
            if trajectories[i].scored:
                advantages[i] = by_rollout[trajectories[i].rollout]
    return advantages.astype(np.float32)


def rewards_by_group(trajectories: Sequence[Trajectory], pool: Pool = alone) -> dict[int, dict[int, float]]:
    """Returns {group: {rollout: reward}} of the scored rollouts of all processes; {} for a group without any."""
    rewards: dict[int, dict[int, float]] = {}
    everyone = pool([[t.rollout, t.group, t.reward if t.scored else None] for t in trajectories])
    for rollout, group, reward in sorted(everyone, key=lambda entry: entry[0]):
        members = rewards.setdefault(group, {})
        if reward is not None:
            members[rollout] = reward
    return rewards


def groups_of(trajectories: Sequence[Trajectory]) -> dict[int, list[int]]:
    """Returns {group: indices of its trajectories}."""
    groups: dict[int, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group, []).append(i)
    return groups
