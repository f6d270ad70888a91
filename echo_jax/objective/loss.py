"""The ECHO loss: all terms from one pass over the LM head.

In: hidden states and a micro-batch of packed rows. Out: this micro-batch's share of the loss, and metric sums.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from echo_jax.kernels.fused_logprobs import Axes, LogProbs, fused_logprobs
from echo_jax.objective.batch import Batch
from echo_jax.objective.policy_losses import KL_ESTIMATORS, TokenLoss, Tokens, bounded_exp, find_policy_loss
from echo_jax.roles import ENVIRONMENT_CLASSES, ENVIRONMENT_ROLES, Role
from echo_jax.system import user_code
from echo_jax.system.errors import ConfigError
from echo_jax.system.sharding import MESH_AXIS_OF

# How an action's policy loss is corrected by the ratio of the old policy's probability to the sampler's: that of the
# token or of the whole rollout; above the cap it is cut to the cap, or the token leaves the term.
IMPORTANCE_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
MAXIMA = ("policy/sampler_gap_max",)  # metric sums that hold the largest value, not a sum


class Mean(NamedTuple):
    """The sums over micro-batches from which a mean is computed."""

    total: jax.Array  # f32 scalar
    count: jax.Array  # f32 scalar


Sums = dict[str, jax.Array | Mean]


def splits(tools: Sequence[str]) -> dict[str, tuple[Role, int | None]]:
    """Returns the splits of the observation metrics: suffix of the name -> (role, tool) of the tokens.

    First each class over all tools (the body's names have no suffix), then the bodies that each tool wrote.
    """
    classes = {"" if name == "body" else f"_{name}": (role, None) for name, role in ENVIRONMENT_CLASSES.items()}
    return classes | {f"_tool_{name}": (Role.OBSERVATION, i) for i, name in enumerate(tools, start=1)}


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """How to run the LM head; see `fused_logprobs`."""

    token_block: int = 256
    vocab_block: int = 2048
    score_all: bool = True  # also tokens that only metrics read; never prompt, scaffold and padding
    mesh: Mesh | None = None  # None: one device

    def axes(self) -> Axes:
        on = lambda logical: None if self.mesh is None else MESH_AXIS_OF[logical]  # noqa: E731
        return Axes(tokens=on("batch") or (), vocab=on("vocab"), embed=on("embed"))


PolicyOptions = tuple[tuple[str, Any], ...]  # hyperparameters of a policy loss that differ from its defaults


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The options that are the same for every token, and the policy losses that `Batch.policy` chooses from."""

    policy: str  # see `find_policy_loss`
    head: HeadOptions
    policy_options: PolicyOptions = ()
    other_policies: tuple[tuple[str, PolicyOptions], ...] = ()  # those of environments with their own, from number 1
    tools: tuple[str, ...] = ()  # names, in the order of `Batch.tool`; each gets observation metrics
    importance_cap: float = 0.0  # of the importance correction, see `echo_loss`; 0: off
    importance_correction: str = "token_truncate"  # of IMPORTANCE_CORRECTIONS
    observation_clip: float = 1.0  # cross-entropy trains a token up to this probability; 1: always
    kl_estimator: str = "k3"  # a key of KL_ESTIMATORS
    control_ids: tuple[int, ...] = ()  # see `Renderer.control_ids`; with any, metrics of these tokens
    kl_clamp: float = 0.0  # bounds a token's KL to [-kl_clamp, kl_clamp]; 0: off
    entropy_bonus: bool = False  # whether `Batch.entropy_weight` is used
    measures_size: bool = False  # whether to sum up the absolute values of the tokens' policy losses too

    @property
    def policies(self) -> tuple[tuple[str, PolicyOptions], ...]:
        """(name, hyperparameters) of each policy loss, in the order of `Batch.policy`."""
        return ((self.policy, self.policy_options), *self.other_policies)


def denominators(batch: Batch) -> dict[str, jax.Array]:
    """Returns {term: 1 / Σ of its denominator} over a whole update (before the micro-batch loop); 0 for a term without
    tokens."""

    def inverse(total):
        return jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)

    return {term: inverse(parts.sum()) for term, parts in batch.denominators.items()}


