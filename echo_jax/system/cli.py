"""How every program starts: it opens its standard streams, parses flags, and prints errors that users can fix without a
traceback."""

import itertools
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags, logging

from echo_jax.system import named, overrides, paths, terminal
from echo_jax.system.errors import USER_ERRORS
from echo_jax.system.overrides import MayAdd
from echo_jax.system.terminal import escaped


def run_program(
    main: Callable[[flags.FlagValues], int | None],
    required: tuple[str, ...] = ("config", "workdir"),
    *,
    outlives_output: bool = False,
) -> None:
    """Runs a program's main on its flags. Exits with its status, or with 1 after one of `USER_ERRORS` or for a config
    that cannot be read.

    Args:
      required: flags that must be given.
      outlives_output: whether the program goes on, and its status stays the same, if nobody can read its output: what
        it prints is not its result.
    """
    terminal.open_standard_streams()
    if outlives_output:
        terminal.outlive_stdout()
    flags.mark_flags_as_required(required)

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.WARNING)
        try:
            return main(flags.FLAGS)
        except USER_ERRORS as error:
            print(f"error: {escaped(error)}", file=sys.stderr)
            return 1

    app.run(guarded, flags_parser=_parse_flags)


def define_config(may_add: MayAdd) -> None:
    """Defines --config, a config file, and its overrides: --config.section.field=value.

    Args:
      may_add: whether an override may add a field of this name, which the config lacks.
    """
    overrides.define_config_file(may_add, "Config file; override any field with --config.section.field=value.")


def define_config_of_run(recorded: Callable[[Path], ml_collections.ConfigDict], may_add: MayAdd) -> None:
    """Defines --config for a program that reads a run: a config file or, without one, what `recorded` returns for
    --workdir. Either takes overrides: --config.section.field=value. Exits with a message if there is no run.

    Args:
      may_add: as for `define_config`.
    """
    terminal.open_standard_streams()
    workdir = _given("workdir")
    if _given("config") is not None or workdir is None:
        help = (
            "A config file; default: the config that the workdir recorded. Override a field with --config.NAME=value."
        )
        overrides.define_config_file(may_add, help)
        return
    try:
        config = recorded(paths.parse(workdir, "--workdir"))
        overrides.define_config(config, may_add, "The config that the workdir recorded.")
    except USER_ERRORS as error:
        sys.exit(f"error: {escaped(error)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of an override, which is parsed at once
        sys.exit(f"error: {escaped(_reason(error))}")


def define_path(name: str, help: str) -> None:
    """Defines a flag that takes a path: None if it is not given; `~` is the home folder; an empty one is an error."""
    flags.DEFINE(_PathParser(name), name, None, help, serializer=flags.ArgumentSerializer())


class _PathParser(flags.ArgumentParser):
    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str | Path) -> Path:
        try:
            return paths.parse(argument, f"--{self._name}")
        except paths.PathError as error:
            raise flags.ValidationError(str(error)) from error

    def flag_type(self) -> str:
        return "path"


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
    try:
        argv = _with_expanded_config(argv)
        if (config := _given("config")) is not None:
            path = Path(paths.expanded(config).partition(":")[0])
            if not path.is_file():
                sys.exit(f"error: config file {escaped(path)} does not exist")
            named.add_to_path(path)
        return flags.FLAGS(argv)
    except paths.PathError as error:
        sys.exit(f"error: {escaped(error)}")
    except flags.Error as error:
        sys.exit(f"error: {escaped(_cause(str(error)))}")
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, OSError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "sweep")]
        place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
        sys.exit(f"error: {escaped(f'{place}{type(error).__name__}: {_reason(error)}')}")


def _with_expanded_config(argv: list[str]) -> list[str]:
    """Returns the arguments with `~` expanded in --config=~/FILE, which shells leave alone."""
    starts = ("--config=", "-config=")
    return [f"{a.partition('=')[0]}={paths.expanded(a.partition('=')[2])}" if a.startswith(starts) else a for a in argv]


def _reason(error: BaseException) -> str:
    """Returns the innermost message of nested exceptions, on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return " ".join(str(error.args[0] if error.args else error).split())
