"""Checkpoints: a pytree of `jax.Array` and a small JSON dictionary go in, the same bits come out on any mesh.

    directory/40/           one folder per step, complete as soon as it has this name
    directory/40.orbax-…    an unfinished or killed save: never restored, removed by the next run's first save

Orbax writes and reads the arrays. It detects missing or truncated files, but not flipped bits (array data carries no
checksum), and silently casts to another dtype. So each checkpoint also records the path, shape, dtype and fingerprint
of every leaf, and `restore` compares all of them.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from echo_jax.system.errors import UserError

PyTree = Any

_FULL_DISK = ("No space left on device", "Disk quota exceeded")
# Orbax raises these for bad files and failed writes: its NoEntryError is a KeyError, tensorstore's are ValueErrors.
_LOAD_ERRORS = (ValueError, OSError, KeyError, TypeError)
_SAVE_ERRORS = (*_LOAD_ERRORS, RuntimeError)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read. The message says which one, why, and what to do."""


class Checkpointer:
    """Saves the state in the background, keeps the newest `keep` checkpoints, restores one.

    Several processes must make the same calls in the same order, on a shared directory.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep = {keep} must be at least 1")
        self._directory = Path(directory).absolute()
        self._keep = keep
        # Made by the first save: its construction removes half-written folders, which a reader must not do.
        self._writer: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, int, ocp.AsyncResponse] | None = None  # step, bytes of the state, the unfinished save

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def save(self, step: int, state: PyTree, metadata: dict) -> None:
        """Starts a save; returns when the state may be donated. First waits for an unfinished save.

        Args:
          step: names the checkpoint; must be greater than every step saved so far.
          state: pytree of `jax.Array`.
          metadata: a dictionary that `json` can write.

        Raises:
          CheckpointError: the previous save failed, this one could not start, or `step` is not the newest.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step {step} cannot be saved, since {self._directory} already holds step {latest}: "
                f"{self._remedy(latest)}"
            )
        leaves = _named_leaves(state)
        fingerprints = jax.device_get({name: _fingerprint(leaf) for name, leaf in leaves.items() if leaf.size})
        manifest = {
            name: [list(leaf.shape), str(leaf.dtype), int(fingerprints.get(name, 0))] for name, leaf in leaves.items()
        }
        size = sum(leaf.nbytes for leaf in leaves.values())
        record = json.loads(json.dumps({"user": metadata, "arrays": manifest}))
        try:
            response = self._make_writer().save_checkpointables_async(
                step,
                {"state": {name: leaf for name, leaf in leaves.items() if leaf.size}},  # orbax refuses empty arrays
                force=True,
                custom_metadata=record,
            )
        except _SAVE_ERRORS as error:
            raise self._save_failed(step, size, error) from error
        self._pending = (step, size, response)

    def wait(self) -> None:
        """Waits for an unfinished save. Raises CheckpointError if it fails."""
        if self._pending is None:
            return
        (step, size, response), self._pending = self._pending, None
        try:
            response.result()
        except _SAVE_ERRORS as error:
            raise self._save_failed(step, size, error) from error

    def close(self) -> None:
        """Waits for an unfinished save, then ends orbax's threads. Raises like `wait`."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def latest_step(self) -> int | None:
        """Returns the newest step that is completely on disk; None if there is none."""
        return max(saved_steps(self._directory), default=None)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """Reads a checkpoint, by default the newest.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings; its mesh may differ from that of the save.
          step: the checkpoint's step; None: the newest.

        Returns:
          The state, structured and sharded like `abstract_state`, with the saved values bit for bit; and the metadata.

        Raises:
          CheckpointError: the checkpoint does not exist, is damaged, or holds a different state.
        """
        self.wait()
        _quiet_orbax()
        step = self.latest_step() if step is None else step
        if step not in saved_steps(self._directory):
            raise CheckpointError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {self._directory}; "
                f"its steps are: {sorted(saved_steps(self._directory)) or 'none'}"
            )
        folder = self._directory / str(step)
        wanted = _named_leaves(abstract_state)
        try:
            record = ocp.checkpointables_metadata(folder).custom_metadata
        except _LOAD_ERRORS as error:
            raise self._damaged(step, _cause(error)) from error
        if not isinstance(record, Mapping) or not {"user", "arrays"} <= record.keys():
            raise self._damaged(step, "_CHECKPOINT_METADATA does not list what was saved")
        saved = {name: (tuple(shape), dtype, mark) for name, (shape, dtype, mark) in record["arrays"].items()}
        if differences := list(_differences(saved, wanted)):
            more = f"\n  … and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise CheckpointError(
                f"{folder} holds a different state than this run has (did the config change?):\n  "
                + "\n  ".join(differences[:8])
                + f"{more}\nUse the config it was saved with, or another workdir, or {self._remedy(step)}"
            )
        state = self._load(step, wanted, {name: mark for name, (_, _, mark) in saved.items()})
        return jax.tree.unflatten(jax.tree.structure(abstract_state), list(state.values())), record["user"]

    def _load(
        self, step: int, wanted: dict[str, jax.ShapeDtypeStruct], marks: Mapping[str, int]
    ) -> dict[str, jax.Array]:
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        try:
            loaded = ocp.load_checkpointables(self._directory / str(step), {"state": stored})["state"]
        except _LOAD_ERRORS as error:
            causes = list(_chain(error))
            if isinstance(causes[-1], jax.errors.JaxRuntimeError):  # such as out of memory: not the checkpoint's fault
                raise causes[-1] from None
            raise self._damaged(step, _cause(error)) from error
        found = jax.device_get({name: _fingerprint(leaf) for name, leaf in loaded.items()})
        if changed := [name for name in stored if int(found[name]) != marks[name]]:
            raise self._damaged(step, f"the values of {', '.join(changed[:4])} differ from the saved ones")
        empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
        return {
            name: jax.device_put(empty[name], leaf.sharding) if name in empty else loaded[name]
            for name, leaf in wanted.items()
        }

    def _make_writer(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            _quiet_orbax()
            self._writer = ocp.training.Checkpointer(
                self._directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _save_failed(self, step: int, size: int, error: BaseException) -> CheckpointError:
        # Orbax would raise the same error again from its next call, even if that succeeds: make a new writer.
        self._writer = None
        latest = self.latest_step()
        resumes = "starts from the beginning" if latest is None else f"resumes from step {latest}"
        if _disk_is_full(error):
            return CheckpointError(
                f"no space left on the disk of {self._directory} for the checkpoint of step {step}: "
                f"free {_mebibytes(size)}, then run the same command again: it {resumes}"
            )
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {_cause(error)}. "
            f"Fix the cause, then run the same command again: it {resumes}"
        )

    def _damaged(self, step: int, cause: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self._directory / str(step)} is damaged: {cause}. "
            f"Restore its files, or {self._remedy(step)}"
        )

    def _remedy(self, step: int) -> str:
        older = max((other for other in saved_steps(self._directory) if other < step), default=None)
        effect = "start from the beginning" if older is None else f"resume from step {older}"
        return f"delete {self._directory / str(step)} to {effect}"


def check_free_space(directory: Path, state_bytes: int, keep: int) -> None:
    """Raises CheckpointError, before any work is done, if the disk lacks space for the checkpoints of a run.

    While one is written, the previous `keep` still exist; those already on the disk need no more space.
    """
    directory = Path(directory).absolute()
    needed = state_bytes * (keep + 1 - min(keep, len(saved_steps(directory))))
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"checkpoints in {directory} need {_mebibytes(needed)} ({needed} bytes: {keep} kept and one being written, "
            f"{_mebibytes(state_bytes)} each, minus existing ones), but {_mebibytes(free)} ({free} bytes) are free: "
            f"free {_mebibytes(needed - free)}, keep fewer checkpoints, or choose another workdir"
        )


def saved_steps(directory: Path) -> set[int]:
    """Returns the steps whose checkpoints are completely on disk."""
    return (
        {found.step for found in ocp.path.step.standard_name_format().find_all(directory)}
        if directory.exists()
        else set()
    )


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns path -> leaf, in the tree's order. A flat dictionary hides optax's and flax's containers from orbax."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/") or "state": leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path; a key must not contain '/'")
    return leaves


def _differences(saved: Mapping[str, tuple], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            yield f"{name}: only in the checkpoint, {saved[name][1]}{list(saved[name][0])}"
        elif name not in saved:
            yield f"{name}: not in the checkpoint, this run has {wanted[name].dtype}{list(wanted[name].shape)}"
        elif saved[name][:2] != (wanted[name].shape, str(wanted[name].dtype)):
            yield (
                f"{name}: {saved[name][1]}{list(saved[name][0])} in the checkpoint, "
                f"{wanted[name].dtype}{list(wanted[name].shape)} in this run"
            )


def fingerprint(tree: PyTree) -> str:
    """Returns a hash of all leaves of a pytree of `jax.Array`, their paths and shapes; "" for an empty one."""
    leaves = _named_leaves(tree)
    marks = jax.device_get({name: _fingerprint(leaf) for name, leaf in leaves.items()})
    parts = [(name, leaf.shape, str(leaf.dtype), int(marks[name])) for name, leaf in leaves.items()]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else ""


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Returns a uint32 hash of the bits of `x` and their positions: the same for every sharding, without moving
    data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit types become pairs of words.
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    place = functools.reduce(
        jnp.add,
        (
            jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            * np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
            for axis in range(words.ndim)
        ),
        jnp.uint32(0),
    )
    return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(place + jnp.uint32(1))), dtype=jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser (Appleby): a bijection in which every bit of the input reaches every bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    """Returns the first line of the innermost error; the ones that orbax wraps around it are about its handlers."""
    innermost = list(_chain(error))[-1]
    return f"{type(innermost).__name__}: {(str(innermost).splitlines() or [''])[0].split(' [tensorstore_spec')[0]}"


def _disk_is_full(error: BaseException) -> bool:
    return any(
        getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(link) for text in _FULL_DISK)
        for link in _chain(error)
    )


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / 2**20)} MiB"


@functools.cache
def _quiet_orbax() -> None:
    """Drops orbax's log records from now on: failures are raised anyway, and each save logs a dozen records.

    Also drops the tracebacks of writes and reads that orbax no longer waits for: when one array fails, orbax closes the
    event loop that the others report to, and each prints `RuntimeError: Event loop is closed`.
    """
    absl_logging.get_absl_logger().addFilter(_is_not_from_orbax)
    report = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if _is_of_a_closed_loop(unraisable) else report(unraisable)


def _is_of_a_closed_loop(unraisable: Any) -> bool:
    error = unraisable.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed" and unraisable.object is None


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/checkpoint/" not in record.pathname
