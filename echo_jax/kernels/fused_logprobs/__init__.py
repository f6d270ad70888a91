"""Log-probabilities of targets under an LM head, without keeping the [tokens, vocab] logits.

It returns vectors, never a reduced loss, so that any per-token cotangent is right.
"""

from typing import NamedTuple

import jax

from echo_jax.kernels.fused_logprobs.reference import reference
from echo_jax.kernels.fused_logprobs.xla import xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla}


class LogProbs(NamedTuple):
    logprob: jax.Array  # f32 [N] log p(target)
    logsumexp: jax.Array  # f32 [N] of the tempered logits
    entropy: jax.Array  # f32 [N] of the tempered distribution, nats
    correct: jax.Array  # bool [N] whether no token is likelier than the target


def fused_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    token_block: int = 1024,
    implementation: str = "xla",
) -> LogProbs:
    """Scores targets under softmax(hidden @ head.T / temperature).

    Args:
      hidden: f32 or bf16 [N, D].
      head: f32 or bf16 [V, D].
      targets: int32 [N], in [0, V).
      temperature: scalar or f32 [N].
      token_block: tokens whose logits exist at once (`xla`).
      implementation: a key of `IMPLEMENTATIONS`; dots accumulate in f32 in every one.

    Returns:
      f32 [N] vectors, differentiable with respect to hidden and head for any cotangents, and `correct`, which is not.

    Raises:
      ValueError: shapes do not fit, or the implementation does not exist.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [N, D] {hidden.shape}, head [V, D] {head.shape}, targets [N] {targets.shape} do not fit"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    temperature = jax.numpy.broadcast_to(jax.numpy.asarray(temperature, jax.numpy.float32), targets.shape)
    return LogProbs(*IMPLEMENTATIONS[implementation](hidden, head, targets, temperature, token_block))
