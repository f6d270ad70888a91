"""How every program starts: it parses flags, and prints errors that users can fix without a traceback."""

import itertools
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from echo_jax.system import named
from echo_jax.system.errors import USER_ERRORS


def run_program(
    main: Callable[[flags.FlagValues], int | None],
    required: tuple[str, ...] = ("config", "workdir"),
) -> None:
    """Runs a program's main on its flags. Exits with its status, or with 1 after one of `USER_ERRORS` or for a config
    that cannot be read."""
    flags.mark_flags_as_required(required)

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            return main(flags.FLAGS)
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    app.run(guarded, flags_parser=_parse_flags)


def define_config_of_run(recorded: Callable[[Path], ml_collections.ConfigDict]) -> None:
    """Defines --config for a program that reads a run: a config file or, without one, what `recorded` returns for
    --workdir. Either takes overrides: --config.section.field=value. Exits with a message if there is no run."""
    workdir = _given("workdir")
    if _given("config") is not None or workdir is None:
        help = (
            "A config file; default: the config that the workdir recorded. Override a field with --config.NAME=value."
        )
        config_flags.DEFINE_config_file("config", None, help)
        return
    try:
        config_flags.DEFINE_config_dict("config", recorded(Path(workdir)), "The config that the workdir recorded.")
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of an override, which is parsed at once
        sys.exit(f"error: {_reason(error)}")


def _given(name: str) -> str | None:
    """Returns the value of a flag on the command line, before it is parsed."""
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            return value if equals else following
    return None


def _cause(message: str) -> str:
    """Extracts the line of the config file, and the error, from a message that contains the whole traceback."""
    _, found, trace = message.rpartition("Traceback (most recent call last):\n")
    if not found:
        return f"{message}\n--help shows the flags"
    lines = trace.rstrip().splitlines()
    frames = list(itertools.takewhile(lambda line: line.startswith(" "), lines))
    places = re.findall(r'File "(.+)", line (\d+), in (?:get_config|sweep)\b', "\n".join(frames))
    place = "{}:{}: ".format(*places[-1]) if places else ""
    return place + re.sub(r"^(\w+\.)+(?=\w+:)", "", "\n".join(lines[len(frames) :]))


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags. For a bad config file or override, exits with one message that gives its location."""
    for argument in argv:
        name, _, value = argument.partition("=")
        path = Path(value.split(":")[0])
        if name.lstrip("-") == "config":
            if not path.is_file():
                sys.exit(f"error: config file {path} does not exist")
            named.add_to_path(path)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {_cause(str(error))}")
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, OSError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "sweep")]
        place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
        sys.exit(f"error: {place}{type(error).__name__}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """Returns the innermost message of nested exceptions, on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return " ".join(str(error.args[0] if error.args else error).split())
