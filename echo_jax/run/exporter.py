"""Exports a run's trained weights as files that other software loads.

In: a checkpoint of a run. Out: a folder that gets its name once it is complete.
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
from echo_jax.system import paths
from echo_jax.system.errors import UserError
from echo_jax.system.peers import Peers
from echo_jax.system.progress import Progress

GENERATION = "generation_config.json"


class ExportError(UserError, RuntimeError):
    """The output folder is taken, or the run has nothing of the requested kind to export."""


@contextlib.contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into; renames it when all is written, removes it after an error."""
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        scratch.mkdir(parents=True)
    except FileExistsError as error:
        raise ExportError(
            f"{scratch} exists: another export is running or was killed; if none is running, remove it"
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
    step: int | None = None,
    peers: Peers | None = None,
) -> str:
    """Writes a checkpoint of a run, by default the newest, to `output`; returns a message for the user.

    Raises:
      UserError, OSError: before anything is written.
    """
    peers = peers or Peers()
    parts = build(config, peers)
    if adapter and not (config.lora.rank and config.model.weights):
        raise ExportError(
            f"config.lora.rank = {config.lora.rank}, config.model.weights = {config.model.weights!r}: this run has no "
            "adapters on published weights; remove --adapter"
        )
    check_workdir(config, workdir, only_parameters=True)
    if peers.first(output.exists):
        raise ExportError(f"{output} exists; choose another --output, or remove it")
    try:
        described = {"config.json": _described(parts, dtype), GENERATION: _generation(parts)}
    except FamilyError as error:
        raise ExportError(str(error)) from error
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        policy = parameters.restore(checkpointer, parts.learner, parts.source, step=step, quiet=not peers.is_first)
    model_config = parts.learner.model_config
    with complete(output) if peers.is_first else contextlib.nullcontext() as folder:
        if adapter:
            # An absolute path, since PEFT looks for a relative one from wherever it runs.
            base = str(Path(paths.expanded(config.model.weights)).absolute())
            write_adapter(policy.params, model_config, folder, base=base, dtype=dtype)
        else:
            total, console = (
                len(tensor_names(parts.learner.model_config)),
                Console(stderr=True, quiet=not peers.is_first),
            )
            with Progress("writing tensors", total=total, console=console) as progress:
                write_weights(policy.params, model_config, folder, dtype=dtype, on_tensor=progress.update)
        if peers.is_first:
            for name, content in {} if adapter else described.items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            parts.renderer.tokenizer.save(folder)
    peers.gather(None, "export")
    return f"wrote step {policy.step} of {workdir} to {output}"


def _described(parts: Parts, dtype: str) -> dict[str, Any]:
    """Returns the config.json: that of the published weights, updated with this run's model."""
    published = dict(parts.source.config) if parts.source else {}
    length = published.get("max_position_embeddings", parts.config.rollout.max_tokens)
    for key in ("rope_parameters", "rope_scaling", "dtype"):  # written again below, in the form that all versions read
        published.pop(key, None)
    return published | published_config(parts.learner.model_config, max_length=length) | {"torch_dtype": dtype}


def _generation(parts: Parts) -> dict[str, Any]:
    """Returns the generation_config.json of the published weights or, without one, this run's sampling settings."""
    path = Path(paths.expanded(parts.config.model.weights)) / GENERATION
    if parts.source and path.is_file():
        return read_json(path)
    return {
        "do_sample": True,
        "temperature": parts.config.rollout.temperature,
        "eos_token_id": list(parts.renderer.stop_ids),
        "pad_token_id": parts.renderer.tokenizer.pad,
    }
