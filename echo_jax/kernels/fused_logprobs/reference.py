"""The obvious way: all logits at once. For tests, and the block that the chunked way maps over."""

import jax
import jax.numpy as jnp


def reference(hidden, head, targets, temperature, token_block=None):
    """hidden [N, D], head [V, D], targets [N], temperature [N] -> logprob, logsumexp, entropy (f32 [N]), correct (bool
    [N])."""
    del token_block
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    logits = logits / temperature[:, None]
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    entropy = logsumexp - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    correct = target >= jax.lax.stop_gradient(logits).max(axis=-1)
    return target - logsumexp, logsumexp, entropy, correct