def scored_tokens(batch: Batch, options: HeadOptions) -> jax.Array:
    """Returns bool: the tokens that the head is run for. Metrics cover these."""
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
    inverse_denominators: dict[str, jax.Array],
    options: LossOptions,
) -> tuple[jax.Array, Sums]:
    """Policy gradient on actions plus cross-entropy on observations (ECHO, arXiv 2605.24517, eqs. 1 to 3).

    With `importance_cap` C each action's policy loss is multiplied by a weight without a gradient, which corrects for a
    sampler that differs from the trainer and never touches a cross-entropy. "token_truncate": min(p_old / p_sampler, C)
    (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025). "sequence_truncate":
    the same of the product of these ratios over the rollout's trained actions, all branches together. "token_mask" and
    "sequence_mask": the ratio itself up to C, and 0 above (TRL's default is the second, with C = 3).

    Args:
      hidden: [B, T, D].
      head: [V, D].
      batch: fields [B, T].
      inverse_denominators: of the whole update; see `denominators`.
      options: the options that are the same for every token.

    Returns:
      This micro-batch's share of the loss (f32 scalar; the shares add up), and metric sums for `add_sums` and
      `finish_metrics`.
    """
    scores = score(hidden, head, batch, options.head)
    logprob = scores.logprob
    scored = scored_tokens(batch, options.head)
    tokens = Tokens(logprob, batch.old_logprob, batch.advantage, batch.policy_weight, batch.segment_ids, batch.rollout)
    surrogate, policy_metrics = _policy_losses(tokens, batch.policy, options)
    if options.importance_cap:
        surrogate *= _importance_weights(tokens, batch.sampler_logprob, options)
    kl = KL_ESTIMATORS[options.kl_estimator](logprob, batch.reference_logprob)
    if options.kl_clamp:
        kl = jnp.clip(kl, -options.kl_clamp, options.kl_clamp)
    cross_entropy = -logprob
    # PaW (arXiv 2606.02388): tokens that are already this likely get no gradient.
    bounded = cross_entropy
    if options.observation_clip < 1:
        bounded = jnp.maximum(cross_entropy, -jnp.log(options.observation_clip))

    per_policy, per_observation = inverse_denominators["policy"], inverse_denominators["observation"]
    policy_term = per_policy * jnp.sum(batch.policy_weight * surrogate)
    kl_term = per_policy * jnp.sum(batch.kl_weight * kl)
    observation_term = per_observation * jnp.sum(batch.observation_weight * bounded)
    total = policy_term + kl_term + observation_term
    if options.entropy_bonus:
        entropy_term = -per_policy * jnp.sum(batch.entropy_weight * scores.entropy)
        total += entropy_term

    action = ((batch.role == Role.ACTION) & scored).astype(jnp.float32)
    actions = jnp.sum(action)
    real = batch.segment_ids > 0
    tokens_packed = jnp.sum(real, dtype=jnp.float32)
    slots = jnp.sum(real.any(axis=-1), dtype=jnp.float32) * real.shape[-1]  # of rows in use
    sums: Sums = {
        "policy/loss": policy_term,
        "loss/kl": kl_term,
        "loss/observation": observation_term,
        "loss/total": total,
        "observation/loss": per_observation * jnp.sum(batch.observation_share * bounded),
        "policy/entropy": Mean(jnp.sum(action * scores.entropy), actions),
        "policy/tokens": actions,
        "loss/active_fraction": Mean(jnp.sum(batch.active), tokens_packed),
        "pack/tokens": tokens_packed,
        "pack/efficiency": Mean(tokens_packed, slots),
        "pack/slots": slots,
        # A token attends to itself and to all before it.
        "pack/pairs": jnp.sum(jnp.where(real, batch.positions + 1, 0), dtype=jnp.float32),
    }
    if options.entropy_bonus:
        sums["loss/entropy"] = entropy_term
    if options.measures_size:
        sums["policy/size"] = per_policy * jnp.sum(batch.policy_weight * jnp.abs(surrogate))
    for split, (role, tool) in splits(options.tools).items():
        chosen = (batch.role == role) & scored
        chosen = chosen if tool is None else chosen & (batch.tool == tool)
        count = jnp.sum(chosen, dtype=jnp.float32)
        sums[f"observation/ce{split}"] = Mean(jnp.sum(chosen * cross_entropy), count)
        sums[f"observation/accuracy{split}"] = Mean(jnp.sum(chosen & scores.correct, dtype=jnp.float32), count)
        sums[f"observation/tokens{split}"] = count
    if options.policy != "imitation":  # if a policy sampled the actions, not a script
        difference = action * (logprob - batch.sampler_logprob)
        sums["policy/sampler_gap"] = Mean(jnp.sum(jnp.abs(difference)), actions)
        sums["policy/sampler_gap_max"] = jnp.max(jnp.abs(difference))
        sums["policy/mismatch_kl"] = Mean(jnp.sum(jnp.exp(difference) - 1.0 - difference), actions)
        in_kl = jnp.sum(batch.kl_weight > 0, dtype=jnp.float32)
        sums["policy/reference_kl"] = Mean(jnp.sum(jnp.where(batch.kl_weight > 0, kl, 0.0)), in_kl)
        sums["policy/reference_tokens"] = in_kl
        if options.control_ids:
            # A collapse begins with a runaway of these tokens (arXiv 2606.26027).
            control = action * jnp.isin(batch.targets, jnp.asarray(options.control_ids), method="compare_all")
            sums["policy/control_share"] = Mean(jnp.sum(control), actions)
            sums["policy/control_probability"] = Mean(jnp.sum(control * jnp.exp(logprob)), jnp.sum(control))
        for name, values in policy_metrics.items():
            if f"policy/{name}" in sums:
                names = ", ".join(repr(name) for name, _ in options.policies)
                raise ConfigError(f"the policy loss {names} reports a metric {name!r}: the name is taken")
            sums[f"policy/{name}"] = Mean(jnp.sum(action * values), actions)
    return total, sums


