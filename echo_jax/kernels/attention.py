"""Causal attention over the packed rows of training. Softmax in f32. Sampling has `paged_attention`."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from echo_jax.system.sharding import MESH_AXIS_OF

IMPLEMENTATIONS = ("xla", "splash")
SPLASH_BLOCK = 512  # queries, and keys, per block


def packed_attention(q, k, v, segment_ids, *, implementation: str = "xla", mesh: Mesh | None = None):
    """Attention within segments. q [B, T, H, K], k and v [B, T, G, K] with G dividing H, segment_ids [B, T] -> like q.

    Rows hold each segment in order, so row order is causal order. Padding (segment 0) sees only padding. `xla` forms
    the [T, T] scores of every head; the partitioner places it. `splash` is jax's Pallas kernel for TPU, which forms no
    such scores; it is mapped over the data and tensor axes of `mesh`.

    Raises:
      ValueError: `splash` cannot divide T into its blocks.
    """
    if implementation == "splash":
        return _splash(q, k, v, segment_ids, mesh)
    time = jnp.arange(q.shape[1])
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (time[:, None] >= time[None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def _splash(q, k, v, segment_ids, mesh: Mesh | None):
    length = q.shape[1]
    block = min(SPLASH_BLOCK, length)
    if length % block or block % 128:
        raise ValueError(
            f"attention 'splash' needs the row length to be 128, 256 or a multiple of {SPLASH_BLOCK} tokens, "
            f"not {length}"
        )
    shards = 1 if mesh is None else mesh.shape[MESH_AXIS_OF["heads"]]
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * (q.shape[2] // shards))
    kernel = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )

    def attend(q, k, v, segment_ids):
        heads_first = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        one_row = lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))  # noqa: E731
        return jax.vmap(one_row)(*heads_first, segment_ids).swapaxes(1, 2)

    if mesh is None:
        return attend(q, k, v, segment_ids)
    rows, heads = MESH_AXIS_OF["batch"], MESH_AXIS_OF["heads"]
    spec = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(rows, None)), out_specs=spec, check_vma=False
    )(q, k, v, segment_ids)
