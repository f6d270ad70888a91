"""Rewards to advantages.

In: the rewards of the rollouts of one task. Out: the advantage of each rollout. An estimator is a function like those
below. To add one, add a line to `ADVANTAGES`, or name it as `module:function` in `config.loss.advantage`. One with an
argument `batch` also gets the rewards of all groups of the update.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from echo_jax.roles import ENVIRONMENT_ROLES, Role
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system import named, user_code
from echo_jax.system.errors import UserError

# Maps the rewards of one group's rollouts, f64 [R], to their advantages, [R].
Estimator = Callable[..., np.ndarray]


class AdvantageError(UserError, ValueError):
    """An estimator did not return one finite number for each rollout."""


def group_normalized(rewards: np.ndarray, *, ddof: int = 0, epsilon: float = 1e-6) -> np.ndarray:
    """(r - mean) / (std + epsilon) (GRPO, arXiv 2402.03300, section 4.1.2).

    The paper does not say which std; verl, SkyRL, TRL (epsilon 1e-4) and ECHO's release have `ddof` 1.
    """
    return _centered(rewards) / (_std(rewards, ddof) + epsilon)


def batch_normalized(rewards: np.ndarray, *, batch: np.ndarray, ddof: int = 0, epsilon: float = 1e-6) -> np.ndarray:
    """(r - mean) / (std of the rewards of all groups + epsilon) (TRL's `scale_rewards = "batch"`, there with `ddof` 1
    and epsilon 1e-4; arXiv 2508.08221)."""
    return _centered(rewards) / (_std(batch, ddof) + epsilon)


def mean_normalized(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / mean (MaxRL, arXiv 2602.02710); 0 for a group whose mean is not above 0."""
    mean = rewards.mean()
    return _centered(rewards) / mean if mean > 0 else np.zeros_like(rewards)


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """r - mean: dividing by the std favours tasks with little variance (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return _centered(rewards)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """r minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    return _centered(rewards) * len(rewards) / max(len(rewards) - 1, 1)


def reward(rewards: np.ndarray) -> np.ndarray:
    """The reward itself: REINFORCE without a baseline (Williams 1992)."""
    return rewards


def _std(rewards: np.ndarray, ddof: int) -> float:
    """The standard deviation; 0 for fewer rewards than it needs."""
    return rewards.std(ddof=ddof) if len(rewards) > ddof else 0.0


def _centered(rewards: np.ndarray) -> np.ndarray:
    """r - mean; exactly 0 for equal rewards and for a single one."""
    return np.zeros_like(rewards) if np.ptp(rewards) == 0 else rewards - rewards.mean()


ADVANTAGES: dict[str, Estimator] = {
    "group": group_normalized,
    "group_mean": group_mean,
    "batch": batch_normalized,
    "mean": mean_normalized,
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
    named.check_options(found, options, "loss.advantage_options", given=1, provided=("batch",))
    return functools.partial(found, **options) if options else found


# Joins the lists of all processes of a run, given this process's; entries must be JSON-serialisable.
Pool = Callable[[list], list]


def alone(entries: list) -> list:
    """The `Pool` of a process that has all rollouts of an update."""
    return entries


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """prime-rl's: takes from a rollout's reward the group's mean reward times the rollout's cost. So a group that never
    succeeds is not taught to be brief."""

    output: float  # of sampled tokens, over `max_tokens`
    input: float  # of tokens of the environment, over `max_tokens`
    turns: float  # of turns, over `max_turns`
    max_tokens: int
    max_turns: int

    def cost(self, branches: Sequence[Trajectory]) -> float:
        """Returns the cost of a rollout, of which these are the branches."""
        counted = [t.role[max(t.shared, 1) :] for t in branches]
        output, input = (sum(np.isin(role, of).sum() for role in counted) for of in (Role.ACTION, ENVIRONMENT_ROLES))
        of_tokens = (self.output * output + self.input * input) / self.max_tokens
        return float(of_tokens + self.turns * max(t.turns for t in branches) / self.max_turns)


def advantages_of(
    trajectories: Sequence[Trajectory],
    estimator: Estimator = group_normalized,
    pool: Pool = alone,
    penalty: LengthPenalty | None = None,
) -> np.ndarray:
    """Returns f32 [R], the estimator applied to each group.

    An unscored rollout gets 0 and is left out of its group's statistics. Branches of one rollout share one reward and
    count once. `pool`: joins the processes if each has a share of the update.

    Raises:
      AdvantageError: the estimator did not return one finite number for each rollout.
    """
    advantages = np.zeros(len(trajectories))
    by_group = rewards_by_group(trajectories, pool)
    if penalty is not None:
        by_group = _penalized(trajectories, by_group, penalty, pool)
    batch = np.asarray([reward for rewards in by_group.values() for reward in rewards.values()], np.float64)
    passed = {"batch": batch} if named.takes(estimator, "batch") else {}
    for group, members in groups_of(trajectories).items():
        rewards = by_group[group]
        if not rewards:
            continue
        values = np.asarray(list(rewards.values()), np.float64)
        name = named.name_of(estimator)
        with user_code.calling(f"the advantage estimator {name} on the rewards {values.tolist()}"):
            found = np.asarray(estimator(values.copy(), **passed))
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


Rewards = dict[int, dict[int, float]]  # group -> rollout -> reward, scored rollouts only


def rewards_by_group(trajectories: Sequence[Trajectory], pool: Pool = alone) -> Rewards:
    """Returns the rewards of the scored rollouts of all processes; {} for a group without any."""
    rewards: Rewards = {}
    everyone = pool([[t.rollout, t.group, t.reward if t.scored else None] for t in trajectories])
    for rollout, group, reward in sorted(everyone, key=lambda entry: entry[0]):
        members = rewards.setdefault(group, {})
        if reward is not None:
            members[rollout] = reward
    return rewards


def solve_share(rewards: Sequence[float], reward_range: tuple[float, float]) -> float:
    """Returns the mean of a group's rewards, scaled to [0, 1] by the task's range; 0 without rewards."""
    low, high = reward_range
    mean = np.mean(list(rewards)) if len(rewards) else low
    return float(np.clip((mean - low) / (high - low), 0.0, 1.0))


def _penalized(trajectories: Sequence[Trajectory], by_group: Rewards, penalty: LengthPenalty, pool: Pool) -> Rewards:
    branches: dict[tuple[int, int], list[Trajectory]] = {}
    for t in trajectories:
        branches.setdefault((t.group, t.rollout), []).append(t)
    own = [[*key, penalty.cost(parts), *parts[0].reward_range] for key, parts in branches.items()]
    penalized: Rewards = {group: dict(rewards) for group, rewards in by_group.items()}
    for group, rollout, cost, low, high in pool(own):
        if rollout in penalized[group]:
            penalized[group][rollout] -= solve_share(list(by_group[group].values()), (low, high)) * cost
    return penalized


def groups_of(trajectories: Sequence[Trajectory]) -> dict[int, list[int]]:
    """Returns {group: indices of its trajectories}."""
    groups: dict[int, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group, []).append(i)
    return groups
