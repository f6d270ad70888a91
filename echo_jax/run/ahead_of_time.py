"""Compiles the programs of a run ahead of time for TPUs, without a TPU.

In: a config and a topology. Out: bytes per chip, collectives, FLOPs, and whether it fits.
"""

import collections
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
from jax.experimental import topologies

from echo_jax import tokenizer as tokenizers
from echo_jax.config import ConfigError, load_config_file
from echo_jax.learner.learner import Learner, build_learner
from echo_jax.learner.step import make_train_step
from echo_jax.models import lora
from echo_jax.models.flops import train_flops
from echo_jax.objective import batch as batch_lib
from echo_jax.run.validate import validate
from echo_jax.system import hlo
from echo_jax.system.errors import UserError
from echo_jax.system.sharding import sharding_of

GIB = 2**30
# Memory of a chip, from Google's system architecture pages (cloud.google.com/tpu/docs)
HBM_BYTES = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 192 * GIB}


class CompileError(UserError, RuntimeError):
    """The compiler is missing or does not know the topology."""


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology such as `v5e:16x16`.

    Raises:
      CompileError: the TPU compiler is missing, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the TPU compiler is missing: pip install -e '.[tpu]'")
    if topology.partition(":")[0] not in HBM_BYTES:
        raise CompileError(
            f"--topology={topology}: write a chip of {', '.join(HBM_BYTES)} and a shape, such as v5e:16x16"
        )
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def compile_train_step(config: ml_collections.ConfigDict, topology: str) -> dict:
    """Compiles the update that `train` would run on this topology, without its metrics per tool; returns its cost.

    Raises:
      ConfigError, CompileError: the config or the topology cannot work.
    """
    validate(config)
    devices = tpu_devices(topology)
    vocab_size = tokenizers.find(config.tokenizer.path, config.model.weights).vocab_size
    learner = build_learner(config, vocab_size, devices)
    if learner.mesh.size != len(devices):
        shape = dict(learner.mesh.shape)
        raise ConfigError(
            f"the mesh {shape} has {learner.mesh.size} chips, but {topology} has {len(devices)}; change config.mesh"
        )
    start = time.perf_counter()
    try:
        compiled = lower_train_step(learner).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(learner, topology, str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return _described(learner, topology, seconds) | {
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "peak_bytes": peak,
        "fits": peak <= HBM_BYTES[topology.partition(":")[0]],
        "collectives": by_kind(compiled.as_text()),
    }


def lower_train_step(learner: Learner) -> jax.stages.Lowered:
    """Lowers the update of an RL step for the devices of its mesh."""
    config = learner.config
    rows = sharding_of(learner.mesh, ("micro", "batch", "time"))
    shape = (learner.capacity(learner.rollouts_at_once), learner.rows, config.pack.length)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=rows), batch_lib.empty(1, 1, 1))
    optimizer, state = learner.make_optimizer(config.optimizer.learning_rate), learner.abstract_state()
    step = make_train_step(learner.graphdef, state, optimizer, learner.mesh, learner.loss_options())
    return step.lower(state, lora.split(learner.abstract_params)[1], batch)


def _described(learner: Learner, topology: str, seconds: float) -> dict:
    rows, length = learner.rows, learner.config.pack.length
    return {
        "topology": topology,
        "mesh": dict(learner.mesh.shape),
        "rows": rows,
        "tokens_a_row": length,
        "parameters": sum(x.size for x in jax.tree.leaves(learner.abstract_params)),
        "hbm_bytes": HBM_BYTES[topology.partition(":")[0]],
        "flops": train_flops(learner.model_config, rows * length, rows * length * (length + 1) / 2),
        "compile_seconds": round(seconds, 1),
    }


def _too_large(learner: Learner, topology: str, message: str, seconds: float) -> dict:
    """Returns the result for a program that the compiler refuses because the chip lacks memory, with its message."""
    reason = next((line for line in message.splitlines() if "hbm" in line.lower()), message.splitlines()[0])
    return _described(learner, topology, seconds) | {"fits": False, "compiler": reason.strip()[:300]}


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
    return load_config_file(Path(name)).get_config(*argument)


def table(results: list[dict]) -> Iterator[str]:
    yield "| config | topology | mesh | tokens | arguments GiB | peak GiB | of GiB | fits | in loops, MiB | compile s |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in results:
        mesh = " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "1 chip"
        size = lambda name, r=r: f"{r[name] / GIB:.2f}" if name in r else "–"  # noqa: E731
        kinds = ", ".join(f"{kind} {c['bytes_in_loops'] / 2**20:.0f}" for kind, c in r.get("collectives", {}).items())
        tokens = f"{r['rows']} × {r['tokens_a_row']}"
        yield (
            f"| {r['config']} | {r['topology']} | {mesh} | {tokens} | {size('argument_bytes')} | {size('peak_bytes')} "
            f"| {size('hbm_bytes')} | {'yes' if r['fits'] else 'no'} | {kinds or r.get('compiler', '')} | "
            f"{r['compile_seconds']:.0f} |"
        )
