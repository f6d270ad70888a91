"""Log-probabilities of targets under an LM head, without materialising the [tokens, vocab] logits.

In: hidden states, an LM head, target ids. Out: log-probs, logsumexp and entropy of each token: vectors, never a reduced
loss, so that the gradient is right for any per-token cotangent. `reference.py` defines the result, `xla.py` computes
it, `sharded.py` maps it over a mesh.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from echo_jax.kernels.fused_logprobs import pallas_tpu, sharded, xla
from echo_jax.kernels.fused_logprobs.reference import reference
from echo_jax.kernels.fused_logprobs.xla import Axes, Inputs, Options, Scores

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


class LogProbs(NamedTuple):
    """One number per token; 0 where the token is not active."""

    logprob: jax.Array  # f32 [N] log p(target)
    logsumexp: jax.Array  # f32 [N] of the tempered logits
    entropy: jax.Array  # f32 [N] of the tempered distribution, nats; 0 if not requested
    correct: jax.Array  # bool [N] whether no token is likelier than the target


def fused_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    active: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    logit_softcap: float | None = None,
    entropy: bool = False,
    vocab_axis: int = 0,
    vocab_block: int = 2048,
    token_block: int = 256,
    mesh: Mesh | None = None,
    axes: Axes = Axes(),  # noqa: B008 (frozen)
    implementation: str = "xla",
) -> LogProbs:
    """Scores targets under softmax(softcap(hidden @ head.T) / temperature).

    Matmuls are in the dtype of `hidden` and accumulate in f32; logits, softmax and outputs are f32. A head of another
    dtype is cast block by block; its gradient has the head's dtype, so f32 master weights get f32 gradients.

    Args:
      hidden: f32 or bf16 [N, D]; N is at least 1.
      head: f32 or bf16 [V, D], or [D, V] with `vocab_axis` = 1.
      targets: int32 [N], in [0, V) on active rows.
      active: bool [N], the tokens whose results are used; the others are skipped, whatever they hold. None: all.
      temperature: scalar or f32 [N], above 0 on active rows; not differentiated.
      logit_softcap: c in c tanh(z / c), applied before the temperature; None: no softcap.
      entropy: whether to compute the entropy.
      vocab_block, token_block: size of the block of logits that exists at once (`xla`; `pallas_tpu` uses token_block
        alone, `reference` computes all logits at once).
      mesh, axes: how the arrays are sharded (`xla`, `reference`); omit both on one device.
      implementation: one of `IMPLEMENTATIONS`; `pallas_tpu` compiles for TPU only.

    Returns:
      Vectors, differentiable with respect to hidden and head for any cotangents (`correct` has none).

    Raises:
      ValueError: shapes do not fit each other or the mesh, a target is out of range on an active row (under a trace its
        log-prob is nan instead), or the implementation does not exist.
    """
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    active = jnp.ones(targets.shape, bool) if active is None else jnp.asarray(active)
    if vocab_axis not in (0, 1):
        raise ValueError(f"vocab_axis = {vocab_axis} must be 0 for a head [V, D] or 1 for [D, V]")
    dimension = head.shape[1 - vocab_axis] if head.ndim == 2 else None
    fit = hidden.ndim == 2 and hidden.shape[1] == dimension and targets.shape == active.shape == hidden.shape[:1]
    if not fit or active.dtype != bool or not hidden.size:
        layout = "[D, V]" if vocab_axis else "[V, D]"
        raise ValueError(
            f"hidden [N, D] {hidden.shape}, head {layout} {head.shape}, targets [N] {targets.shape}, active bool [N] "
            f"{active.dtype} {active.shape} do not fit"
        )
    if min(vocab_block, token_block) < 1:
        raise ValueError(f"vocab_block = {vocab_block} and token_block = {token_block} must both be at least 1")
    if mesh is None and axes != Axes():
        raise ValueError(f"{axes} given without a mesh")
    outside = active & ((targets < 0) | (targets >= head.shape[vocab_axis]))
    if not isinstance(outside, jax.core.Tracer) and outside.any():
        wrong = int(targets[jnp.argmax(outside)])
        raise ValueError(f"target {wrong} is outside the vocabulary of {head.shape[vocab_axis]}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    inputs = Inputs(hidden, head, targets.astype(jnp.int32), active, temperature)
    if implementation == "reference":
        values = reference(*inputs, vocab_axis=vocab_axis, logit_softcap=logit_softcap, entropy=entropy)
    else:
        options = Options(vocab_block, token_block, entropy, logit_softcap, vocab_axis, axes)
        if mesh is not None:
            sharded.check(inputs, options, mesh)
        pallas = implementation == "pallas_tpu"
        if pallas and (mesh is not None or vocab_axis):
            raise ValueError("implementation 'pallas_tpu' takes a head [V, D] on one device; use 'xla'")
        values = _fused(*inputs, options, mesh, pallas)[:4]
    scores = LogProbs(*values)
    return scores._replace(logprob=jnp.where(outside, jnp.nan, scores.logprob))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _fused(hidden, head, targets, active, temperature, options: Options, mesh: Mesh | None, pallas: bool) -> Scores:
    return _forward(hidden, head, targets, active, temperature, options, mesh, pallas)[0]


def _forward(hidden, head, targets, active, temperature, options, mesh, pallas):
    inputs = Inputs(hidden, head, targets, active, temperature)
    if pallas:
        scores = pallas_tpu.forward(inputs, options)
    else:
        scores = xla.forward(inputs, options) if mesh is None else sharded.forward(inputs, options, mesh)
    return scores, (inputs, scores)


def _backward(options, mesh, pallas, residuals, cotangents):
    del pallas  # both share this backward pass
    inputs, scores = residuals
    if mesh is None:
        d_hidden, d_head = xla.backward(inputs, scores, cotangents, options)
    else:
        d_hidden, d_head = sharded.backward(inputs, scores, cotangents, options, mesh)
    return d_hidden, d_head, None, None, None


_fused.defvjp(_forward, _backward)
