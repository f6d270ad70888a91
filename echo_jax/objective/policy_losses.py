"""The policy losses, as functions of the log-probabilities of sampled tokens.

In: per-token log-probs of packed rows. Out: a per-token loss, which loss.py weights and sums, and per-token metrics.

A loss is a function like those below. Its keyword arguments are its hyperparameters, with the defaults of its paper. A
line in `POLICY_LOSSES` gives its name and the advantage and normaliser of its paper. To use yours, name it as
`module:function` in `config.loss.policy`, and set its hyperparameters in `config.loss.policy_options`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from echo_jax.system import named


class Tokens(NamedTuple):
    """The inputs of a policy loss, [B, T] each; only tokens of positive weight count."""

    logprob: jax.Array  # f32, under the current parameters
    old_logprob: jax.Array  # f32, under the old policy of the importance ratio
    advantage: jax.Array  # f32
    weight: jax.Array  # f32 >= 0, 0 for untrained tokens
    segment_ids: jax.Array  # int32, the trajectory within its row, from 1; 0 is padding
    rollout: jax.Array  # int32, the rollout, from 1 to B T; 0 is padding. A rollout that branches has several segments

    def sum_of_rollout(self, values: jax.Array) -> jax.Array:
        """Returns f32 [B, T]: for each token the sum of `values` over the tokens of its rollout that count."""
        counted = jnp.where(self.weight > 0, values, 0.0).reshape(-1)
        ids = self.rollout.reshape(-1)
        return jax.ops.segment_sum(counted, ids, len(ids) + 1)[ids].reshape(values.shape)


class TokenLoss(NamedTuple):
    """The outputs of a policy loss, [B, T] each."""

    loss: jax.Array  # f32, finite everywhere
    metrics: Mapping[str, jax.Array]  # name -> number or bool per token; `policy/NAME` logs its mean over actions


# (tokens, **hyperparameters) -> loss and metrics of each token.
Surrogate = Callable[..., TokenLoss]


def clipped_ratio(
    tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0
) -> TokenLoss:
    """-min(r A, clip(r) A) per token (PPO, arXiv 1707.06347, eq. 7; GRPO, arXiv 2402.03300, eq. 3).

    The ratio is clipped to [1 - clip_low, 1 + clip_high]; asymmetric bounds are DAPO's (arXiv 2503.14476, eq. 10). With
    `dual_clip` = c > 1 the loss of a negative advantage is at most -c A (dual-clip PPO, arXiv 1912.09729, eq. 5).
    """
    ratio = bounded_exp(tokens.logprob - tokens.old_logprob)
    return _clipped(ratio, tokens.advantage, clip_low, clip_high, dual_clip)


def clipped_sequence_ratio(
    tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4, dual_clip: float = 0.0
) -> TokenLoss:
    """GSPO (arXiv 2507.18071, eqs. 5 and 7): one ratio per rollout, the geometric mean of its tokens' ratios, over all
    its branches.

    Every token carries its rollout's loss, so with weights 1 / |A| a rollout counts once. The default bounds are the
    paper's.
    """
    total = tokens.sum_of_rollout(tokens.logprob - tokens.old_logprob)
    mean = total / jnp.maximum(tokens.sum_of_rollout(jnp.ones_like(total)), 1.0)
    return _clipped(bounded_exp(mean), tokens.advantage, clip_low, clip_high, dual_clip)


def clipped_weight(tokens: Tokens, *, clip_low: float = 1.0, clip_high: float = 4.0) -> TokenLoss:
    """CISPO (arXiv 2506.13585, eqs. 4 and 5): -sg(clip(r)) A log p. The clip bounds a weight and stops no gradient.

    The paper bounds the weight only from above (`clip_low` of 1 or more) and leaves the bound to be tuned; the default
    here is 5.
    """
    ratio = bounded_exp(tokens.logprob - tokens.old_logprob)
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jax.lax.stop_gradient(bounded) * tokens.advantage * tokens.logprob
    return TokenLoss(loss, {"clip_fraction": bounded != ratio})


def masked_ratio(
    tokens: Tokens, *, mask_low: float = 0.2, mask_high: float = 0.2, sampler_kl: float = 1e-3
) -> TokenLoss:
    """DPPO with the total-variation mask (arXiv 2602.04879) and prime-rl's KL to the sampler:
    -keep r A + sampler_kl log² r.

    A token leaves the first term where its probability has moved too far in the direction in which its advantage
    pushes it: up by more than `mask_high` if A > 0, else down by more than `mask_low`.
    """
    moved = jnp.exp(tokens.logprob) - jnp.exp(tokens.old_logprob)
    masked = jnp.where(tokens.advantage > 0, moved > mask_high, moved < -mask_low)
    return _masked(tokens, masked, sampler_kl)


def symmetric_masked_ratio(tokens: Tokens, *, threshold: float = 0.1, sampler_kl: float = 1e-3) -> TokenLoss:
    """prime-rl's IPO: like `masked_ratio`, but a token leaves whenever its probability has moved by more than
    `threshold`, in either direction."""
    moved = jnp.abs(jnp.exp(tokens.logprob) - jnp.exp(tokens.old_logprob))
    return _masked(tokens, moved > threshold, sampler_kl)


def soft_gate(tokens: Tokens, *, positive_temperature: float = 1.0, negative_temperature: float = 1.05) -> TokenLoss:
    """SAPO (arXiv 2511.20347): -A (4 / τ) sigmoid(τ (r - 1)), with one τ for A > 0 and one for the rest.

    Where the ratio is 1, its gradient is that of -r A; away from 1, the gate closes softly. The default temperatures
    are the paper's.
    """
    ratio = bounded_exp(tokens.logprob - tokens.old_logprob)
    temperature = jnp.where(tokens.advantage > 0, positive_temperature, negative_temperature)
    gate = 4.0 / temperature * jax.nn.sigmoid(temperature * (ratio - 1.0))
    return TokenLoss(-tokens.advantage * gate, {"clip_fraction": jnp.zeros_like(ratio, bool)})


def log_likelihood(tokens: Tokens) -> TokenLoss:
    """-A log p (REINFORCE, Williams 1992; RLOO, arXiv 2402.14740, its leave-one-out estimator)."""
    return TokenLoss(-tokens.advantage * tokens.logprob, {"clip_fraction": jnp.zeros_like(tokens.logprob, bool)})


def imitation(tokens: Tokens) -> TokenLoss:
    """-log p: cross-entropy on a demonstrator's actions (`sft`): no ratio, no advantage, no clip."""
    return TokenLoss(-tokens.logprob, {})


