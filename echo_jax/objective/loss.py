"""The ECHO loss: all terms from one pass over the LM head.

In: hidden states and a micro-batch of packed rows. Out: this micro-batch's share of the loss, and metric sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from echo_jax.kernels.fused_logprobs import Axes, LogProbs, fused_logprobs
from echo_jax.objective.batch import Batch
from echo_jax.objective.policy_losses import KL_ESTIMATORS, POLICY_LOSSES, Clip, Tokens
from echo_jax.roles import ENVIRONMENT_CLASSES, ENVIRONMENT_ROLES, Role
from echo_jax.system.sharding import MESH_AXIS_OF
from echo_jax.tools import TOOL_IDS

# What the observation metrics are split by: suffix of the name -> which tokens, by role and tool. A class first, all
# tools together (the body's names have no suffix); then the bodies that each tool wrote.
SPLITS = {"" if name == "body" else f"_{name}": (role, None) for name, role in ENVIRONMENT_CLASSES.items()}
SPLITS |= {f"_tool_{name}": (Role.OBSERVATION, tool) for name, tool in TOOL_IDS.items()}
# Metrics that are sums over micro-batches, and the count that turns each into a mean.
MEANS = {
    "policy/entropy": "policy/tokens",
    "policy/clip_fraction": "policy/tokens",
    "policy/sampler_gap": "policy/tokens",
    "policy/mismatch_kl": "policy/tokens",
    "policy/reference_kl": "policy/reference_tokens",
    "loss/active_fraction": "pack/tokens",
    "pack/efficiency": "pack/slots",
}
MEANS |= {f"observation/{what}{split}": f"observation/tokens{split}" for split in SPLITS for what in ("ce", "accuracy")}
MAXIMA = ("policy/sampler_gap_max",)


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """How the LM head is run; see `fused_logprobs`."""

    token_block: int = 256
    vocab_block: int = 2048
    score_all: bool = True  # also tokens that no term reads, for the metrics; never prompt, scaffold and padding
    mesh: Mesh | None = None  # None: one device

    def axes(self) -> Axes:
        on = lambda logical: None if self.mesh is None else MESH_AXIS_OF[logical]  # noqa: E731
        return Axes(tokens=on("batch") or (), vocab=on("vocab"), embed=on("embed"))


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What is the same for every token."""

    policy: str  # a key of POLICY_LOSSES
    clip: Clip
    head: HeadOptions
    importance_cap: float = 0.0  # of truncated importance sampling, see `echo_loss`; 0: off
    observation_clip: float = 1.0  # cross-entropy trains a token until its probability is this; 1: always
    kl_estimator: str = "k3"  # a key of KL_ESTIMATORS


def denominators(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns 1 / Σ of both terms over a whole update (before the micro-batch loop); 0 for a term without tokens."""

    def inverse(total):
        return jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)

    return inverse(batch.policy_denominator.sum()), inverse(batch.observation_denominator.sum())


def scored_tokens(batch: Batch, options: HeadOptions) -> jax.Array:
    """Returns bool: the tokens that the head is run for. Metrics are over these."""
    active = batch.active > 0
    if options.score_all:
        active |= (batch.role == Role.ACTION) | (batch.role >= min(ENVIRONMENT_ROLES))
    return active


def score(hidden: jax.Array, head: jax.Array, batch: Batch, options: HeadOptions) -> LogProbs:
    """Returns the log-probs of a micro-batch's targets, [B, T] each, at their temperatures; 0 where not scored."""
    scores = fused_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        batch.targets.reshape(-1),
        active=scored_tokens(batch, options).reshape(-1),
        temperature=batch.temperature.reshape(-1),
        entropy=True,
        vocab_block=options.vocab_block,
        token_block=options.token_block,
        mesh=options.mesh,
        axes=options.axes(),
    )
    return jax.tree.map(lambda x: x.reshape(batch.targets.shape), scores)


