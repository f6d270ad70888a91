"""Paths that users give, on a command line or in a config.

In: text. Out: the path that it means, or an error that names where it was given.
"""

import os
from pathlib import Path

from echo_jax.system.errors import UserError


class PathError(UserError, ValueError):
    """This text cannot be a path."""


def expanded(path: str | Path) -> str:
    """Returns a path with `~` or `~USER` at its start replaced by that home folder; shells do so only for a separate
    word, not in `--workdir=~/x` or in a config.

    Raises:
      PathError: there is no such user.
    """
    found = os.path.expanduser(str(path))
    if found.startswith("~") and not os.path.exists(found):
        raise PathError(f"{found!r}: there is no such home folder; write ./{found} for a name that starts with ~")
    return found


def parse(path: str | Path, given: str) -> Path:
    """Returns the path that a flag gives.

    Args:
      given: the flag, for errors.

    Raises:
      PathError: it is empty, which is often a variable that is not set; or it cannot be a path.
    """
    if not str(path).strip():
        raise PathError(f"{given} is empty; name a folder or file, or leave out the flag")
    if "\0" in str(path):
        raise PathError(f"{given} = {str(path)!r} contains a zero byte")
    return Path(expanded(path))