def _policy_losses(tokens: Tokens, policy: jax.Array, options: LossOptions) -> TokenLoss:
    """Returns each token's loss under the policy loss of its number, and the metrics of all: 0 where a token's loss
    does not report one."""
    loss, metrics = None, {}
    for number, (name, given) in enumerate(options.policies):
        found = find_policy_loss(name)
        own = policy == number
        of_this = tokens
        if len(options.policies) > 1:
            of_this = tokens._replace(weight=jnp.where(own, tokens.weight, 0.0))
        with user_code.calling(f"the policy loss {name!r}"):
            returned = found.surrogate(of_this, **(dict(found.options) | dict(given)))
        if not isinstance(returned, TokenLoss):
            raise ConfigError(
                f"the policy loss {name!r} returned a {type(returned).__name__}; it must return a TokenLoss"
            )
        if len(options.policies) == 1:
            return returned
        loss = returned.loss if loss is None else jnp.where(own, returned.loss, loss)
        for metric, values in returned.metrics.items():
            metrics[metric] = jnp.where(own, values, metrics.get(metric, 0.0))
    return TokenLoss(loss, metrics)


def _importance_weights(tokens: Tokens, sampler_logprob: jax.Array, options: LossOptions) -> jax.Array:
    log_ratio = tokens.old_logprob - sampler_logprob
    level, above = options.importance_correction.split("_")
    if level == "sequence":
        log_ratio = tokens.sum_of_rollout(log_ratio)
    ratio = bounded_exp(log_ratio)
    if above == "truncate":
        return jnp.minimum(ratio, options.importance_cap)
    return jnp.where(ratio > options.importance_cap, 0.0, ratio)


def add_sums(a: Sums, b: Sums) -> Sums:
    """Adds the metric sums of two micro-batches."""
    return {
        name: jnp.maximum(a[name], b[name]) if name in MAXIMA else jax.tree.map(jnp.add, a[name], b[name]) for name in a
    }


def is_count(name: str) -> bool:
    """Returns whether a metric sum counts tokens or slots, so that those of several updates add up."""
    return name.startswith("pack/") or "/tokens" in name or name.endswith("_tokens")


def finish_metrics(sums: Sums) -> dict[str, float]:
    """Turns the sums of an update into its metrics, on the host. Omits a mean over no tokens, and a token count of 0
    that most runs would have (of a split of the observation metrics, or of the KL)."""
    metrics = {}
    rare = ("observation/tokens_", "policy/reference_tokens")
    for name, value in sums.items():
        if isinstance(value, Mean):
            if value.count > 0:
                metrics[name] = float(value.total) / float(value.count)
        elif value or not name.startswith(rare):
            metrics[name] = float(value)
    return metrics
