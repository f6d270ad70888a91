"""The ECHO loss: both terms from one pass over the LM head.

In: hidden states and a micro-batch of packed rows. Out: this micro-batch's share of the loss, and metric sums.
"""

import jax
import jax.numpy as jnp

from echo_jax.batch import Batch
from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.roles import OBSERVATION_ROLES, Role

# Metrics that are sums over micro-batches, and the count that turns each into a mean.
MEANS = {
    "policy/entropy": "policy/tokens",
    "policy/clip_fraction": "policy/tokens",
    "policy/sampler_gap": "policy/tokens",
    "observation/ce": "observation/tokens",
    "loss/active_fraction": "pack/tokens",
}
MAXIMA = ("policy/sampler_gap_max",)


def clipped_ratio(logprob, sampler_logprob, advantage, clip_low, clip_high):
    """PPO's clipped surrogate per token, as a loss (arXiv 1707.06347, eq. 7); all f32 of one shape.

    Returns (loss, whether the clip is what decides it).
    """
    ratio = jnp.exp(logprob - sampler_logprob)
    free = ratio * advantage
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    return -jnp.minimum(free, clipped), clipped < free


def imitation(logprob, sampler_logprob, advantage, clip_low, clip_high):
    """Cross-entropy on a demonstrator's actions (`sft`): no ratio, no advantage, no clip."""
    del sampler_logprob, advantage, clip_low, clip_high
    return -logprob, jnp.zeros_like(logprob, bool)


POLICY_LOSSES = {"clip": clipped_ratio, "imitation": imitation}


def denominators(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns 1 / Σ of both terms over a whole update (before the micro-batch loop); 0 for a term without tokens."""

    def inverse(total):
        return jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)

    return inverse(batch.policy_denominator.sum()), inverse(batch.observation_denominator.sum())


def echo_loss(
    hidden: jax.Array,
    head: jax.Array,
    batch: Batch,
    inverse_denominators: tuple[jax.Array, jax.Array],
    *,
    policy: str,
    clip_low: float,
    clip_high: float,
    token_block: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Policy gradient on actions plus cross-entropy on observations (ECHO, arXiv 2605.24517, eqs. 1 to 3).

    Args:
      hidden: [B, T, D].
      head: [V, D].
      batch: fields [B, T].
      inverse_denominators: of the whole update; see `denominators`.
      policy: a key of `POLICY_LOSSES`.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      token_block: tokens whose logits exist at once.

    Returns:
      The share of the loss (f32 scalar; shares of micro-batches add up), and metric sums (maxima for names in
      `MAXIMA`).
    """
    # Padding is scored against token 0 and weighs nothing.
    scores = fused_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        batch.targets.reshape(-1),
        temperature=batch.temperature.reshape(-1),
        token_block=token_block,
    )
    logprob, entropy = (x.reshape(batch.targets.shape) for x in (scores.logprob, scores.entropy))
    surrogate, clipped = POLICY_LOSSES[policy](logprob, batch.sampler_logprob, batch.advantage, clip_low, clip_high)
    per_policy, per_observation = inverse_denominators
    policy_term = per_policy * jnp.sum(batch.policy_weight * surrogate)
    observation_term = per_observation * jnp.sum(batch.observation_weight * -logprob)

    action = (batch.role == Role.ACTION).astype(jnp.float32)
    observation = sum((batch.role == role).astype(jnp.float32) for role in OBSERVATION_ROLES)
    acts = batch.policy_weight > 0 if policy == "imitation" else batch.policy_weight * jnp.abs(batch.advantage) > 0
    active = acts | (batch.observation_weight > 0)
    sums = {
        "policy/loss": policy_term,
        "loss/observation": observation_term,
        "loss/total": policy_term + observation_term,
        "policy/entropy": jnp.sum(action * entropy),
        "observation/ce": jnp.sum(observation * -logprob),
        "policy/tokens": jnp.sum(action),
        "observation/tokens": jnp.sum(observation),
        "loss/active_fraction": jnp.sum(active, dtype=jnp.float32),
        "pack/tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
    }
    if policy != "imitation":  # where a policy sampled the actions, not a script
        gap = action * jnp.abs(logprob - batch.sampler_logprob)
        sums["policy/clip_fraction"] = jnp.sum(action * clipped)
        sums["policy/sampler_gap"] = jnp.sum(gap)
        sums["policy/sampler_gap_max"] = jnp.max(gap)
    return policy_term + observation_term, sums


def add_sums(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Joins the metric sums of two micro-batches."""
    return {name: jnp.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in a}


def finish_metrics(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Turns the sums of an update into its metrics, on the host. A mean over no tokens is left out."""
    values = {name: float(value) for name, value in sums.items()}
    for name, count in MEANS.items():
        if name in values:
            total = values.pop(name)
            if values[count] > 0:
                values[name] = total / values[count]
    return values
