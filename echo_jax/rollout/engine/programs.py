"""The device programs of an engine: `prefill` feeds known ids in chunks, `decode` samples a few tokens for each row,
`copy` gives a session its own copy of a page. Their shapes are those of a `Layout`, so each compiles once.

In: parameters, the pool of KV pages, and what the host's book says. Out: the pool, updated in place, and the samples.
Each replica of the model has its part of all arrays but the parameters.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echo_jax.kernels.paged_attention import implementation_for
from echo_jax.models.transformer import ModelConfig, bind, init_pool
from echo_jax.rollout.engine.layout import Layout
from echo_jax.system.sharding import MESH_AXIS_OF

REPLICAS = "data"  # the axis of an engine's mesh over which the model is replicated
PART, WHOLE = PartitionSpec(REPLICAS), PartitionSpec()


class Programs(NamedTuple):
    """Jitted programs; R rows or chunks over all replicas, M entries of a page table."""

    new_pool: Callable  # () -> pool
    prefill: Callable  # (params, pool, tokens [R, C], positions [R, C], table [R, M]) -> pool
    decode: Callable  # see `_decode`
    copy: Callable  # (pool, source pages [R], target pages [R]; -1: none) -> pool


def make_programs(
    graphdef,
    config: ModelConfig,
    mesh: Mesh,
    layout: Layout,
    *,
    stop_ids: tuple[int, ...],
    attention: str = "auto",
) -> Programs:
    """`mesh`: of the engine, whose devices need not be this machine's; the others as in `PagedEngine`."""
    pool = pool_sharding(mesh)
    model = {
        "graphdef": graphdef,
        "mesh": mesh if mesh.size > 1 else None,
        "attention": implementation_for(attention, mesh),
    }
    shards = mesh.shape[MESH_AXIS_OF["kv_heads"]]
    new_pool = functools.partial(
        init_pool, config, layout.replicas * layout.pages, layout.page, model["attention"], shards
    )
    prefill = _on_replicas(functools.partial(_prefill, **model), mesh, (WHOLE, *[PART] * 4), PART)
    decode = functools.partial(_decode, **model, stop_ids=stop_ids, steps=layout.steps)
    decode = _on_replicas(decode, mesh, (WHOLE, *[PART] * 8, WHOLE), (PART, PART))
    copy = _on_replicas(functools.partial(_copy, layers=config.num_layers), mesh, (PART,) * 3, PART)
    return Programs(
        new_pool=jax.jit(new_pool, out_shardings=pool),
        prefill=jax.jit(prefill, donate_argnums=1, out_shardings=pool),
        decode=jax.jit(decode, donate_argnums=1, out_shardings=(NamedSharding(mesh, PART), pool)),
        copy=jax.jit(copy, donate_argnums=0, out_shardings=pool),
    )


def lower(programs: Programs, mesh: Mesh, layout: Layout, params: dict) -> dict[str, jax.stages.Lowered]:
    """Lowers an engine's programs for its mesh, whose devices need not be this machine's.

    Args:
      params: shapes of the parameters on the mesh.
    """
    shape = jax.eval_shape(programs.new_pool)
    pool = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_sharding(mesh))
    ints = lambda *shape: jax.ShapeDtypeStruct((layout.replicas * shape[0], *shape[1:]), jnp.int32)  # noqa: E731
    rows, chunks, chunk, table = layout.rows, layout.chunks, layout.chunk, layout.table
    temperatures = jax.ShapeDtypeStruct(ints(rows).shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {
        "prefill": programs.prefill.lower(params, pool, ints(chunks, chunk), ints(chunks, chunk), ints(chunks, table)),
        "decode": programs.decode.lower(params, pool, *[ints(rows)] * 4, temperatures, ints(rows, table), ints(1), key),
        "copy": programs.copy.lower(pool, ints(chunks), ints(chunks)),
    }


def pool_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a pool is: each replica's pages on its devices, each head's keys and values on one of them."""
    return NamedSharding(mesh, PartitionSpec(REPLICAS, None, MESH_AXIS_OF["kv_heads"], None))


def _on_replicas(program: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """Returns the program on each replica's part of the arrays; the partitioner goes on placing the rest of it."""
    if mesh.shape[REPLICAS] == 1:
        return program
    return jax.shard_map(
        program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={REPLICAS}, check_vma=False
    )


def _inside(mesh: Mesh | None):
    """Returns the mesh that kernels see inside a program of `_on_replicas`."""
    return mesh if mesh is None or mesh.shape[REPLICAS] == 1 else jax.sharding.get_abstract_mesh()


def _prefill(params, pool, tokens, positions, table, *, graphdef, mesh, attention):
    mesh = _inside(mesh)
    return bind(graphdef, params).paged(tokens, positions, pool, table, attention=attention, mesh=mesh)[1]


def _copy(pool, sources, targets, *, layers):
    """Copies pages in all layers; -1: none."""
    pages = pool.shape[0] // layers
    offsets = jnp.arange(layers)[:, None] * pages
    targets = jnp.where(targets < 0, pool.shape[0], targets + offsets)  # past the end: dropped
    return pool.at[targets].set(pool[jnp.maximum(sources, 0) + offsets], mode="drop")


def _decode(
    params,
    pool,
    tokens,
    positions,
    budgets,
    rollouts,
    temperatures,
    table,
    least,
    key,
    *,
    graphdef,
    mesh,
    attention,
    stop_ids,
    steps,
):
    """Samples up to `steps` tokens for every row with a budget. The key of a token is
    fold_in(fold_in(key, rollout), position).

    Args:
      tokens, positions, budgets, rollouts: int32 [B]. The first token to feed, its position, how many to sample.
      temperatures: f32 [B], above 0. Log-probs and entropies are those of the tempered distributions.
      table: int32 [B, M].
      least: int32 [1]. The call ends when fewer rows than this go on.

    Returns:
      (ids, log-probs, entropies, each [B, steps]; number of ids sampled [B]; whether the last stops [B]), and the pool.
    """
    mesh = _inside(mesh)
    rollout_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rollouts)
    rows = tokens.shape[0]

    def unfinished(carry):
        return (carry[0] < steps) & (jnp.sum(carry[2] > 0) >= least[0])

    def one_token(carry):
        i, tokens, left, pool, ids, logprobs, entropies, counts, stopped = carry
        running = left > 0
        position = positions + counts
        model = bind(graphdef, params)
        fed = jnp.where(running, position, -1)
        hidden, pool = model.paged(tokens[:, None], fed[:, None], pool, table, attention=attention, mesh=mesh)
        head = model.head().astype(hidden.dtype)
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32)
        logits = logits / temperatures[:, None]
        keys = jax.vmap(jax.random.fold_in)(rollout_keys, position + 1)
        sampled = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        every = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(every, sampled[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        stops = running & jnp.isin(sampled, jnp.asarray(stop_ids))
        return (
            i + 1,
            jnp.where(running, sampled, tokens),
            jnp.where(stops, 0, left - running),
            pool,
            ids.at[:, i].set(sampled),
            logprobs.at[:, i].set(logprob),
            entropies.at[:, i].set(entropy),
            counts + running,
            stopped | stops,
        )

    start = (
        *(0, tokens, budgets, pool),
        jnp.zeros((rows, steps), jnp.int32),
        *(jnp.zeros((rows, steps)) for _ in range(2)),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    _, _, _, pool, *results = jax.lax.while_loop(unfinished, one_token, start)
    return tuple(results), pool
