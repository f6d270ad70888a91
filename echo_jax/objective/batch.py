"""The batch on the device: packed rows, in which every field describes the token *predicted* at its position.

In: numpy fields from packing.py. Out: the same struct on the mesh, with the rows of all processes.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from echo_jax.system.sharding import sharding_of

TERMS = ("policy", "observation")  # of the loss; each has one denominator, which no other shares


@flax.struct.dataclass
class Batch:
    """M micro-batches of B packed rows of T tokens; the shift by one has already happened."""

    tokens: jax.Array  # int32 [M, B, T] the input token
    targets: jax.Array  # int32 [M, B, T] the token predicted from it: the next of the same trajectory
    segment_ids: jax.Array  # int32 [M, B, T] trajectory within the row, from 1; 0 is padding
    rollout: jax.Array  # int32 [M, B, T] rollout within the micro-batch, from 1 to B T, all branches; 0: padding
    positions: jax.Array  # int32 [M, B, T] of `tokens` within its trajectory
    role: jax.Array  # int8 [M, B, T] Role of `targets`
    tool: jax.Array  # int8 [M, B, T] number of the tool that wrote `targets`, from 1; 0: none
    policy_weight: jax.Array  # f32 [M, B, T] >= 0, never includes the advantage
    observation_weight: jax.Array  # f32 [M, B, T] >= 0, includes lambda
    observation_share: jax.Array  # f32 [M, B, T] observation_weight without lambda, for the metric
    kl_weight: jax.Array  # f32 [M, B, T] >= 0
    entropy_weight: jax.Array  # f32 [M, B, T] >= 0
    denominators: dict[str, jax.Array]  # term of TERMS -> f32 [M, B, T], this token's part of its denominator
    policy: jax.Array  # int8 [M, B, T] number of the token's policy loss, from 0, in `LossOptions.policies`
    advantage: jax.Array  # f32 [M, B, T]
    active: jax.Array  # f32 [M, B, T] 1 where a term reads the log-probability, else 0
    sampler_logprob: jax.Array  # f32 [M, B, T] log-prob of `targets` when it was sampled; 0 elsewhere
    old_logprob: jax.Array  # f32 [M, B, T] in the importance ratio: the sampler's, or recomputed
    reference_logprob: jax.Array  # f32 [M, B, T] under the reference policy of the KL; 0 without a KL
    temperature: jax.Array  # f32 [M, B, T] that of sampling on actions; of a cross-entropy 1, unless the config says so


def to_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """Returns the batch with its rows sharded over the data axes of the mesh.

    Each of several processes passes its rows, the same number of them, and the result holds all rows.
    """
    sharding = sharding_of(mesh, ("micro", "batch", "time"))
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def micro_batches_in_use(batch: Batch) -> jax.Array:
    """Returns int32: the number of micro-batches in use, the most of any process."""
    used = jnp.any(batch.segment_ids > 0, axis=(1, 2))
    return jnp.max(jnp.where(used, 1 + jnp.arange(len(used), dtype=jnp.int32), 0))


def empty(micro_batches: int, rows: int, length: int) -> Batch:
    """Returns a numpy batch of padding, for packing to fill."""
    shape = (micro_batches, rows, length)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "rollout", "positions"), np.int32) | dict.fromkeys(
        ("role", "tool", "policy"), np.int8
    )
    fields = {name: np.zeros(shape, dtypes.get(name, np.float32)) for name in Batch.__dataclass_fields__}
    fields["denominators"] = {term: np.zeros(shape, np.float32) for term in TERMS}
    fields["temperature"] += 1.0
    return Batch(**fields)
