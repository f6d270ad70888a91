"""Compiles the programs of a run ahead of time for TPUs, without a TPU.

In: a config and a topology. Out: each program's bytes on a device; the update's collectives and FLOPs; what is resident
in each phase of the run, and whether it fits.
"""

import collections
import importlib.util
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from echo_jax import tokenizer as tokenizers
from echo_jax.config import ConfigError, load_config_file
from echo_jax.kernels.paged_attention import implementation_for
from echo_jax.learner.learner import Learner, build_learner
from echo_jax.learner.step import make_train_step
from echo_jax.models import lora
from echo_jax.models.flops import train_flops
from echo_jax.objective import batch as batch_lib
from echo_jax.rollout.engine.layout import Layout, PoolTooSmall
from echo_jax.rollout.engine.placement import Placement
from echo_jax.rollout.engine.programs import lower, make_programs
from echo_jax.run.engine_layout import engine_layout
from echo_jax.run.resident import CHIPS, GIB, Chip, HostEngine, Memory, advice, decode_ceiling, resident
from echo_jax.run.validate import validate
from echo_jax.system import hlo, paths
from echo_jax.system.errors import UserError
from echo_jax.system.sharding import bytes_a_device, make_mesh, sharding_of


class CompileError(UserError, RuntimeError):
    """The compiler is missing or does not know the topology."""


