"""Compiles the real train step for a TPU topology, ahead of time and with no TPU, and says whether it fits.

    python -m echo_jax.compile --config=configs/qwen3_8b.py --topology=v5e:16x16
    python -m echo_jax.compile --table=configs/qwen3_8b.py,configs/qwen3_14b.py --topology=v5p:4x4x4,v6e:16x16

Needs the TPU compiler, `pip install -e '.[tpu]'`. Prints one JSON line a config and topology: bytes a chip (arguments,
temporary, peak, and what the chip has), whether it fits, collectives by kind, analytic FLOPs of a micro-batch of full
rows, seconds to compile; `--table` makes a table of many. The vocabulary is the tokenizer's, unless `model.vocab_size`
says more.
"""

import collections
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from echo_jax import batch as batch_lib
from echo_jax import hlo
from echo_jax.cli import run_program
from echo_jax.config import ConfigError, load_config_file
from echo_jax.flops import train_flops
from echo_jax.models import lora
from echo_jax.runtime import find_tokenizer, validate
from echo_jax.sharding import sharding_of
from echo_jax.tokenizer import TokenizerError
from echo_jax.train_step import make_train_step
from echo_jax.training import Training, build_training

GIB = 2**30
# Memory of a chip, from Google's system architecture pages (cloud.google.com/tpu/docs)
HBM_BYTES = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 192 * GIB}


class CompileError(RuntimeError):
    """There is no compiler or no such topology."""


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology such as `v5e:16x16`.

    Raises:
      CompileError: there is no TPU compiler, or it knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the TPU compiler is missing: pip install -e '.[tpu]'")
    if topology.partition(":")[0] not in HBM_BYTES:
        raise CompileError(f"--topology={topology}: a chip of {', '.join(HBM_BYTES)} and a shape, as v5e:16x16")
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def compile_train_step(config: ml_collections.ConfigDict, topology: str) -> dict:
    """Compiles the update that `train` would run there; returns what it takes.

    Raises:
      ConfigError, CompileError: the config, or the topology, cannot be.
    """
    validate(config)
    devices = tpu_devices(topology)
    training = build_training(config, find_tokenizer(config).vocab_size, devices)
    if training.mesh.size != len(devices):
        shape = dict(training.mesh.shape)
        raise ConfigError(f"a mesh of {shape} has {training.mesh.size} chips, {topology} has {len(devices)}")
    start = time.perf_counter()
    try:
        compiled = lower_train_step(training).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(training, topology, str(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return _described(training, topology, seconds) | {
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "peak_bytes": peak,
        "fits": peak <= HBM_BYTES[topology.partition(":")[0]],
        "collectives": by_kind(compiled.as_text()),
    }


def lower_train_step(training: Training) -> jax.stages.Lowered:
    """Returns the update of an RL step, lowered for the devices of its mesh."""
    config = training.config
    rows = sharding_of(training.mesh, ("micro", "batch", "time"))
    shape = (training.capacity(training.rollouts_at_once), training.rows, config.pack.length)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=rows), batch_lib.empty(1, 1, 1))
    optimizer, state = training.make_optimizer(config.optimizer.learning_rate), training.abstract_state()
    step = make_train_step(training.graphdef, state, optimizer, training.mesh, training.loss_options())
    return step.lower(state, lora.split(training.abstract_params)[1], batch)


def _described(training: Training, topology: str, seconds: float) -> dict:
    rows, length = training.rows, training.config.pack.length
    return {
        "topology": topology,
        "mesh": dict(training.mesh.shape),
        "rows": rows,
        "tokens_a_row": length,
        "parameters": sum(x.size for x in jax.tree.leaves(training.abstract_params)),
        "hbm_bytes": HBM_BYTES[topology.partition(":")[0]],
        "flops": train_flops(training.model_config, rows * length, rows * length * (length + 1) / 2),
        "compile_seconds": round(seconds, 1),
    }


def _too_large(training: Training, topology: str, message: str, seconds: float) -> dict:
    """The compiler refuses a program that needs more memory than the chip has, and says how much."""
    said = next((line for line in message.splitlines() if "hbm" in line.lower()), message.splitlines()[0])
    return _described(training, topology, seconds) | {"fits": False, "compiler": said.strip()[:300]}


def by_kind(text: str) -> dict[str, dict[str, int]]:
    """Returns kind -> its number, bytes, and bytes of those inside loops; each counts once (see hlo.py)."""
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


def main(args: flags.FlagValues) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    if bool(args.table) == (args.config is not None):
        raise ConfigError("give --config, or --table with config files")
    configs = {path: load_config(path) for path in args.table} if args.table else {"": args.config}
    results = []
    for path, config in configs.items():
        for topology in args.topology:
            results.append({"config": Path(path).stem} | compile_train_step(config, topology))
            print(json.dumps(results[-1]), flush=True)
    if args.table:
        print("\n".join(table(results)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file; override any field with --config.section.field=value."
    )
    flags.DEFINE_list("table", [], "In place of --config: config files to make a table of.")
    flags.DEFINE_list("topology", None, "Chips and their shape, as v5e:16x16; several for a table.")
    run_program(main, (ConfigError, TokenizerError, CompileError), required=("topology",))
