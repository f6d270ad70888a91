"""Causal attention: over packed rows in training, over a KV cache in decoding. Softmax in f32."""

import jax
import jax.numpy as jnp


def packed_attention(q, k, v, segment_ids):
    """Attention inside segments. q [B, T, H, K], k and v [B, T, G, K] with G dividing H, segment_ids [B, T] -> like q.

    Rows hold each segment in order, so row order is causal order. Padding (segment 0) sees padding only.
    """
    time = jnp.arange(q.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (time[:, None] >= time[None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def cached_attention(q, k, v, positions):
    """Attention of one token a lane over its cache.

    Args:
      q: [B, H, K].
      k, v: [B, S, G, K]; slot s holds position s of the lane's sequence.
      positions: int32 [B]; a lane sees the slots up to and including its own position.

    Returns:
      [B, H, K].
    """
    mask = jnp.arange(k.shape[1])[None, :] <= positions[:, None]
    return jax.nn.dot_product_attention(q[:, None], k, v, mask=mask[:, None, None], implementation="xla")[:, 0]
