"""Exceptions out of code that users bring: tasks, tools, filters, losses, advantage estimators.

In: an exception, and what raised it. Out: one text with place and traceback, for an error or for the run's
`errors.log`.
"""

import contextlib
import logging.handlers
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from echo_jax.system.errors import UserError

LIBRARIES = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))  # Python's, and this package
LOG_BYTES = 16 << 20  # of errors.log, and of its predecessor errors.log.1
_logger = logging.getLogger("echo_jax.user_code")


class UserCodeError(UserError, RuntimeError):
    """Code that the user brought raised an exception; the message has its place and traceback."""


def describe(what: str, error: BaseException) -> str:
    """Returns "WHAT raised TYPE (FILE:LINE): MESSAGE", then the traceback, both cut to a bearable length. The policy's
    text may be in the message: what UTF-8 cannot encode is escaped."""
    place = _place(error)
    trace = "".join(traceback.format_exception(error)).rstrip()
    message = _cut(" ".join(message_of(error).split()), 300)
    text = f"{what} raised {type(error).__name__}{place}: {message}\n{_cut(trace, 8000)}"
    return text.encode("utf-8", "backslashreplace").decode()


def message_of(error: BaseException) -> str:
    """Returns the message of an exception, also of one that cannot tell it."""
    try:
        return str(error)
    except Exception as another:
        return f"its message raised {type(another).__name__}"


def _place(error: BaseException) -> str:
    """Returns " (FILE:LINE)" of the last frame in the user's own code: not in Python's library or a package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(("<", *LIBRARIES)) and "site-packages" not in f.filename]
    last = (own or frames)[-1:]
    return f" ({last[0].filename}:{last[0].lineno})" if last else ""


def _cut(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {len(text) - most} characters … {text[-half:]}"


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Turns an exception of the code inside into a `UserCodeError` that says what raised it; `UserError`s pass."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a sys.exit() would end the run as if it were complete
        raise UserCodeError(describe(what, error)) from error


def log(text: str) -> None:
    """Keeps a text of `describe` in the file of `log_to`, if there is one."""
    _logger.error(text)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Appends what is logged meanwhile to a file, which exists from the first text on."""
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=LOG_BYTES, backupCount=1, delay=True, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s\n"))
    _logger.addHandler(handler)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.propagate = True
        handler.close()