def echo_loss(
    hidden: jax.Array,
    head: jax.Array,
    batch: Batch,
    inverse_denominators: tuple[jax.Array, jax.Array],
    options: LossOptions,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Policy gradient on actions plus cross-entropy on observations (ECHO, arXiv 2605.24517, eqs. 1 to 3).

    With `importance_cap` C each action's policy loss is multiplied by min(p_old / p_sampler, C), without a gradient:
    truncated importance sampling for a sampler that is not the trainer (Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", 2025). It never touches a cross-entropy.

    Args:
      hidden: [B, T, D].
      head: [V, D].
      batch: fields [B, T].
      inverse_denominators: of the whole update; see `denominators`.
      options: what is the same for every token.

    Returns:
      The share of the loss (f32 scalar; shares of micro-batches add up), and metric sums (maxima for names in
      `MAXIMA`).
    """
    scores = score(hidden, head, batch, options.head)
    logprob = scores.logprob
    scored = scored_tokens(batch, options.head)
    tokens = Tokens(logprob, batch.old_logprob, batch.advantage, batch.policy_weight, batch.segment_ids)
    surrogate, clipped = POLICY_LOSSES[options.policy].surrogate(tokens, options.clip)
    if options.importance_cap:
        surrogate *= jnp.minimum(jnp.exp(batch.old_logprob - batch.sampler_logprob), options.importance_cap)
    kl = KL_ESTIMATORS[options.kl_estimator](logprob, batch.reference_logprob)
    cross_entropy = -logprob
    # PaW (arXiv 2606.02388): what is already this likely has no gradient left.
    bounded = cross_entropy
    if options.observation_clip < 1:
        bounded = jnp.maximum(cross_entropy, -jnp.log(options.observation_clip))

    per_policy, per_observation = inverse_denominators
    policy_term = per_policy * jnp.sum(batch.policy_weight * surrogate)
    kl_term = per_policy * jnp.sum(batch.kl_weight * kl)
    observation_term = per_observation * jnp.sum(batch.observation_weight * bounded)
    total = policy_term + kl_term + observation_term

    action = ((batch.role == Role.ACTION) & scored).astype(jnp.float32)
    real = batch.segment_ids > 0
    sums = {
        "policy/loss": policy_term,
        "loss/kl": kl_term,
        "loss/observation": observation_term,
        "loss/total": total,
        "observation/loss": per_observation * jnp.sum(batch.observation_share * bounded),
        "policy/entropy": jnp.sum(action * scores.entropy),
        "policy/tokens": jnp.sum(action),
        "loss/active_fraction": jnp.sum(batch.active),
        "pack/tokens": jnp.sum(real, dtype=jnp.float32),
        "pack/efficiency": jnp.sum(real, dtype=jnp.float32),
        "pack/slots": jnp.sum(real.any(axis=-1), dtype=jnp.float32) * real.shape[-1],  # of rows that hold anything
        "pack/pairs": jnp.sum(jnp.where(real, batch.positions + 1, 0), dtype=jnp.float32),  # a token and one it reads
    }
    for split, (role, tool) in SPLITS.items():
        chosen = (batch.role == role) & scored
        chosen = chosen if tool is None else chosen & (batch.tool == tool)
        sums[f"observation/ce{split}"] = jnp.sum(chosen * cross_entropy)
        sums[f"observation/accuracy{split}"] = jnp.sum(chosen & scores.correct, dtype=jnp.float32)
        sums[f"observation/tokens{split}"] = jnp.sum(chosen, dtype=jnp.float32)
    if options.policy != "imitation":  # where a policy sampled the actions, not a script
        difference = action * (logprob - batch.sampler_logprob)
        sums["policy/clip_fraction"] = jnp.sum(action * clipped)
        sums["policy/sampler_gap"] = jnp.sum(jnp.abs(difference))
        sums["policy/sampler_gap_max"] = jnp.max(jnp.abs(difference))
        sums["policy/mismatch_kl"] = jnp.sum(jnp.exp(difference) - 1.0 - difference)
        sums["policy/reference_kl"] = jnp.sum(jnp.where(batch.kl_weight > 0, kl, 0.0))
        sums["policy/reference_tokens"] = jnp.sum(batch.kl_weight > 0, dtype=jnp.float32)
    return total, sums


def add_sums(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Joins the metric sums of two micro-batches."""
    return {name: jnp.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in a}


def finish_metrics(sums: dict[str, jax.Array]) -> dict[str, float]:
    """Turns the sums of an update into its metrics, on the host. A mean over no tokens is left out, and so is a count
    of tokens that most runs do not have (of a split of the observation metrics, of the KL) where it is 0."""
    values = {name: float(value) for name, value in sums.items()}
    for name, count in MEANS.items():
        if name in values:
            total = values.pop(name)
            if values[count] > 0:
                values[name] = total / values[count]
    rare = ("observation/tokens_", "policy/reference_tokens")
    return {name: value for name, value in values.items() if value or not name.startswith(rare)}
