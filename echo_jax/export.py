"""Writes a run's trained weights as a folder that transformers loads and servers serve.

    python -m echo_jax.export --config=configs/NAME.py --workdir=runs/NAME --output=DIR
    python -m echo_jax.export --config=configs/NAME.py --workdir=runs/NAME --output=DIR --adapter

In: the newest checkpoint of a run. Out: safetensors, config.json, the tokenizer's files and generation_config.json;
adapters are merged into the weights or, with `--adapter`, written alone in PEFT's layout. The folder appears when it is
complete.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from echo_jax import policy as policy_lib
from echo_jax import runtime as runtime_lib
from echo_jax.checkpoint import Checkpointer
from echo_jax.cli import run_program
from echo_jax.config import check_workdir
from echo_jax.models.export import write_adapter, write_weights
from echo_jax.models.families import FamilyError, published_config, tensor_names
from echo_jax.progress import Progress
from echo_jax.runtime import Runtime

GENERATION = "generation_config.json"


class ExportError(RuntimeError):
    """There is no place for the export, or nothing of the kind to write."""


@contextlib.contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which gets its name when all is written.

    Raises:
      ExportError: something has the name already.
    """
    if folder.exists():
        raise ExportError(f"{folder} exists; choose another --output, or remove it")
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    scratch.rename(folder)


def export(config: ml_collections.ConfigDict, workdir: Path, output: Path, *, dtype: str, adapter: bool) -> str:
    """Writes the newest checkpoint of a run to `output`; returns what to tell the user.

    Raises:
      ExportError, or one of runtime.USER_ERRORS: before anything is written.
    """
    runtime = runtime_lib.build(config)
    check_workdir(config, workdir)
    if adapter and not config.lora.rank:
        raise ExportError("config.lora.rank = 0: this run has no adapters; leave --adapter out")
    try:
        described = _described(runtime, dtype)
    except FamilyError as error:
        raise ExportError(str(error)) from error
    with complete(output) as folder, Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = policy_lib.restore(checkpointer, runtime)
        if adapter:
            write_adapter(policy.params, runtime.model_config, folder, base=config.model.weights)
        else:
            total = len(tensor_names(runtime.model_config))
            with Progress("writing tensors", total=total, console=Console(stderr=True)) as progress:
                write_weights(policy.params, runtime.model_config, folder, dtype=dtype, on_tensor=progress.update)
            _write_json(folder / "config.json", described)
            _write_json(folder / GENERATION, _generation(runtime))
        runtime.renderer.tokenizer.save(folder)
    return f"step {policy.step} of {workdir} is in {output}"


def _described(runtime: Runtime, dtype: str) -> dict[str, Any]:
    """Returns the config.json: that of the published weights, with what this run's model says of itself."""
    theirs = dict(runtime.source.config) if runtime.source else {}
    length = theirs.get("max_position_embeddings", runtime.config.rollout.max_tokens)
    for key in ("rope_parameters", "rope_scaling", "dtype"):  # said again, in the form that all versions read
        theirs.pop(key, None)
    return theirs | published_config(runtime.model_config, max_length=length) | {"torch_dtype": dtype}


def _generation(runtime: Runtime) -> dict[str, Any]:
    """Returns the generation_config.json of the published weights or, without one, what this run sampled with."""
    theirs = Path(runtime.config.model.weights) / GENERATION
    if runtime.source and theirs.is_file():
        return json.loads(theirs.read_text())
    return {
        "do_sample": True,
        "temperature": runtime.config.rollout.temperature,
        "eos_token_id": list(runtime.renderer.stop_ids),
        "pad_token_id": runtime.renderer.tokenizer.pad,
    }


def _write_json(path: Path, said: dict[str, Any]) -> None:
    path.write_text(json.dumps(said, indent=2) + "\n")


def main(args: flags.FlagValues) -> None:
    print(export(args.config, Path(args.workdir), Path(args.output), dtype=args.dtype, adapter=args.adapter))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run's config file, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run whose newest checkpoint is written.")
    flags.DEFINE_string("output", None, "Folder to make.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the tensors written.")
    flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's layout.")
    run_program(main, (*runtime_lib.USER_ERRORS, ExportError), required=("config", "workdir", "output"))
