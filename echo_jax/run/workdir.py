"""Who may train in a workdir: one config, one run at a time, one owner.

In: a config and a folder. Out: the folder's `config.json`, `.lock` and `owner`, or an error that says who has it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from echo_jax.config import OPEN_SECTIONS, ConfigError, default_config, flat
from echo_jax.system.errors import UserError


def claim_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes config.json into a new workdir, or checks that an old one belongs to the same config."""
    path = workdir / "config.json"
    if path.exists():
        check_workdir(config, workdir)
        return
    workdir.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("config.json.tmp")
    scratch.write_text(json.dumps(flat(config), indent=2, sort_keys=True) + "\n")
    os.replace(scratch, path)


# A run may resume with other values of these fields: they decide where and how it is computed, not its results, which
# stay equal up to rounding; or only on what it is evaluated.
_MAY_DIFFER = (
    "mesh.",
    "system.",
    "pack.rows",
    "rollout.tool_threads",
    "model.remat",
    "model.attention",
    "checkpoint.",
    "eval.trajectories",
)


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Checks that a workdir holds a run of this config.

    A field that the run's version did not have yet counts as its default. Fields of placement may differ, so that a run
    can move to other machines.

    Raises:
      ConfigError: it holds no run, or a run with a different config (the message lists the differences); resuming would
        mix two experiments.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run; train one first: python -m echo_jax.train --workdir={workdir} …")
    current = _plain(flat(config))
    try:
        recorded = json.loads(path.read_text())
        if not isinstance(recorded, dict):
            raise ValueError(f"a {type(recorded).__name__}, not an object")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); move the workdir away, or use another --workdir") from error
    recorded |= {name: value for name, value in _later_fields(recorded).items() if name in current}
    differing = []
    for name in sorted(current.keys() | recorded.keys()):
        theirs, ours = (fields.get(name, _absent(name)) for fields in (recorded, current))
        if theirs != ours and not name.startswith(_MAY_DIFFER):
            differing.append(f"  {name}: the run has {theirs!r}, this config {ours!r}")
    if differing:
        raise ConfigError(
            f"workdir {workdir} holds a run with a different config:\n"
            + "\n".join(differing)
            + "\nUse the same config to resume it, or another --workdir for a new run."
        )


def _absent(name: str) -> Any:
    """Returns what it means that a config does not name an entry of an open section."""
    if name.startswith("loss.class_weights."):
        return 0.0
    return 1.0 if name.startswith("loss.tool_weights.") else "(no such field)"


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields as they are after a round trip through JSON."""
    return json.loads(json.dumps(fields))


def _later_fields(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of each field that a recorded config lacks. Entries of an open section are not fields: if it
    lacks one, the config left it out."""
    sections = [section for section in OPEN_SECTIONS if any(name.startswith(f"{section}.") for name in recorded)]
    return {
        name: value
        for name, value in _plain(flat(default_config())).items()
        if name not in recorded and not any(name.startswith(f"{section}.") for section in sections)
    }


class Taken(UserError):
    """Another process is training in the workdir, or another owner has taken it."""


@contextlib.contextmanager
def only_process_in(workdir: Path) -> Iterator[None]:
    """Holds the workdir's lock; raises `Taken` if another process has it. A killed process releases it."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(f"another process is training in {workdir}; stop it, or use another --workdir") from error
        yield


def claim_for(owner: str, workdir: Path) -> None:
    """Gives the workdir to the owner; raises `Taken` if another has it. If two try at once, one of them gets it."""
    path = workdir / "owner"
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(owner)
    if (found := path.read_text()) != owner:
        raise Taken(f"{workdir} belongs to the owner {found!r}, not to {owner!r}; if {found!r} is gone, delete {path}")
