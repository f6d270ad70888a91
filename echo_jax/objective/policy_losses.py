"""The policy losses: what each asks of the log-probabilities of sampled tokens.

In: per-token log-probs of packed rows. Out: a per-token loss, to be weighted and summed by loss.py. One of them is a
`PolicyLoss`: the surrogate, and the advantage and the normaliser that its paper uses with it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """What a surrogate sees, [B, T] each; only places of positive weight count."""

    logprob: jax.Array  # f32, under the parameters that are trained
    old_logprob: jax.Array  # f32, under those that the ratio is taken to
    advantage: jax.Array  # f32
    weight: jax.Array  # f32 >= 0, 0 where nothing is trained
    segment_ids: jax.Array  # int32, a trajectory within its row, 0 is padding


@dataclasses.dataclass(frozen=True)
class Clip:
    """The bounds of the importance ratio: [1 - low, 1 + high], and the dual clip's c (0: none)."""

    low: float
    high: float
    dual: float = 0.0


# A surrogate returns (loss, whether the clip took its gradient), both [B, T].
Surrogate = Callable[[Tokens, Clip], tuple[jax.Array, jax.Array]]


def clipped_ratio(tokens: Tokens, clip: Clip) -> tuple[jax.Array, jax.Array]:
    """-min(r A, clip(r) A) per token (PPO, arXiv 1707.06347, eq. 7; GRPO, arXiv 2402.03300, eq. 3).

    Asymmetric bounds are DAPO's (arXiv 2503.14476, eq. 10). With `clip.dual` = c > 1 the loss of a negative advantage
    is at most -c A (dual-clip PPO, arXiv 1912.09729, eq. 5).
    """
    return _clipped(_ratio(tokens.logprob - tokens.old_logprob), tokens.advantage, clip)


def clipped_sequence_ratio(tokens: Tokens, clip: Clip) -> tuple[jax.Array, jax.Array]:
    """GSPO (arXiv 2507.18071, eqs. 5 and 7): one ratio a sequence, the geometric mean of its tokens' ratios.

    Every token carries its sequence's loss, so with weights 1 / |A| a sequence counts once. The paper's bounds are
    3e-4 and 4e-4.
    """
    counted = (tokens.weight > 0).astype(jnp.float32)
    log_ratio = counted * (tokens.logprob - tokens.old_logprob)
    segments = tokens.segment_ids.shape[-1] + 1  # as many as a row can hold, and padding

    def mean_of_segment(values, counts, ids):
        total = jax.ops.segment_sum(values, ids, segments)
        return (total / jnp.maximum(jax.ops.segment_sum(counts, ids, segments), 1.0))[ids]

    log_ratio = jax.vmap(mean_of_segment)(log_ratio, counted, tokens.segment_ids)
    return _clipped(_ratio(log_ratio), tokens.advantage, clip)


def clipped_weight(tokens: Tokens, clip: Clip) -> tuple[jax.Array, jax.Array]:
    """CISPO (arXiv 2506.13585, eqs. 4 and 5): -sg(clip(r)) A log p. The clip bounds a weight and stops no gradient; the
    paper bounds it from above only (`low` of 1 or more)."""
    ratio = _ratio(tokens.logprob - tokens.old_logprob)
    bounded = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    return -jax.lax.stop_gradient(bounded) * tokens.advantage * tokens.logprob, bounded != ratio


def log_likelihood(tokens: Tokens, clip: Clip) -> tuple[jax.Array, jax.Array]:
    """-A log p (REINFORCE, Williams 1992; RLOO, arXiv 2402.14740, its leave-one-out estimator)."""
    del clip
    return -tokens.advantage * tokens.logprob, jnp.zeros_like(tokens.logprob, bool)


def imitation(tokens: Tokens, clip: Clip) -> tuple[jax.Array, jax.Array]:
    """-log p: cross-entropy on a demonstrator's actions (`sft`): no ratio, no advantage, no clip."""
    del clip
    return -tokens.logprob, jnp.zeros_like(tokens.logprob, bool)


def _ratio(log_ratio):
    """exp, held to e^±20: an overflow times a weight of 0 would be nan."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _clipped(ratio, advantage, clip: Clip):
    free = ratio * advantage
    clipped = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high) * advantage
    kept = jnp.minimum(free, clipped)
    stopped = clipped < free
    if clip.dual:
        floor = clip.dual * advantage
        stopped |= (advantage < 0) & (kept < floor)
        kept = jnp.where(advantage < 0, jnp.maximum(kept, floor), kept)
    return -kept, stopped


CLIPPED = (clipped_ratio, clipped_sequence_ratio)  # those that the dual clip applies to


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A surrogate, and what its paper uses with it where the config leaves the choice open."""

    surrogate: Surrogate
    advantage: str  # a key of advantages.ADVANTAGES
    normalizer: str  # a key of objective.POLICY_NORMALIZERS
    clip: Clip | None  # None: it has none
    filter_zero_variance: bool = False  # groups of equal rewards count in no policy denominator
    every_action: bool = False  # an action counts even where its advantage is 0


POLICY_LOSSES = {
    # arXiv 2402.03300, eq. 3
    "grpo": PolicyLoss(clipped_ratio, "group", "sequence", Clip(0.2, 0.2)),
    # arXiv 2503.20783, section 3.2
    "dr_grpo": PolicyLoss(clipped_ratio, "group_mean", "constant", Clip(0.2, 0.2)),
    # arXiv 2503.14476, eqs. 10 to 12
    "dapo": PolicyLoss(clipped_ratio, "group", "token", Clip(0.2, 0.28), filter_zero_variance=True),
    # arXiv 2507.18071, eq. 5
    "gspo": PolicyLoss(clipped_sequence_ratio, "group", "sequence", Clip(3e-4, 4e-4)),
    # arXiv 2506.13585, eq. 4, which leaves the upper bound to be tuned: weights up to 5 here, and no lower bound
    "cispo": PolicyLoss(clipped_weight, "group", "token", Clip(1.0, 4.0)),
    # arXiv 2402.14740, up to the constant that a sum over tokens is divided by
    "rloo": PolicyLoss(log_likelihood, "leave_one_out", "constant", None),
    # Williams 1992, up to that constant
    "reinforce": PolicyLoss(log_likelihood, "reward", "constant", None),
    "imitation": PolicyLoss(imitation, "group", "sequence", None, every_action=True),
}


def k1(logprob, reference_logprob):
    """log p - log q: unbiased, may be negative; its gradient has expectation 0 (Schulman, "Approximating KL
    Divergence", 2020)."""
    return logprob - reference_logprob


def k2(logprob, reference_logprob):
    """(log p - log q)² / 2: biased, its gradient is the KL's (Schulman 2020)."""
    return jnp.square(logprob - reference_logprob) / 2


def k3(logprob, reference_logprob):
    """q / p - 1 - log(q / p): unbiased and never negative (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4)."""
    log_ratio = reference_logprob - logprob
    return _ratio(log_ratio) - 1.0 - log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