def tpu_devices(topology: str, host: tuple[int, ...] = ()) -> list[jax.Device]:
    """Returns the devices of a topology such as `v5e:16x16`.

    Args:
      host: chips of a host along each axis, such as (2, 4, 1); without it the compiler's default, four chips.

    Raises:
      CompileError: the TPU compiler is missing, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the TPU compiler is missing: pip install -e '.[tpu]'")
    if topology.partition(":")[0] not in CHIPS:
        raise CompileError(f"--topology={topology}: write a chip of {', '.join(CHIPS)} and a shape, such as v5e:16x16")
    bounds = {"chips_per_host_bounds": host} if host else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **bounds).devices)
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def alone(mesh: Mesh) -> Mesh:
    """Returns a mesh like this one, which is of one host, on a slice that has no other chips. Of a larger slice of v5e
    or v6e the compiler takes either one chip or all."""
    devices = list(mesh.devices.flat)
    coords = np.asarray([device.coords for device in devices])
    bounds = tuple((coords.max(0) - coords.min(0) + 1).tolist())
    name = next(name for name, chip in CHIPS.items() if chip.kind == devices[0].device_kind)
    shape = bounds[:2] if name in ("v5e", "v6e") else bounds
    return make_mesh(*mesh.devices.shape, tpu_devices(f"{name}:{'x'.join(map(str, shape))}", bounds))


def compile_run(
    config: ml_collections.ConfigDict, topology: str, *, host: tuple[int, ...] = (), live_tokens: int = 0
) -> dict:
    """Compiles what `train` would run on this topology: the update without its metrics per tool, the way of the weights
    to the engine of a host, and that engine's programs. Returns their cost, and whether the whole run fits.

    Args:
      host: see `tpu_devices`.
      live_tokens: that a decoding session holds, for the bound on the speed of sampling; 0: half of
        rollout.max_tokens.

    Raises:
      ConfigError, CompileError: the config or the topology cannot work.
    """
    learner, chip = learner_on(config, topology, host), CHIPS[topology.partition(":")[0]]
    train = compile_train_step(learner)
    sampler = compile_sampler(learner, chip, live_tokens or config.rollout.max_tokens // 2)
    phases, programs = ({**train.pop(part), **sampler.pop(part)} for part in ("resident", "programs"))
    usable = int(chip.usable * GIB)
    compiled = all("compiler" not in program for program in programs.values())
    return {
        **_described(learner, topology),
        "hbm_bytes": int(chip.memory * GIB),
        "usable_bytes": usable,
        "fits": compiled and sampler["sampler"]["sessions"] > 0 and max(phases.values()) <= usable,
        "train_fits": "update" in phases and phases["update"] <= usable,
        "resident": phases,
        **train,
        **sampler,
        "programs": programs,
        "compile_seconds": round(sum(program["compile_seconds"] for program in programs.values()), 1),
    }


def learner_on(config: ml_collections.ConfigDict, topology: str, host: tuple[int, ...] = ()) -> Learner:
    """Returns the learner of a run on all devices of a topology.

    Raises:
      ConfigError, CompileError: the config or the topology cannot work.
    """
    validate(config)
    if config.rollout.engine != "paged":
        raise ConfigError(
            f"config.rollout.engine = {config.rollout.engine!r}: only the programs of 'paged' can be compiled; set it"
        )
    devices = tpu_devices(topology, host)
    vocab_size = tokenizers.find(config.tokenizer.path, config.model.weights).vocab_size
    learner = build_learner(config, vocab_size, devices)
    if learner.mesh.size != len(devices):
        shape = dict(learner.mesh.shape)
        raise ConfigError(
            f"the mesh {shape} has {learner.mesh.size} chips, but {topology} has {len(devices)}; change config.mesh"
        )
    return learner


def compile_train_step(learner: Learner) -> dict:
    """Compiles the update of an RL step. Returns its bytes and collectives."""
    compiled, memory, cost = _compile(lower_train_step(learner))
    if compiled is None:
        return {"resident": {}, "programs": {"train_step": cost}}
    peak = memory.argument + memory.beyond
    return {
        "argument_bytes": memory.argument,
        "temporary_bytes": memory.temporary,
        "peak_bytes": peak,
        "collectives": by_kind(compiled.as_text()),
        "resident": {"update": peak + learner.reference_bytes},
        "programs": {"train_step": cost},
    }


def compile_sampler(learner: Learner, chip: Chip, live_tokens: int) -> dict:
    """Compiles the engine's programs of a host, and those that bring it the weights. Its pool takes what is left of a
    device beside the learner's state and the weights, as in a run."""
    model, usable = learner.model_config, int(chip.usable * GIB)
    placement, state = Placement(learner.mesh, model, process=0), kept_bytes(learner)
    wanted = engine_layout(learner, placement.local)
    engine = HostEngine(
        model=model,
        tensor=placement.local.shape["tensor"],
        replicas=wanted.replicas,
        weights=placement.bytes_a_device,
        page=wanted.page,
        max_tokens=learner.config.rollout.max_tokens,
        attention=implementation_for(learner.config.rollout.engine_options.get("attention", "auto"), placement.local),
    )
    left = usable - state - engine.weights
    names = ("bring_frozen", "bring") if model.lora.rank else ("bring",)
    transfer, costs = _compile_all(dict(zip(names, placement.lower(learner.abstract_params), strict=True)))
    pool = {"pool_bytes": 0, "pool_tokens": 0, "sessions": 0}
    try:
        layout = engine_layout(learner, placement.local, left)
    except PoolTooSmall:
        layout, sampling, engine_costs = wanted, [], {}
    else:
        sampling, engine_costs = _compile_all(lower_engine(learner, placement, layout))
        pool["pool_bytes"] = layout.pages * engine.page_bytes
        pool["pool_tokens"] = layout.replicas * layout.pages * layout.page
        pool["sessions"] = layout.replicas * layout.sessions
    phases = resident(state, transfer, sampling, engine.weights + engine.session_bytes)
    for phase, programs in (("transfer", costs), ("sampling", engine_costs)):
        if any("compiler" in cost for cost in programs.values()):
            del phases[phase]  # what a program needs that the compiler refuses is not known
    return {
        "sampler": {
            "chips": placement.local.size,
            "tensor": engine.tensor,
            "replicas": engine.replicas,
            "weights_bytes": engine.weights,
            **pool,
            "sessions_at_most": engine.sessions_in(left),
            "sessions_a_step": learner.rollouts_at_once,
            **decode_ceiling(engine, chip, layout.rows, live_tokens),
        },
        "would_hold_a_session": advice(engine, learner.mesh.size, usable, state),
        "resident": phases,
        "programs": costs | engine_costs,
    }


