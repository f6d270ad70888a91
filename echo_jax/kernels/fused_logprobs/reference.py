"""The plain computation: all logits at once, differentiated by JAX. For tests."""

import jax
import jax.numpy as jnp


def reference(hidden, head, targets, active, temperature, *, vocab_axis, logit_softcap, entropy):
    """hidden [N, D], head [V, D] or [D, V], targets [N], active bool [N], temperature [N] -> logprob, logsumexp,
    entropy (f32 [N]), correct (bool [N]); zeros on inactive rows, whatever they hold."""
    hidden = jnp.where(active[:, None], hidden, 0)
    temperature = jax.lax.stop_gradient(jnp.where(active, temperature, 1.0))
    targets = jnp.where(active, targets, 0)
    weight = (head.T if vocab_axis else head).astype(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, weight, preferred_element_type=jnp.float32)
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    logits = logits / temperature[:, None]
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    mean_logit = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    correct = target >= jax.lax.stop_gradient(logits).max(axis=-1)
    values = (jnp.where(active, x, 0.0) for x in (target - logsumexp, logsumexp, entropy * (logsumexp - mean_logit)))
    return *values, active & correct
