"""The mesh, and the one table that says on which of its axes a logical axis lies."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    "norm": None,
}


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """Returns a mesh over `data × fsdp × tensor` of the given devices (default: all of this process's).

    Raises:
      ValueError: there are fewer devices than the product.
    """
    devices = jax.devices() if devices is None else devices
    need = data * fsdp * tensor
    if need > len(devices):
        raise ValueError(
            f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {need} devices, there are {len(devices)}"
        )
    grid = np.asarray(devices[:need]).reshape(data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def sharding_of(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """Returns the sharding of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, PartitionSpec(*(MESH_AXIS_OF[axis] for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