def lower_engine(learner: Learner, placement: Placement, layout: Layout) -> dict[str, jax.stages.Lowered]:
    """Lowers the programs of the engine that has this placement and layout, as if its host were a slice of its own."""
    rollout, mesh = learner.config.rollout, alone(placement.local)
    programs = make_programs(
        learner.graphdef,
        learner.model_config,
        mesh,
        layout,
        stop_ids=(0,),
        attention=rollout.engine_options.get("attention", "auto"),
    )
    return lower(programs, mesh, layout, placement.abstract_on(mesh))


def kept_bytes(learner: Learner) -> int:
    """Returns the memory on a device of what a learner keeps between updates."""
    frozen = lora.split(learner.abstract_params)[1]
    return bytes_a_device((learner.abstract_state(), frozen)) + learner.reference_bytes


def _compile_all(lowered: dict[str, jax.stages.Lowered]) -> tuple[list[Memory], dict[str, dict]]:
    """Returns the memory of the programs that the compiler does not refuse, and descriptions of all."""
    found = {name: _compile(program) for name, program in lowered.items()}
    return [memory for _, memory, _ in found.values() if memory], {name: cost for name, (_, _, cost) in found.items()}


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, Memory | None, dict]:
    """Returns a compiled program, its memory, and a description; None and the compiler's words if it is too large."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = str(error).splitlines()
        reason = next((line for line in lines if "hbm" in line.lower()), lines[0])
        seconds = round(time.perf_counter() - start, 1)
        return None, None, {"compiler": reason.strip()[:300], "compile_seconds": seconds}
    found = compiled.memory_analysis()
    memory = Memory(
        argument=found.argument_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        output=found.output_size_in_bytes - found.alias_size_in_bytes,
    )
    return compiled, memory, memory.describe() | {"compile_seconds": round(time.perf_counter() - start, 1)}


def lower_train_step(learner: Learner) -> jax.stages.Lowered:
    """Lowers the update of an RL step for the devices of its mesh."""
    config = learner.config
    rows = sharding_of(learner.mesh, ("micro", "batch", "time"))
    at_most = learner.share_of_part(learner.rollouts_at_once, config.optimizer.mini_batches)
    shape = (learner.capacity(at_most), learner.rows, config.pack.length)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=rows), batch_lib.empty(1, 1, 1))
    optimizer, state = learner.make_optimizer(learner.schedule()), learner.abstract_state()
    step = make_train_step(learner.graphdef, state, optimizer, learner.mesh, learner.loss_options())
    return step.lower(state, lora.split(learner.abstract_params)[1], batch)


def _described(learner: Learner, topology: str) -> dict:
    rows, length = learner.rows, learner.config.pack.length
    return {
        "topology": topology,
        "mesh": dict(learner.mesh.shape),
        "rows": rows,
        "tokens_a_row": length,
        "parameters": sum(x.size for x in jax.tree.leaves(learner.abstract_params)),
        "flops": train_flops(learner.model_config, rows * length, rows * length * (length + 1) / 2),
    }


def by_kind(text: str) -> dict[str, dict[str, int]]:
    """Returns kind -> number of collectives, their bytes, and bytes inside loops; each counts once (see hlo.py)."""
    found: dict[str, collections.Counter] = {}
    for collective in hlo.collectives(text):
        counts = found.setdefault(collective.kind, collections.Counter())
        counts["number"] += 1
        counts["bytes"] += collective.bytes
        counts["bytes_in_loops"] += collective.bytes if collective.depth else 0
        counts["largest_bytes"] = max(counts["largest_bytes"], collective.bytes)
    return {kind: dict(counts) for kind, counts in sorted(found.items())}


def load_config(path: str) -> ml_collections.ConfigDict:
    """Returns the config of a file, or of `file:argument`."""
    name, *argument = path.split(":", 1)
    return load_config_file(Path(paths.expanded(name))).get_config(*argument)
