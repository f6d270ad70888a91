"""A dense KV-cache engine: every session has one lane of a fixed batch.

In: the new ids of some sessions. Out: sampled ids and their log-probs. The ids are on the host, the cache is on the
device. One program does everything: each step feeds one token to every running lane, either a known one (prompt,
observation) or the one just sampled. So each token is computed once, by the same program, whatever other lanes do, and
results do not depend on when tools answer. Use an engine from one thread.

Each process has an engine on its local devices, so that no process waits for another's tools. The model's matrices are
sharded over as many of these devices as divide its heads, FFN and vocabulary; the lanes are sharded over the others.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from echo_jax.models import lora
from echo_jax.models.transformer import ModelConfig, abstract_params, bind, init_cache, used_dtype
from echo_jax.rollout.trajectory import Sampled
from echo_jax.system.sharding import make_mesh, replicated, sharding_of

CACHE_AXES = ("layers", "batch", "time", "kv_heads", "head_dim")


class Placement:
    """Brings parameters from the training mesh to the engine's mesh: one jitted cast and reshard. Brings frozen
    parameters only once."""

    def __init__(self, mesh: Mesh, config: ModelConfig):
        devices = list(mesh.devices.flat)  # those of a process are adjacent
        local_devices = [d for d in devices if d.process_index == jax.process_index()]
        sizes = (config.num_heads, config.num_kv_heads, config.ffn_dim, config.vocab_size)
        tensor = math.gcd(len(local_devices), *sizes)
        # This process's mesh: lanes over `data`, model over `tensor`.
        self.local = make_mesh(len(local_devices) // tensor, 1, tensor, local_devices)
        # On the devices of all processes, each laid out like `local`, in the dtype that the model uses.
        everywhere = abstract_params(config, make_mesh(len(devices) // tensor, 1, tensor, devices))[1]
        placed = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, used_dtype(path, x.dtype, config), sharding=x.sharding),
            everywhere,
        )
        self._bring_trained, self._bring_frozen = map(_bring, lora.split(placed))
        self._frozen: tuple[dict, dict] = {}, {}  # as given, and on `local`

    def __call__(self, params: dict) -> dict:
        trained, frozen = lora.split(params)
        given = self._frozen[0]
        if not given or any(a is not b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(given), strict=True)):
            self._frozen = frozen, self._to_local(self._bring_frozen(frozen))
        return lora.join(self._to_local(self._bring_trained(trained)), self._frozen[1])

    def _to_local(self, tree: dict) -> dict:
        return jax.tree.map(self._shards_to_local, tree)

    def _shards_to_local(self, x: jax.Array) -> jax.Array:
        shards = [shard.data for shard in x.addressable_shards]
        sharding = NamedSharding(self.local, x.sharding.spec)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def _bring(placed: dict):
    def cast(params):
        return jax.tree.map(lambda x, to: x.astype(to.dtype), params, placed)

    return jax.jit(cast, out_shardings=jax.tree.map(lambda x: x.sharding, placed))


@flax.struct.dataclass
class Lanes:
    """The host's view of all lanes: B lanes of S slots."""

    ids: np.ndarray  # int32 [B, S]
    logprob: np.ndarray  # f32 [B, S] of sampled ids
    entropy: np.ndarray  # f32 [B, S] of the distributions that they were sampled from
    known: np.ndarray  # int32 [B] number of ids that exist
    fed: np.ndarray  # int32 [B] number of ids whose keys and values are in the cache
    budget: np.ndarray  # int32 [B] tokens still to sample in this turn; 0: the lane is idle
    rollout: np.ndarray  # int32 [B] global rollout index: the root of its sampling keys


