"""Token look-up in an embedding that is sharded over the mesh.

Each device looks up the tokens of all rows of its `fsdp` group in its slice of the columns; then the group exchanges
the results in one all-to-all. If the partitioner placed it, with `data` > 1 the gradients of all rows would go to every
device.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from echo_jax.system.sharding import MESH_AXIS_OF


def embed(table: jax.Array, tokens: jax.Array, dtype, mesh: Mesh | None = None) -> jax.Array:
    """Returns rows of `table` [V, D] for int32 tokens [B, T], as [B, T, D] of `dtype`. `mesh`: the training mesh. None:
    the partitioner places it."""
    if mesh is None:
        return table[tokens].astype(dtype)
    vocab, columns, rows = (MESH_AXIS_OF[name] for name in ("vocab", "embed", "batch"))

    def look_up(table, tokens):
        local = jax.lax.all_gather(tokens, columns, tiled=True) - jax.lax.axis_index(vocab) * len(table)
        here = (local >= 0) & (local < len(table))  # else another vocabulary shard holds it
        found = jnp.where(here[..., None], table[jnp.clip(local, 0, len(table) - 1)].astype(dtype), 0)
        return jax.lax.all_to_all(jax.lax.psum(found, vocab), columns, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        look_up,
        mesh=mesh,
        in_specs=(PartitionSpec(vocab, columns), PartitionSpec(rows, None)),
        out_specs=PartitionSpec(rows, None, None),
    )(table, tokens)
