"""Attention over a pool of KV pages: each sequence's keys and values lie in pages of a fixed size, in any order.

In: queries, the pool and each sequence's table of pages. Out: what the queries attend to. On TPU it is jax's Pallas
kernel; elsewhere a loop over pages with a softmax that is corrected step by step (Milakov and Gimelshein, arXiv
1805.02867), which ends at the longest live position: the cost follows what is used, not the table's length, and the
table's length changes no bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, PartitionSpec

from echo_jax.system.sharding import MESH_AXIS_OF, free_axes

IMPLEMENTATIONS = ("auto", "xla", "ragged")
KERNEL_TOKENS = 512  # keys that the kernel handles at once
KERNEL_QUERIES = 32
# The loop takes one page a step up to LOOP_SINGLY positions, where keys past a sequence's end would cost most.
# Beyond that it takes as many pages as hold LOOP_TOKENS keys.
LOOP_SINGLY = 128
LOOP_TOKENS = 64
LANES = 128  # the kernel takes multiples of this head size


def implementation_for(name: str, mesh: Mesh) -> str:
    """Returns the implementation that "auto" stands for: by the platform of the mesh's devices, which need not be this
    machine's."""
    if name != "auto":
        return name
    return "ragged" if mesh.devices.flat[0].platform == "tpu" else "xla"


def pool_heads(kv_heads: int, head_dim: int, dtype, implementation: str, shards: int = 1) -> tuple[int, int]:
    """Returns the number of KV heads and the head size of a pool whose heads are spread over `shards` devices: those of
    the model or, for `ragged`, the next that its kernel takes."""
    if implementation != "ragged":
        return kv_heads, head_dim
    heads, packed = kv_heads // shards, 4 // jnp.dtype(dtype).itemsize
    while (2 * heads) % packed or not ((tiles := 2 * heads // packed) in (1, 2, 4, 8) or tiles % 8 == 0):
        heads += 1
    return heads * shards, -(-head_dim // LANES) * LANES


def _padded(x, shape: tuple[int, ...], shards: int = 1):
    """Returns x [B, C, H, K] with zeros up to (H, K) = shape: behind the heads of each shard, and behind each head."""
    if x.shape[2:] == shape:
        return x
    heads, size = shape
    x = x.reshape(*x.shape[:2], shards, x.shape[2] // shards, x.shape[3])
    more = heads // shards - x.shape[3], size - x.shape[4]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more[0]), (0, more[1]))).reshape(*x.shape[:2], heads, size)


def paged_attention(
    q, pool, table, positions, *, implementation: str = "xla", mesh: Mesh | None = None, kv_heads: int | None = None
):
    """Causal attention of some tokens of each sequence over its pages. Softmax in f32.

    `ragged` needs the tokens of a sequence to lie so that position - column is the same for all, and works on the
    devices of `mesh`, each on its KV heads.

    Args:
      q: [B, C, H, K], C tokens of each of B sequences.
      pool: [N, P, 2G, K], pages of P tokens; a token's key and value of head g are rows 2g and 2g + 1. G divides H.
      table: int32 [B, M], the pages of each sequence in order; entries past its last page may be any page.
      positions: int32 [B, C] of the tokens; a token sees the positions up to its own. -1: padding, whose result is
        finite.
      kv_heads: of the model, where the pool of `ragged` is padded to more, or to a larger K; see `pool_heads`.

    Returns:
      Like q.
    """
    if implementation == "ragged":
        return _ragged(q, pool, table, positions, mesh, q.shape[2] // (kv_heads or pool.shape[2] // 2))
    batch, tokens, heads, size = q.shape
    page, groups = pool.shape[1], pool.shape[2] // 2
    grouped = (q * size**-0.5).reshape(batch, tokens, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    last = jnp.max(positions)
    several = max(1, LOOP_TOKENS // page)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % several)))

    def some_pages(i, carry, *, pages):
        highest, total, mixed = carry
        own = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        kv = pool[own].reshape(batch, pages * page, groups, 2, size)
        scores = jnp.einsum("bghck,bpgk->bghcp", grouped, kv[:, :, :, 0], preferred_element_type=jnp.float32)
        at = i * pages * page + jnp.arange(pages * page)
        seen = at <= positions[:, None, None, :, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        higher = jnp.maximum(highest, scores.max(-1))
        # Where no key was seen yet, `higher` is -inf: there is nothing to correct and nothing to add.
        base = jnp.where(jnp.isinf(higher), 0.0, higher)
        correction, weights = jnp.exp(highest - base), jnp.exp(scores - base[..., None])
        values = jnp.einsum(
            "bghcp,bpgk->bghck", weights.astype(kv.dtype), kv[:, :, :, 1], preferred_element_type=jnp.float32
        )
        return higher, total * correction + weights.sum(-1), mixed * correction[..., None] + values

    shape = grouped.shape[:-1]
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(grouped.shape, jnp.float32))
    # Where a step begins depends on positions alone: neither the table's length nor the other sequences change a bit.
    begin = LOOP_SINGLY // (several * page)
    singly = jnp.minimum(last // page + 1, begin * several)
    carry = jax.lax.fori_loop(0, singly, functools.partial(some_pages, pages=1), start)
    together = functools.partial(some_pages, pages=several)
    _, total, mixed = jax.lax.fori_loop(begin, last // (several * page) + 1, together, carry)
    y = mixed / jnp.where(total > 0, total, 1.0)[..., None]
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _ragged(q, pool, table, positions, mesh: Mesh | None, group: int):
    """jax's kernel takes sequences whose queries are their last tokens. Here all C columns count as queries;
    nobody reads the results of padding. `group`: query heads of a KV head."""
    batch, tokens, heads, size = q.shape
    first = jnp.maximum(jnp.max(positions - jnp.arange(tokens), axis=1), 0)
    kernel = functools.partial(
        ragged_paged_attention,
        sm_scale=size**-0.5,
        num_kv_pages_per_block=max(1, min(table.shape[1], KERNEL_TOKENS // pool.shape[1])),
        num_queries_per_block=min(KERNEL_QUERIES, batch * tokens),
    )

    def attend(q, pool, table, first):
        wide = _padded(q, (pool.shape[2] // 2 * group, pool.shape[3]))
        flat = wide.reshape(batch * tokens, *wide.shape[2:])
        starts = jnp.arange(batch + 1, dtype=jnp.int32) * tokens
        y = kernel(flat, pool, first + tokens, table, starts, jnp.full(1, batch, jnp.int32))
        return y.reshape(wide.shape)[:, :, : q.shape[2], :size]

    if mesh is None:
        return attend(q, pool, table, first)
    heads = PartitionSpec(None, None, MESH_AXIS_OF["kv_heads"], None)
    everywhere = PartitionSpec()
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, everywhere, everywhere),
        out_specs=heads,
        axis_names=free_axes(mesh),
        check_vma=False,
    )(q, pool, table, first)


def write_pages(pool, k, v, table, positions, *, shards: int = 1):
    """Returns the pool with the keys and values of some tokens, [B, C, G, K] each, in their sequences' pages; those at
    position -1 are left out. Donate the pool. `shards`: devices over which its heads are spread."""
    page = pool.shape[1]
    at = jnp.take_along_axis(table, jnp.maximum(positions, 0) // page, axis=1)
    at = jnp.where(positions >= 0, at, pool.shape[0])  # past the end: dropped
    k, v = (_padded(x, (pool.shape[2] // 2, pool.shape[3]), shards) for x in (k, v))
    kv = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[-1])
    return pool.at[at, positions % page].set(kv.astype(pool.dtype), mode="drop")
