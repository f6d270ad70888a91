"""Paths that users give, on a command line or in a config.

In: text. Out: the path that it means, or an error that names where it was given.
"""

import os
import sys
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
      PathError: it is empty, which is often a variable that is not set; or it cannot be a path, or is none in UTF-8.
    """
    if not str(path).strip():
        raise PathError(f"{given} is empty; name a folder or file, or leave out the flag")
    if "\0" in str(path):
        raise PathError(f"{given} = {str(path)!r} contains a zero byte")
    found = Path(expanded(path))
    if not _is_utf8(found):
        raise PathError(
            f"{given} = {str(found)!r}: libraries that read and write there take only paths in UTF-8, that of the "
            "current folder included; rename the folder"
            + ("" if sys.getfilesystemencoding() == "utf-8" else ", or set a UTF-8 locale, such as LC_ALL=C.UTF-8")
        )
    return found


def _is_utf8(path: Path) -> bool:
    """Returns whether a path, made absolute, has the same bytes for Python and for libraries that expect UTF-8."""
    try:
        whole = os.path.abspath(path)
        return os.fsencode(whole) == whole.encode()
    except UnicodeEncodeError:
        return False
    except FileNotFoundError:  # the current folder has been removed, which whatever opens the path will say
        return True