def bounded_exp(log_ratio):
    """exp, bounded to e^±20: an overflow times a weight of 0 would be nan."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _masked(tokens: Tokens, masked, sampler_kl: float) -> TokenLoss:
    log_ratio = tokens.logprob - tokens.old_logprob
    kept = jnp.where(masked, 0.0, bounded_exp(log_ratio)) * tokens.advantage
    return TokenLoss(-kept + sampler_kl * jnp.square(log_ratio), {"clip_fraction": masked})


def _clipped(ratio, advantage, clip_low: float, clip_high: float, dual_clip: float) -> TokenLoss:
    unclipped = ratio * advantage
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    objective = jnp.minimum(unclipped, clipped)
    stopped = clipped < unclipped
    if dual_clip:
        floor = dual_clip * advantage
        stopped |= (advantage < 0) & (objective < floor)
        objective = jnp.where(advantage < 0, jnp.maximum(objective, floor), objective)
    return TokenLoss(-objective, {"clip_fraction": stopped})


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A loss, and its paper's choices, which apply unless the config makes others."""

    surrogate: Surrogate
    advantage: str = "group"  # a key of advantages.ADVANTAGES
    normalizer: str = "sequence"  # a key of weights.POLICY_NORMALIZERS
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # defaults that differ from the surrogate's
    filter_zero_variance: bool = False  # groups of equal rewards leave the policy term and its denominator
    every_action: bool = False  # the loss reads actions with advantage 0 too

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter with its default."""
        found = list(inspect.signature(self.surrogate).parameters.values())[1:]
        return {p.name: p.default for p in found if p.default is not p.empty} | dict(self.options)


POLICY_LOSSES = {
    # arXiv 2402.03300, eq. 3
    "grpo": PolicyLoss(clipped_ratio),
    # arXiv 2503.20783, section 3.2
    "dr_grpo": PolicyLoss(clipped_ratio, "group_mean", "constant"),
    # arXiv 2503.14476, eqs. 10 to 12
    "dapo": PolicyLoss(clipped_ratio, "group", "token", {"clip_high": 0.28}, filter_zero_variance=True),
    # arXiv 2507.18071, eq. 5
    "gspo": PolicyLoss(clipped_sequence_ratio),
    # arXiv 2506.13585, eq. 4
    "cispo": PolicyLoss(clipped_weight, "group", "token"),
    # arXiv 2602.04879, as prime-rl's default has it
    "dppo": PolicyLoss(masked_ratio, "group_mean", "token", every_action=True),
    # prime-rl's `ipo`
    "ipo": PolicyLoss(symmetric_masked_ratio, "group_mean", "token", every_action=True),
    # arXiv 2511.20347
    "sapo": PolicyLoss(soft_gate),
    # arXiv 2402.14740, up to the constant divisor of the sum over tokens
    "rloo": PolicyLoss(log_likelihood, "leave_one_out", "constant"),
    # Williams 1992, up to that divisor
    "reinforce": PolicyLoss(log_likelihood, "reward", "constant"),
    "imitation": PolicyLoss(imitation, every_action=True),
}


def find_policy_loss(name: str) -> PolicyLoss:
    """Returns the loss of this name: a key of `POLICY_LOSSES`, or `module:attribute` of a function or a `PolicyLoss`.

    Raises:
      ConfigError: the loss does not exist.
    """
    found = named.find(name, POLICY_LOSSES, "loss.policy")
    if isinstance(found, PolicyLoss):
        return found
    named.check_callable(found, name, "loss.policy")
    return PolicyLoss(found, every_action=True)  # it may train where the advantage is 0


def k1(logprob, reference_logprob):
    """log p - log q: unbiased, may be negative; its gradient has expectation 0 (Schulman, "Approximating KL
    Divergence", 2020)."""
    return logprob - reference_logprob


def k2(logprob, reference_logprob):
    """(log p - log q)² / 2: biased; its gradient is that of the KL (Schulman 2020)."""
    return jnp.square(logprob - reference_logprob) / 2


def k3(logprob, reference_logprob):
    """q / p - 1 - log(q / p): unbiased and never negative (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4)."""
    log_ratio = reference_logprob - logprob
    return bounded_exp(log_ratio) - 1.0 - log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
