"""The standard streams of a program, and text that is safe to show on a terminal.

In: the file descriptors that a program was started with; any text. Out: streams that are open and take any character;
the text with its control characters escaped.
"""

import io
import os
import re
import select
import sys

# What moves the cursor, talks to the terminal, or shows text in another order than it has: C0 (but newline and tab),
# DEL, C1, line and paragraph separators, Unicode's bidirectional controls. And surrogates, which stand for bytes that
# are not UTF-8 and cannot be printed.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: object) -> str:
    """Returns `str(text)` with control characters as Python escapes, such as `\\x1b` and `\\u202e`. Newlines and tabs
    stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def open_standard_streams() -> None:
    """Opens those of the descriptors 0 to 2 that are closed (`program <&- >&- 2>&-`) on /dev/null. Otherwise the next
    files that the program opens get these numbers, and what it prints ends up in them.

    Call it before anything opens files. Afterwards stdout and stderr also take characters that their encoding lacks,
    as escapes; and stderr loses text that cannot be written, instead of raising OSError.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is fd
        if getattr(sys, name) is None:
            options = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
            setattr(sys, name, open(fd, "w" if fd else "r", **options))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _lasting(sys.stderr, 2)


def outlive_stdout() -> None:
    """Lets the program go on when its output can no longer be written: nobody reads it, its terminal is gone, or the
    disk is full. What cannot be written is lost."""
    sys.stdout = _lasting(sys.stdout, 1)


def _lasting(stream, fd: int):
    """Returns a stream like this one that drops what its descriptor does not take; the same, if it is no plain file."""
    if type(stream) is not io.TextIOWrapper or stream.fileno() != fd:  # a test captures it
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(fd, "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _LastingFile(io.FileIO):
    def write(self, data) -> int:
        try:
            while (written := super().write(data)) is None:  # another program has made the terminal non-blocking
                select.select([], [self], [])
            return written
        except OSError:
            return len(data)
