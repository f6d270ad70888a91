"""The mesh, and the one table that maps logical axes to mesh axes."""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis of a parameter or of a batch -> mesh axis (None: replicated)
MESH_AXIS_OF = {
    "batch": ("data", "fsdp"),
    "micro": None,
    "time": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "experts": None,
    "norm": None,
    "rank": None,
}


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """Returns a mesh over `data × fsdp × tensor` of the given devices (default: all).

    The devices of a process are adjacent, so its rows of a batch are too, and `tensor` stays within a process if it
    can.

    Raises:
      ValueError: there are fewer devices than the product.
    """
    devices = jax.devices() if devices is None else devices
    need = data * fsdp * tensor
    if need > len(devices):
        raise ValueError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {need} devices, but only {len(devices)} are "
            "available"
        )
    devices = sorted(devices, key=lambda device: device.process_index)[:need]
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def processes_of(mesh: Mesh) -> int:
    """Returns how many processes the mesh spans.

    Raises:
      ValueError: two processes would have to supply the same rows of a batch, or one more rows than another.
    """
    owners = mesh.devices.reshape(-1, mesh.shape["tensor"])  # [data shards, tensor]
    index = np.vectorize(lambda device: device.process_index)(owners)
    processes, shards = np.unique(index[:, 0], return_counts=True)
    if (index != index[:, :1]).any():
        chips = mesh.size // len(np.unique(index))
        raise ValueError(
            f"mesh.tensor = {mesh.shape['tensor']} would span processes of {chips} devices each; it must divide {chips}"
        )
    if len(set(shards.tolist())) > 1:
        raise ValueError(
            f"the mesh uses {shards.tolist()} data shards from its processes; it must use the same number from each"
        )
    return len(processes)


def sharding_of(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """Returns the sharding of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, PartitionSpec(*(MESH_AXIS_OF[axis] for axis in axes)))


def free_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Returns the axes over which no enclosing `shard_map` splits the work already."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in types if kind != AxisType.Manual)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def bytes_a_device(tree) -> int:
    """Returns the memory on one device of arrays, or of their shapes with shardings."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shards)
