"""Who may train in a workdir: one config, one run at a time, one owner.

In: a config and a folder. Out: the folder's `config.json`, `.lock` and `owner`, or an error that says whose it is.
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


# Where and how it is computed, not what: a run may go on with other values, equal up to rounding.
_PLACEMENT = ("mesh.", "system.", "pack.rows", "rollout.tool_threads", "model.remat", "model.attention", "checkpoint.")


def check_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Checks that a workdir holds a run of this config.

    A field that the run's version did not have yet counts as its default. Fields of placement may differ, so that a run
    can move to other machines.

    Raises:
      ConfigError: it holds no run, or one of another config, which is listed: going on would mix two experiments.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} holds no run; train one first: python -m echo_jax.train --workdir={workdir} …")
    ours = _plain(flat(config))
    try:
        theirs = json.loads(path.read_text())
        theirs = _later_fields(theirs) | theirs
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); move the workdir away, or use another --workdir") from error
    missing = "(no such field)"
    differing = [
        f"  {name}: there {theirs.get(name, missing)!r}, here {ours.get(name, missing)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, missing) != theirs.get(name, missing) and not name.startswith(_PLACEMENT)
    ]
    if differing:
        raise ConfigError(
            f"workdir {workdir} holds a run of another config:\n"
            + "\n".join(differing)
            + "\nUse the same config to resume it, or another --workdir for a new run."
        )


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields as JSON gives them back."""
    return json.loads(json.dumps(fields))


def _later_fields(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of each field that a recorded config lacks. Entries of a section that configs fill themselves
    are not fields: what such a section does not name, it leaves out."""
    sections = [section for section in OPEN_SECTIONS if any(name.startswith(f"{section}.") for name in recorded)]
    return {
        name: value
        for name, value in _plain(flat(default_config())).items()
        if name not in recorded and not any(name.startswith(f"{section}.") for section in sections)
    }


class Taken(UserError):
    """Another process trains in the workdir, or another owner does from time to time."""


@contextlib.contextmanager
def only_process_in(workdir: Path) -> Iterator[None]:
    """Holds the workdir's lock; raises `Taken` if another run has it. A killed process leaves none."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Taken(f"another process is training in {workdir}; stop it, or use another --workdir") from error
        yield


def claim_for(owner: str, workdir: Path) -> None:
    """Makes the workdir the owner's; raises `Taken` if it is another's. Of two that try at once one gets it."""
    path = workdir / "owner"
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(owner)
    if (found := path.read_text()) != owner:
        raise Taken(f"{workdir} belongs to the owner {found!r}, not to {owner!r}; if that one is gone, delete {path}")
