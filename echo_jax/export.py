"""Writes a run's trained weights as a folder that transformers loads and servers serve.

    python -m echo_jax.export --config=configs/NAME.py --workdir=runs/NAME --output=DIR
    python -m echo_jax.export --config=configs/NAME.py --workdir=runs/NAME --output=DIR --adapter

In: the newest checkpoint of a run. Out: safetensors, config.json, the tokenizer's files and generation_config.json;
adapters are merged into the weights or, with `--adapter`, written alone in PEFT's layout. The folder appears when it is
complete. A run of several processes may be exported by several, as it is evaluated, or by one.
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
from echo_jax.models.sources import read_json
from echo_jax.peers import Peers
from echo_jax.progress import Progress
from echo_jax.runtime import Runtime

GENERATION = "generation_config.json"


class ExportError(RuntimeError):
    """There is no place for the export, or nothing of the kind to write."""


@contextlib.contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which gets its name when all is written, and is removed after an error."""
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        scratch.mkdir(parents=True)
    except FileExistsError as error:
        raise ExportError(
            f"{scratch} exists: another export is at work, or was killed; remove it if it is of no use"
        ) from error
    try:
        yield scratch
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def export(
    config: ml_collections.ConfigDict,
    workdir: Path,
    output: Path,
    *,
    dtype: str,
    adapter: bool,
    peers: Peers | None = None,
) -> str:
    """Writes the newest checkpoint of a run to `output`; returns what to tell the user.

    Raises:
      ExportError, or one of runtime.USER_ERRORS: before anything is written.
    """
    peers = peers or Peers()
    runtime = runtime_lib.build(config, peers)
    if adapter and not (config.lora.rank and config.model.weights):
        raise ExportError(
            f"config.lora.rank = {config.lora.rank}, config.model.weights = {config.model.weights!r}: this run has no "
            "adapters of published weights; leave --adapter out"
        )
    check_workdir(config, workdir)
    if peers.first(output.exists):
        raise ExportError(f"{output} exists; choose another --output, or remove it")
    try:
        described = {"config.json": _described(runtime, dtype), GENERATION: _generation(runtime)}
    except FamilyError as error:
        raise ExportError(str(error)) from error
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = policy_lib.restore(checkpointer, runtime)
    with complete(output) if peers.is_first else contextlib.nullcontext() as folder:
        if adapter:
            write_adapter(policy.params, runtime.model_config, folder, base=config.model.weights, dtype=dtype)
        else:
            total, console = len(tensor_names(runtime.model_config)), Console(stderr=True, quiet=not peers.is_first)
            with Progress("writing tensors", total=total, console=console) as progress:
                write_weights(policy.params, runtime.model_config, folder, dtype=dtype, on_tensor=progress.update)
        if peers.is_first:
            for name, said in {} if adapter else described.items():
                (folder / name).write_text(json.dumps(said, indent=2) + "\n")
            runtime.renderer.tokenizer.save(folder)
    peers.gather(None, "export")
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
        return read_json(theirs)
    return {
        "do_sample": True,
        "temperature": runtime.config.rollout.temperature,
        "eos_token_id": list(runtime.renderer.stop_ids),
        "pad_token_id": runtime.renderer.tokenizer.pad,
    }


def main(args: flags.FlagValues) -> None:
    user_errors = (*runtime_lib.USER_ERRORS, ExportError)
    with runtime_lib.start_peers(args.config, user_errors) as peers:
        workdir, output = Path(args.workdir), Path(args.output)
        said = export(args.config, workdir, output, dtype=args.dtype, adapter=args.adapter, peers=peers)
        if peers.is_first:
            print(said)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run's config file, e.g. configs/quickstart.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run whose newest checkpoint is written.")
    flags.DEFINE_string("output", None, "Folder to make.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the tensors written.")
    flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's layout.")
    run_program(main, (*runtime_lib.USER_ERRORS, ExportError), required=("config", "workdir", "output"))
