"""A scan over blocks of tokens, each block's logits recomputed in the backward pass."""

import jax
import jax.numpy as jnp

from echo_jax.kernels.fused_logprobs.reference import reference


def xla(hidden, head, targets, temperature, token_block):
    """As `reference`, with at most ~`token_block` × V logits alive in either pass."""
    tokens = targets.shape[0]
    blocks = -(-tokens // token_block)
    padding = -tokens % blocks
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))
    temperature = jnp.pad(temperature, (0, padding), constant_values=1.0)

    def strided(x):  # token n goes to block n % blocks, so every block spans all data shards evenly
        return x.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1)

    # The head is closed over: as a scan's carry it would be saved once a block for the backward pass.
    block = jax.checkpoint(lambda xs: reference(xs[0], head, *xs[1:]))
    out = jax.lax.map(block, (strided(hidden), strided(targets), strided(temperature)))
    return tuple(x.swapaxes(0, 1).reshape(-1)[:tokens] for x in out)
