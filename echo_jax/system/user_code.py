"""Exceptions out of code that users bring: tasks, tools, filters, losses, advantage estimators.

In: an exception, and what raised it. Out: one text with place and traceback, for an error or for the run's
`errors.log`.
"""

import contextlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

from echo_jax.system.errors import UserError

_logger = logging.getLogger("echo_jax.user_code")


class UserCodeError(UserError, RuntimeError):
    """Code that the user brought raised an exception; the message has its place and traceback."""


def describe(what: str, error: BaseException) -> str:
    """Returns "WHAT raised TYPE: MESSAGE (FILE:LINE)", then the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    trace = "".join(traceback.format_exception(error)).rstrip()
    return f"{what} raised {type(error).__name__}: {error}{place}\n{trace}"


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Turns an exception of the code inside into a `UserCodeError` that says what raised it; `UserError`s pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserCodeError(describe(what, error)) from error


def log(text: str) -> None:
    """Keeps a text of `describe` in the file of `log_to`, if there is one."""
    _logger.error(text)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends what is logged meanwhile to a file, which exists from the first text on."""
    handler = logging.FileHandler(path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s\n"))
    _logger.addHandler(handler)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.propagate = True
        handler.close()
