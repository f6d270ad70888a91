"""Where a process samples: the mesh of its engine, and the way of the weights there from the training mesh.

Each process has an engine on its local devices, so that no process waits for another's tools. The model's matrices are
sharded over as many of these devices as divide its heads, FFN and vocabulary; the others hold replicas of the model.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding

from echo_jax.models import lora
from echo_jax.models.transformer import ModelConfig, abstract_params, as_used
from echo_jax.system.sharding import bytes_a_device, make_mesh


def engine_mesh(mesh: Mesh, config: ModelConfig, process: int | None = None) -> Mesh:
    """Returns the mesh of a process's engine: replicas of the model over `data`, each sharded over `tensor`.

    Args:
      mesh: of training.
      process: None: this one.
    """
    process = jax.process_index() if process is None else process
    local_devices = [device for device in mesh.devices.flat if device.process_index == process]
    sizes = (config.num_heads, config.num_kv_heads, config.ffn_dim, config.vocab_size)
    tensor = math.gcd(len(local_devices), *sizes)
    return make_mesh(len(local_devices) // tensor, 1, tensor, local_devices)


class Placement:
    """Brings parameters from the training mesh to the engine's mesh: one jitted cast and reshard. Brings frozen
    parameters only once, until `forget`."""

    def __init__(self, mesh: Mesh, config: ModelConfig, process: int | None = None):
        """Arguments as for `engine_mesh`."""
        self.local = engine_mesh(mesh, config, process)
        devices, tensor = list(mesh.devices.flat), self.local.shape["tensor"]  # those of a process are adjacent
        # On the devices of all processes, each laid out like `local`, in the dtype that the model uses.
        everywhere = abstract_params(config, make_mesh(len(devices) // tensor, 1, tensor, devices))[1]
        self.placed = jax.tree_util.tree_map_with_path(lambda path, x: as_used(path, x, config), everywhere)
        self._bring_trained, self._bring_frozen = map(bring, lora.split(self.placed))
        self.forget()

    def __call__(self, params: dict) -> dict:
        trained, frozen = lora.split(params)
        given = self._frozen[0]
        if not given or any(a is not b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(given), strict=True)):
            self._frozen = frozen, self._to_local(self._bring_frozen(frozen))
        return lora.join(self._to_local(self._bring_trained(trained)), self._frozen[1])

    def forget(self) -> None:
        """Keeps no parameters, so that their memory is free once nobody else holds them."""
        self._frozen: tuple[dict, dict] = {}, {}  # as given, and on `local`

    @property
    def bytes_a_device(self) -> int:
        """Memory of the engine's parameters on one of its devices."""
        return bytes_a_device(self.placed)

    def abstract_on(self, mesh: Mesh) -> dict:
        """Returns the shapes of the engine's parameters on a mesh like `local`."""
        on = lambda x: NamedSharding(mesh, x.sharding.spec)  # noqa: E731
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(x)), self.placed)

    def lower(self, abstract_params: dict) -> list[jax.stages.Lowered]:
        """Lowers the programs that bring parameters, in the order in which they run."""
        trained, frozen = lora.split(abstract_params)
        return [*([self._bring_frozen.lower(frozen)] if frozen else ()), self._bring_trained.lower(trained)]

    def _to_local(self, tree: dict) -> dict:
        return jax.tree.map(self._shards_to_local, tree)

    def _shards_to_local(self, x: jax.Array) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards]
        sharding = NamedSharding(self.local, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def bring(placed: dict):
    """Returns the jitted program that casts and reshards parameters to those of `placed`."""

    def cast(params):
        return jax.tree.map(lambda x, to: x.astype(to.dtype).reshape(to.shape), params, placed)

    return jax.jit(cast, out_shardings=jax.tree.map(lambda x: x.sharding, placed))
