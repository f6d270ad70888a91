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


# These fields decide where and how a run is computed, not its results, which stay equal up to rounding. A run may
# resume with other values.
_PLACEMENT = ("mesh.", "system.", "pack.rows", "rollout.tool_threads", "model.remat", "model.attention", "checkpoint.")


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
        recorded = _later_fields(recorded) | recorded
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); move the workdir away, or use another --workdir") from error
    missing = "(no such field)"
    differing = [
        f"  {name}: the run has {recorded.get(name, missing)!r}, this config {current.get(name, missing)!r}"
        for name in sorted(current.keys() | recorded.keys())
        if current.get(name, missing) != recorded.get(name, missing) and not name.startswith(_PLACEMENT)
    ]
    if differing:
        raise ConfigError(
            f"workdir {workdir} holds a run with a different config:\n"
            + "\n".join(differing)
            + "\nUse the same config to resume it, or another --workdir for a new run."
        )


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
