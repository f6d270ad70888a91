"""The objective as per-token weights: everything that decides how much a token counts, and nothing else.

In: the trajectories of one update and their advantages. Out: for each token, its weight in each term and its part of
that term's batch-wide denominator. The device then computes one sum (loss.py):

    L = (Σ policy_weight · pg + Σ kl_weight · kl - Σ entropy_weight · H) / Σ denominators["policy"]
        + Σ observation_weight · CE / Σ denominators["observation"]

No two terms share a denominator (the KL and the entropy bonus are parts of the policy term). Denominators are summed
over the whole update before micro-batching, so the loss does not depend on packing, micro-batches, sharding or hosts.
Rollouts of several environments are in one sum, each weighed by its own objective.
Source: ECHO, arXiv 2605.24517, eqs. 2 and 3.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from echo_jax.objective.advantages import Pool, Rewards, alone, groups_of, rewards_by_group, solve_share
from echo_jax.objective.selection import Selection, parsed_well, select
from echo_jax.roles import ENVIRONMENT_ROLES, Role
from echo_jax.rollout.trajectory import ENDED_BY_BUDGET, Trajectory

# mode -> its terms
MODES = {
    "grpo": ("policy",),
    "echo": ("policy", "observation"),
    "env_only": ("observation",),  # no verifier needed
    "sft": ("policy", "observation"),  # the policy term is imitation
}
# schedule -> where between its end (0) and lambda (1) it is at a progress in [0, 1]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,  # EnvRL, arXiv 2606.17680
    "step": lambda progress: float(progress < 1.0),
    "warmup": lambda progress: progress,
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """How the terms are weighted and normalised in one update."""

    observation_weight: float  # lambda of this step, see `scheduled_weight`
    temperature: float  # of the policy term: the sampling temperature, or 1 when imitating
    mode: str = "echo"  # a key of MODES
    selection: Selection = dataclasses.field(default_factory=Selection)
    observation_normalizer: str = "observation"  # a key of OBSERVATION_NORMALIZERS
    observation_constant: float = 1.0  # divisor of `constant`, in tokens
    observation_epsilon: float = 0.0  # added to the length that `observation` and `selected` divide by
    observation_temperature: float = 1.0  # of the cross-entropy
    reward_adaptive: bool = False  # multiply lambda by (1 - mean reward) of the group
    min_valid_calls: float = 0.0  # rollouts whose share of valid call attempts is smaller leave the observation term
    clean_parse: bool = False  # rollouts with a turn cut off or a call left open leave the observation term
    policy_normalizer: str = "sequence"  # a key of POLICY_NORMALIZERS
    policy_constant: float = 1.0  # divisor of `constant`, in tokens
    filter_zero_variance: bool = False  # groups of equal rewards leave the policy term and its denominator
    mask_overlong: bool = False  # rollouts that hit a budget leave the policy term and its denominator
    every_action: bool = False  # the loss reads actions with advantage 0 too
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    policy: int = 0  # number of the policy loss, see `LossOptions.policies`


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """f32 [T] each, aligned with a trajectory's ids; the first token is never predicted and has weight 0."""

    policy_weight: np.ndarray
    observation_weight: np.ndarray
    observation_share: np.ndarray  # observation_weight without lambda
    kl_weight: np.ndarray
    entropy_weight: np.ndarray
    denominators: dict[str, np.ndarray]  # a key for each of TERMS
    policy: np.ndarray  # the number of the policy loss
    advantage: np.ndarray
    temperature: np.ndarray
    active: np.ndarray  # 1 if a term reads the log-probability, else 0


# A normaliser maps (weights of a sequence's tokens in the term, which tokens are in |O|, divisor of `constant`, what is
# added to a length) to (weight per token, each token's part of the denominator). A sequence is one rollout with all its
# branches, concatenated.
Normalizer = Callable[[np.ndarray, np.ndarray, float, float], tuple[np.ndarray, np.ndarray]]


