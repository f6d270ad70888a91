"""A run's trained weights as files that other software loads.

In: the newest checkpoint of a run. Out: a folder, complete as soon as it has its name.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console

from echo_jax.learner import parameters
from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.models.families import FamilyError, published_config, tensor_names
from echo_jax.models.save_pretrained import write_adapter, write_weights
from echo_jax.models.sources import read_json
from echo_jax.run.build import Parts, build
from echo_jax.run.workdir import check_workdir
from echo_jax.system.errors import UserError
from echo_jax.system.peers import Peers
from echo_jax.system.progress import Progress

GENERATION = "generation_config.json"


class ExportError(UserError, RuntimeError):
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
      UserError, OSError: before anything is written.
    """
    peers = peers or Peers()
    parts = build(config, peers)
    if adapter and not (config.lora.rank and config.model.weights):
        raise ExportError(
            f"config.lora.rank = {config.lora.rank}, config.model.weights = {config.model.weights!r}: this run has no "
            "adapters of published weights; leave --adapter out"
        )
    check_workdir(config, workdir)
    if peers.first(output.exists):
        raise ExportError(f"{output} exists; choose another --output, or remove it")
    try:
        described = {"config.json": _described(parts, dtype), GENERATION: _generation(parts)}
    except FamilyError as error:
        raise ExportError(str(error)) from error
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = parameters.restore(checkpointer, parts.learner, parts.source, quiet=not peers.is_first)
    model_config = parts.learner.model_config
    with complete(output) if peers.is_first else contextlib.nullcontext() as folder:
        if adapter:
            write_adapter(policy.params, model_config, folder, base=config.model.weights, dtype=dtype)
        else:
            total, console = (
                len(tensor_names(parts.learner.model_config)),
                Console(stderr=True, quiet=not peers.is_first),
            )
            with Progress("writing tensors", total=total, console=console) as progress:
                write_weights(policy.params, model_config, folder, dtype=dtype, on_tensor=progress.update)
        if peers.is_first:
            for name, said in {} if adapter else described.items():
                (folder / name).write_text(json.dumps(said, indent=2) + "\n")
            parts.renderer.tokenizer.save(folder)
    peers.gather(None, "export")
    return f"step {policy.step} of {workdir} is in {output}"


def _described(parts: Parts, dtype: str) -> dict[str, Any]:
    """Returns the config.json: that of the published weights, with what this run's model says of itself."""
    theirs = dict(parts.source.config) if parts.source else {}
    length = theirs.get("max_position_embeddings", parts.config.rollout.max_tokens)
    for key in ("rope_parameters", "rope_scaling", "dtype"):  # said again, in the form that all versions read
        theirs.pop(key, None)
    return theirs | published_config(parts.learner.model_config, max_length=length) | {"torch_dtype": dtype}


def _generation(parts: Parts) -> dict[str, Any]:
    """Returns the generation_config.json of the published weights or, without one, what this run sampled with."""
    theirs = Path(parts.config.model.weights) / GENERATION
    if parts.source and theirs.is_file():
        return read_json(theirs)
    return {
        "do_sample": True,
        "temperature": parts.config.rollout.temperature,
        "eos_token_id": list(parts.renderer.stop_ids),
        "pad_token_id": parts.renderer.tokenizer.pad,
    }
