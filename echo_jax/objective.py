"""The objective as per-token weights: everything that decides how much a token counts, and nothing else.

In: trajectories and their advantages. Out: for each token its weight in either term and what it adds to that term's
batch-wide denominator. The device then computes one sum (loss.py):

    L = Σ policy_weight · pg / Σ policy_denominator  +  Σ observation_weight · CE / Σ observation_denominator

The terms never share a denominator, denominators are summed over the whole update before micro-batching, and so the
loss does not depend on packing, micro-batches, sharding or hosts. Source: ECHO, arXiv 2605.24517, eqs. 2 and 3.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from echo_jax.roles import ENVIRONMENT_ROLES, OBSERVATION_ROLES, Role
from echo_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Objective:
    """How the two terms are weighted and normalised."""

    observation_weight: float  # lambda
    observation_normalizer: str  # a key of OBSERVATION_NORMALIZERS
    policy_normalizer: str  # a key of POLICY_NORMALIZERS
    temperature: float  # of the policy term: the sampling temperature, or 1 when imitating


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """f32 [T] each, aligned with a trajectory's ids; the first token is never predicted and has zeros."""

    policy_weight: np.ndarray
    observation_weight: np.ndarray
    policy_denominator: np.ndarray
    observation_denominator: np.ndarray
    advantage: np.ndarray
    temperature: np.ndarray


# A normaliser maps (mask of the term's tokens, mask of |O|) to (weight, denominator) per token.
Normalizer = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _per_sequence(mask: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's sum over `length`, then the mean over all sequences, also those without such tokens."""
    counts_once = np.zeros(len(mask))
    counts_once[1] = 1.0
    return mask / max(length, 1), counts_once


def _per_token(mask: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One mean over all the tokens of the batch."""
    return mask.astype(float), mask.astype(float)


OBSERVATION_NORMALIZERS: dict[str, Normalizer] = {
    "observation": lambda mask, environment: _per_sequence(
        mask, environment.sum()
    ),  # the paper's |O|, warnings included
    "selected": lambda mask, environment: _per_sequence(mask, mask.sum()),  # |O'|
    "token": _per_token,  # prime-rl
}
POLICY_NORMALIZERS: dict[str, Normalizer] = {
    "sequence": lambda mask, environment: _per_sequence(mask, mask.sum()),
    "token": _per_token,
}


def weigh(trajectory: Trajectory, advantage: float, objective: Objective) -> TokenWeights:
    """Stamps the weights of one trajectory.

    The advantage never enters a weight, so it cannot scale the observation term; lambda = 0 leaves exactly GRPO's.
    """
    predicted = np.arange(len(trajectory.ids)) > 0
    action = predicted & (trajectory.role == Role.ACTION)
    selected = predicted & np.isin(trajectory.role, OBSERVATION_ROLES)
    environment = predicted & np.isin(trajectory.role, ENVIRONMENT_ROLES)
    policy_weight, policy_denominator = POLICY_NORMALIZERS[objective.policy_normalizer](action, environment)
    observation_weight, observation_denominator = OBSERVATION_NORMALIZERS[objective.observation_normalizer](
        selected, environment
    )
    fields = TokenWeights(
        policy_weight=policy_weight,
        observation_weight=objective.observation_weight * observation_weight,
        policy_denominator=policy_denominator,
        observation_denominator=observation_denominator,
        advantage=np.where(action, advantage, 0.0),
        temperature=np.where(action, objective.temperature, 1.0),
    )
    return TokenWeights(**{name: value.astype(np.float32) for name, value in vars(fields).items()})