def _per_sequence(weights: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Divides each sequence's sum by `length`, then averages over all sequences, also those without such tokens."""
    counts_once = np.zeros(len(weights))
    counts_once[1] = 1.0
    return weights / max(length, 1), counts_once


def _per_token(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages over all selected tokens of the batch."""
    return weights, (weights > 0).astype(float)


OBSERVATION_NORMALIZERS: dict[str, Normalizer] = {
    # |O|, warnings included (arXiv 2605.24517, eq. 3)
    "observation": lambda weights, environment, constant, more: _per_sequence(weights, environment.sum() + more),
    "selected": lambda weights, environment, constant, more: _per_sequence(weights, (weights > 0).sum() + more),  # |O'|
    "token": lambda weights, environment, constant, more: _per_token(weights),  # prime-rl
    "constant": lambda weights, environment, constant, more: _per_sequence(weights, constant),
}
POLICY_NORMALIZERS: dict[str, Normalizer] = {
    "sequence": lambda weights, environment, constant, more: _per_sequence(weights, weights.sum() + more),
    "token": lambda weights, environment, constant, more: _per_token(weights),
    "constant": lambda weights, environment, constant, more: _per_sequence(weights, constant),  # Dr. GRPO
}


def scheduled_weight(
    weight: float, schedule: str, step: int, steps: int, end: float = 0.0, points: Sequence[tuple[int, float]] = ()
) -> float:
    """Returns lambda at an RL step (from 0): a share of `weight`.

    Args:
      schedule: a key of SCHEDULES, which takes `steps` steps between the shares 1 and `end`, or "piecewise".
      points: of "piecewise": (step, share), joined by straight lines, and level before the first and after the last.
    """
    if schedule == "piecewise":
        return weight * float(np.interp(step, *zip(*sorted(points), strict=True)))
    return weight * (end + (1.0 - end) * SCHEDULES[schedule](min(step / max(steps, 1), 1.0)))


def mode_at(step: int, mode: str, changes: Sequence[tuple[int, str]]) -> str:
    """Returns the mode of an RL step (from 0): the last of `changes` (first step, mode) so far, or else `mode`."""
    return [mode, *(later for first, later in sorted(changes, key=lambda change: change[0]) if first <= step)][-1]


def weigh_each(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray | Sequence[float],
    objectives: Mapping[str, Objective],
    pool: Pool = alone,
) -> list[TokenWeights]:
    """Like `weigh`, of rollouts of several environments.

    Args:
      objectives: by environment; "" is for those that it does not name. All processes pass the same.
    """
    weights: list[TokenWeights | None] = [None] * len(trajectories)
    for environment, members in by_environment(trajectories, objectives).items():
        chosen = [trajectories[i] for i in members]
        found = weigh(chosen, [advantages[i] for i in members], objectives[environment], pool)
        for i, own in zip(members, found, strict=True):
            weights[i] = own
    return weights


def by_environment(trajectories: Sequence[Trajectory], environments: Iterable[str]) -> dict[str, list[int]]:
    """Returns {environment: indices of its trajectories} for each of `environments`, in their order; those of all
    others are under ""."""
    members: dict[str, list[int]] = {environment: [] for environment in environments}
    for i, t in enumerate(trajectories):
        members[t.environment if t.environment in members else ""].append(i)
    return members


def weigh(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray | Sequence[float],
    objective: Objective,
    pool: Pool = alone,
) -> list[TokenWeights]:
    """Returns the weights of one update, or of one process's share of it: whole rollouts, with `pool` to join the
    others.

    The advantage never enters a weight, so it cannot scale the observation term; lambda = 0 gives exactly GRPO. Tokens
    that an earlier branch of the same rollout already trains have weight 0. The branches of a rollout share one
    normaliser.
    """
    terms = MODES[objective.mode]
    in_observation = np.asarray([_of_quality(t, objective) for t in trajectories], bool)
    selected = select(trajectories, objective.selection, in_observation, pool)
    of_groups = objective.reward_adaptive or objective.filter_zero_variance
    rewards = rewards_by_group(trajectories, pool) if of_groups else {}
    lambdas = _lambdas(trajectories, rewards, objective) * ("observation" in terms)
    in_policy = _in_policy_term(trajectories, rewards, objective) & ("policy" in terms)

    weights: list[TokenWeights | None] = [None] * len(trajectories)
    for branches in _branches(trajectories):
        new = [np.arange(len(trajectories[i].ids)) >= max(trajectories[i].shared, 1) for i in branches]
        first = branches[0]
        joined = lambda parts: np.concatenate(list(parts))  # noqa: E731
        role = joined(trajectories[i].role for i in branches)
        predicted = joined(new)
        environment = predicted & np.isin(role, ENVIRONMENT_ROLES)
        action = (predicted & (role == Role.ACTION)).astype(float)
        observed = np.where(predicted, joined(selected[i] for i in branches), 0.0)
        normalize = POLICY_NORMALIZERS[objective.policy_normalizer]
        policy = [in_policy[first] * x for x in normalize(action, environment, objective.policy_constant, 0.0)]
        normalize = OBSERVATION_NORMALIZERS[objective.observation_normalizer]
        lengths = (objective.observation_constant, objective.observation_epsilon)
        observation = [in_observation[first] * x for x in normalize(observed, environment, *lengths)]
        advantage = joined(np.full(len(trajectories[i].ids), advantages[i]) for i in branches) * (action > 0)
        fields = {
            "policy_weight": policy[0],
            "observation_weight": lambdas[first] * observation[0],
            "observation_share": observation[0],
            "kl_weight": objective.kl_weight * policy[0],
            "entropy_weight": objective.entropy_weight * policy[0],
            "policy": np.full(len(role), objective.policy),
            "advantage": advantage,
            "temperature": np.where(role == Role.ACTION, objective.temperature, objective.observation_temperature),
        }
        reads = (fields["policy_weight"] > 0) & (objective.every_action | (advantage != 0))
        other_terms = ("observation_weight", "kl_weight", "entropy_weight")
        fields["active"] = reads | np.any([fields[name] > 0 for name in other_terms], axis=0)
        by_term = {"policy": policy[1], "observation": observation[1]}
        start = 0
        for i in branches:
            own = slice(start, start + len(trajectories[i].ids))
            cut = lambda values, own=own: values[own].astype(np.float32)  # noqa: E731
            weights[i] = TokenWeights(
                **{name: cut(values) for name, values in fields.items()},
                denominators={term: cut(parts) for term, parts in by_term.items()},
            )
            start = own.stop
    return weights


def _branches(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Returns the indices of each rollout's branches, those with the fewest shared tokens first."""
    rollouts: dict[tuple[int, int], list[int]] = {}
    for i, t in enumerate(trajectories):
        rollouts.setdefault((t.group, t.rollout), []).append(i)
    return [sorted(members, key=lambda i: trajectories[i].shared) for members in rollouts.values()]


def _lambdas(trajectories: Sequence[Trajectory], rewards: Rewards, objective: Objective) -> np.ndarray:
    """Returns lambda for each trajectory. PaW's reward-adaptive form (arXiv 2606.02388) is taken as a factor of 1 minus
    the group's mean reward, scaled to [0, 1] by the task's reward range: the worse a task goes, the more is learned
    from its observations."""
    lambdas = np.full(len(trajectories), objective.observation_weight)
    if objective.reward_adaptive:
        for group, members in groups_of(trajectories).items():
            solved = solve_share(list(rewards[group].values()), trajectories[members[0]].reward_range)
            lambdas[members] *= 1.0 - solved
    return lambdas


def _in_policy_term(trajectories: Sequence[Trajectory], rewards: Rewards, objective: Objective) -> np.ndarray:
    """Returns bool [R]. An unscored rollout has no advantage, so it is not in the denominator either, except in
    imitation, which needs no score. Overlong filtering and the filter of zero-variance groups are from DAPO (arXiv
    2503.14476, section 3.4 and eq. 11). All three keep the rollouts: their observations are still trained."""
    included = np.asarray([t.scored or objective.mode == "sft" for t in trajectories], bool)
    if objective.mask_overlong:
        included &= np.asarray([t.outcome not in ENDED_BY_BUDGET for t in trajectories], bool)
    if objective.filter_zero_variance:
        for group, members in groups_of(trajectories).items():
            included[members] &= len(set(rewards[group].values())) > 1
    return included


def _of_quality(trajectory: Trajectory, objective: Objective) -> bool:
    return parsed_well(trajectory, min_valid_calls=objective.min_valid_calls, clean=objective.clean_parse)