class DenseEngine:
    """Decodes `lanes` sessions at once; the sampling key of a token is fold_in(fold_in(seed, rollout), position)."""

    def __init__(
        self,
        graphdef,
        model_config: ModelConfig,
        *,
        lanes: int,
        max_tokens: int,
        temperature: float,
        stop_ids: tuple[int, ...],
        seed: int,
        steps_per_call: int = 8,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          lanes: sessions at once, rounded up so that the devices share them evenly.
          stop_ids: any of them ends a turn.
          mesh: of training; the engine uses the devices of it that belong to this process.
        """
        self._placement = Placement(mesh or make_mesh(1, 1, 1, jax.local_devices()), model_config)
        local = self._placement.local
        shards = local.shape["data"]
        self.lanes = lanes = -(-lanes // shards) * shards
        self.max_tokens = max_tokens
        self._stop_ids = stop_ids
        everywhere = replicated(self._placement.local)
        spread = sharding_of(self._placement.local, CACHE_AXES)
        self._cache = jax.jit(init_cache, static_argnums=(0, 1, 2), out_shardings=spread)(
            model_config, lanes, max_tokens
        )
        self._key = jax.random.key(seed)
        zeros = functools.partial(np.zeros, dtype=np.int32)
        self._host = Lanes(
            ids=zeros((lanes, max_tokens)),
            logprob=np.zeros((lanes, max_tokens), np.float32),
            entropy=np.zeros((lanes, max_tokens), np.float32),
            known=zeros(lanes),
            fed=zeros(lanes),
            budget=zeros(lanes),
            rollout=zeros(lanes),
        )
        self._turn_start = zeros(lanes)
        self._params, self._version = None, 0
        program = functools.partial(
            _run_lanes,
            graphdef=graphdef,
            mesh=local if local.size > 1 else None,
            temperature=temperature,
            stop_ids=stop_ids,
            max_steps=steps_per_call,
        )
        # The cache is placed like the program's output, so its sharding never changes and one program serves all calls.
        self.compiled = jax.jit(program, donate_argnums=2, out_shardings=(everywhere, spread))

    def set_params(self, params, version: int) -> None:
        """Uses new weights from now on. No session may be open, since it would mix two policies."""
        if self._host.known.any():
            lanes = np.flatnonzero(self._host.known).tolist()
            raise RuntimeError(f"weights may only change while no session is open, but the lanes {lanes} have one")
        self._params, self._version = self._placement(params), version

    def open(self, lane: int, rollout: int) -> None:
        """Starts an empty session in a lane and drops its previous one."""
        for field in (self._host.known, self._host.fed, self._host.budget):
            field[lane] = 0
        self._host.rollout[lane] = rollout

    def known(self, lane: int) -> int:
        """Returns how many ids of its session a lane holds."""
        return int(self._host.known[lane])

    def generate(self, lane: int, ids: tuple[int, ...], max_new: int) -> None:
        """Appends known ids to a session and asks for up to `max_new` sampled ones; `step` returns them."""
        known = self.known(lane)
        if self._host.budget[lane] or not ids or max_new < 1 or known + len(ids) + max_new > self.max_tokens:
            raise ValueError(
                f"lane {lane} is busy, or {known} + {len(ids)} known and {max_new} new tokens do not fit "
                f"{self.max_tokens}"
            )
        self._host.ids[lane, known : known + len(ids)] = ids
        self._host.known[lane] = self._turn_start[lane] = known + len(ids)
        self._host.budget[lane] = max_new

    @property
    def busy(self) -> bool:
        return bool(self._host.budget.any())

    def step(self) -> dict[int, Sampled]:
        """Runs a few decoding steps; returns {lane: turn} for the lanes that finished one."""
        running = self._host.budget > 0
        host, self._cache = self.compiled(self._params, self._host, self._cache, self._key)
        self._host = jax.tree.map(np.array, host)
        finished = {}
        for lane in np.flatnonzero(running & (self._host.budget == 0)):
            turn = slice(self._turn_start[lane], self._host.known[lane])
            ids, logprobs, entropies = (
                tuple(field[lane, turn].tolist()) for field in (self._host.ids, self._host.logprob, self._host.entropy)
            )
            versions = (self._version,) * len(ids)
            finished[int(lane)] = Sampled(ids, logprobs, entropies, versions, ids[-1] in self._stop_ids)
        return finished

    def cancel(self) -> None:
        """Drops all sessions."""
        for lane in range(self.lanes):
            self.open(lane, rollout=0)


def _run_lanes(params, lanes: Lanes, cache, key, *, graphdef, mesh, temperature, stop_ids, max_steps):
    """Decodes up to `max_steps` tokens for every lane with a budget. Returns the lanes and the cache."""
    slots = lanes.ids.shape[1]
    rows = jnp.arange(lanes.ids.shape[0])
    rollout_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, lanes.rollout)

    def unfinished(carry):
        i, lanes, _ = carry
        return (i < max_steps) & jnp.any(lanes.budget > 0)

    def one_token(carry):
        i, lanes, cache = carry
        running = lanes.budget > 0
        position = jnp.where(running, lanes.fed, slots)  # an idle lane writes past the end, which is dropped
        token = lanes.ids[rows, lanes.fed]
        model = bind(graphdef, params)
        hidden, cache = model.decode(token, position, cache, mesh)
        head = model.head().astype(hidden.dtype)
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32) / temperature
        fed = lanes.fed + running
        keys = jax.vmap(jax.random.fold_in)(rollout_keys, fed)
        sampled = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        logprobs = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(logprobs, sampled[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        samples = running & (fed == lanes.known)  # else the next id is already known
        at = jnp.where(samples, fed, slots)
        stops = jnp.isin(sampled, jnp.asarray(stop_ids))
        budget = jnp.where(samples & stops, 0, lanes.budget - samples)
        lanes = lanes.replace(
            ids=lanes.ids.at[rows, at].set(sampled, mode="drop"),
            logprob=lanes.logprob.at[rows, at].set(logprob, mode="drop"),
            entropy=lanes.entropy.at[rows, at].set(entropy, mode="drop"),
            known=lanes.known + samples,
            fed=fed,
            budget=budget,
        )
        return i + 1, lanes, cache

    _, lanes, cache = jax.lax.while_loop(unfinished, one_token, (0, lanes, cache))
    return lanes, cache
