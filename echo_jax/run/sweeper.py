"""Runs a sweep, one process after the other, and tabulates the results.

In: a config file with a `sweep()`. Out: a workdir per run, results.csv.
"""

import contextlib
import csv
import dataclasses
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TextIO

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from echo_jax.config import ConfigError, load_config_file, may_add
from echo_jax.run.workdir import follows_warm_start
from echo_jax.system.errors import UserError
from echo_jax.system.metrics import read_metrics
from echo_jax.system.overrides import define_config, literal, plain
from echo_jax.system.peers import AGAIN, TAKEN
from echo_jax.system.terminal import escaped

METRICS = ("eval/solve_rate", "eval/observation_ce", "rollout/solve_rate", "observation/ce")  # columns of the table
TRAIN = (sys.executable, "-m", "echo_jax.train")
_TAIL_LINES = 20
_KILL_SECONDS = 15.0  # after a second interruption, before a run is killed
_LONGEST_NAME = 150
_PLAIN_WIDTH = 240  # of the table if the output is not a terminal


class SweepError(UserError, ValueError):
    """The sweep cannot run as written; the message names the run and the field."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the sweep."""

    name: str  # also the name of its workdir
    overrides: Mapping[str, Any]  # field of the config -> value
    workdir: Path
    command: tuple[str, ...]
    log: Path
    needs: str = ""  # name of the run whose warm start it starts from

    @property
    def done(self) -> bool:
        return (self.workdir / "DONE").exists()


def run_sweep(
    config: str,
    workdir: Path,
    *,
    common: Mapping[str, Any] | None = None,
    only: str = "",
    dry_run: bool = False,
    report: bool = False,
    train: Sequence[str] = TRAIN,
    launcher: Sequence[str] | None = None,
    owner: str = "",
    logs: Path | None = None,
    table: Sequence[str] | None = None,
    output: TextIO | None = None,
) -> int:
    """Runs the sweep; see sweep.py.

    Args:
      config: path of the config file, followed by `:arg` if `get_config` takes an argument.
      workdir: parent of the runs' workdirs.
      common: overrides for every run; not part of the names.
      only: a regular expression; start only the runs whose name matches it.
      dry_run: print the commands of these runs and do nothing else.
      report: start nothing; print the table and write results.csv from the existing results.
      train: the program that runs one run, as a command without arguments.
      launcher: a command to use instead; its exit status 0 means that the run is done.
      owner: runs that another owner has taken are left alone.
      logs: folder for the runs' logs and results.csv; None: the workdirs.
      table: a command that prints the table instead of this function.
      output: where to print; stdout if None.

    Returns:
      The exit status: 0 if every run is done or another owner's, 1 if one failed, 130 after an interruption.

    Raises:
      SweepError: one of the runs is invalid; nothing was started.
    """
    output = sys.stdout if output is None else output
    command = (*(launcher or train), *([f"--owner={owner}"] if owner else []))
    runs = plan(config, Path(workdir), common or {}, command, logs)
    try:
        matching = [run for run in runs if re.search(only, run.name)]
    except re.error as error:
        raise SweepError(f"--only={only} is not a regular expression: {error}") from error
    needed = {run.needs for run in matching}
    chosen = [run for run in runs if run in matching or run.name in needed]
    if not chosen:
        raise SweepError(f"--only={only} matches none of the runs: {', '.join(run.name for run in runs)}")
    if dry_run:
        for run in chosen:
            print(_shown(run.command), file=output)
        if table is not None:
            print(_shown(table), file=output)
        return 0
    status = 0
    done = {run.name for run in runs if run.done}
    try:
        with _signals_interrupt():
            for number, run in enumerate([] if report else chosen, start=1):
                if run.needs and run.needs not in done:
                    print(f"{run.name}: waits for the warm start of {run.needs}; repeat the command later", file=output)
                    status = 1
                    continue
                ended = _execute(run, f"[{number}/{len(chosen)}] {run.name}", output, believe=launcher is not None)
                if ended == 0:
                    done.add(run.name)
                elif ended != TAKEN:
                    status = 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=output, flush=True)
        status = 130
    if table is None:
        _report(runs, done, Path(logs or workdir) / "results.csv", output)
    elif status != 130:
        _print_table(table, output)
    return status


def plan(
    config: str, workdir: Path, common: Mapping[str, Any], train: Sequence[str], logs: Path | None = None
) -> list[Run]:
    """Returns all runs of the sweep. Checks that each field exists and takes its value, and that names are unique."""
    path, *arg = config.split(":", 1)
    common = plain(common)
    try:
        module = load_config_file(Path(path))
    except ConfigError as error:
        raise SweepError(str(error)) from error
    if not hasattr(module, "sweep"):
        raise SweepError(f"{path} has no sweep(); to train one run of it: python -m echo_jax.train --config={config} …")
    shared = getattr(module, "shared_warm_start", None)
    runs: dict[str, Run] = {}

    def add(name: str, overrides: Mapping[str, Any], more: Mapping[str, Any], needs: str = "") -> None:
        fields = common | overrides | more
        arguments = [f"--config.{field}={_argument(field, value)}" for field, value in fields.items()]
        _check(module.get_config(*arg), name, fields, arguments)
        command = (*train, f"--config={config}", f"--workdir={workdir / name}", *arguments)
        runs[name] = Run(name, overrides, workdir / name, command, (logs or workdir) / name / "log.txt", needs)

    for overrides in map(plain, module.sweep()):
        if not isinstance(overrides, Mapping) or not all(isinstance(field, str) for field in overrides):
            raise SweepError(f"sweep() in {config} yields {overrides!r}; it must yield dictionaries of field: value")
        name = run_name(overrides)
        if name in runs:
            raise SweepError(f"two runs would have the name {name}: {dict(runs[name].overrides)} and {overrides}")
        if twice := common.keys() & overrides.keys():
            raise SweepError(f"run {name}: {', '.join(sorted(twice))} is set both by the sweep and on the command line")
        if shared is None:
            add(name, overrides, {})
            continue
        begins = {field: overrides[field] for field in shared if field in overrides}
        if apart := [field for field in overrides if field not in shared and not follows_warm_start(field)]:
            raise SweepError(
                f"run {name}: the warm start depends on {', '.join(apart)}, which shared_warm_start = {tuple(shared)} "
                "lacks"
            )
        first = ",".join(["warm_start", *([run_name(begins)] if begins else [])])
        if first not in runs:
            add(first, begins, {"num_steps": 0})
        add(name, overrides, {"init_from": str(workdir / first)}, first)
    if not runs:
        raise SweepError(f"sweep() in {config} yields no run")
    return list(runs.values())


def _shown(command: Sequence[str]) -> str:
    """Returns a command as a line for bash; control characters of an argument are escaped, as in `$'\\u001b'`."""
    return " ".join(shlex.quote(part) if escaped(part) == part else _escaped_word(part) for part in command)


def _escaped_word(text: str) -> str:
    def letter(character: str) -> str:
        if character in "\\'":
            return f"\\{character}"
        if escaped(character) == character:
            return character
        code = ord(character)
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"  # a byte that is not UTF-8

    return f"$'{''.join(map(letter, text))}'"


def run_name(overrides: Mapping[str, Any]) -> str:
    """`{"loss.observation_weight": 0.05, "seed": 1}` -> `observation_weight=0.05,seed=1`; the order does not matter."""
    short = [field.rsplit(".", 1)[-1] for field in overrides]
    parts = []
    for field, value in sorted(overrides.items()):
        last = field.rsplit(".", 1)[-1]
        key = last if short.count(last) == 1 else field
        text = _named(value)
        parts.append(f"{key}={text}")
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", ",".join(parts)) or "base"
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _named(value: Any) -> str:
    """Returns a value as part of a run's name."""
    if isinstance(value, Mapping):
        return "-".join(f"{name}-{_named(entry)}" for name, entry in sorted(value.items()))
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _argument(field: str, value: Any) -> str:
    """Returns the text of a flag that sets this field. An entry of an open section has no type, so that its text is
    read as a literal: a string that looks like a number, or like None, needs quotes there."""
    if not isinstance(value, str) or (may_add(field) and literal(value) != value):
        return repr(value)
    return value


def _check(
    config: ml_collections.ConfigDict, name: str, overrides: Mapping[str, Any], arguments: Sequence[str]
) -> None:
    """Reads the arguments back as the train program will, and compares: a wrong type shows as a changed value."""
    values = flags.FlagValues()
    argv = ["train", *arguments]
    try:
        define_config(config, may_add, "The run's config.", flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise SweepError(f"run {name}: the config does not take {dict(overrides)}: {reason}") from error
    for field, value in plain(config_flags.get_override_values(values["config"])).items():
        if value != overrides[field]:
            raise SweepError(
                f"run {name}: {field} is of type {type(value).__name__} and does not take {overrides[field]!r}: "
                f"it would become {value!r}"
            )


def _execute(run: Run, title: str, output: TextIO, *, believe: bool) -> int:
    """Runs one run and returns its status; 0 means done: it exited with 0 and, unless `believe`, wrote DONE.

    Passes an interruption on to the run once, then waits for it.
    """
    if run.done:
        print(f"{title}: done before", file=output, flush=True)
        return 0
    print(f"{title}: started", file=output, flush=True)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with run.log.open("ab") as file:
        early: list[int] = []
        handlers = _handle(lambda number, _: early.append(number))  # an exception in Popen would lose the child
        try:
            # In a new session, or a terminal's Ctrl-C would reach it twice.
            child = subprocess.Popen(
                run.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            _handle(handlers)
            if early:
                raise KeyboardInterrupt
            status = child.wait()
        except KeyboardInterrupt:
            print(f"{title}: interrupted, waiting for it to stop (repeat to kill it)", file=output, flush=True)
            child.send_signal(signal.SIGINT)
            try:
                child.wait()
            except KeyboardInterrupt:
                _kill(child)
            raise
        finally:
            _handle(handlers)
    seconds = time.monotonic() - began
    if status == 0 and (believe or run.done):
        print(f"{title}: done in {seconds:.0f} s", file=output, flush=True)
        return 0
    if status == TAKEN:
        print(f"{title}: belongs to another owner, left alone", file=output, flush=True)
        return TAKEN
    if status == 0:
        reason = "ended without writing DONE"
    else:
        reason = f"FAILED with status {status}"
        if status == AGAIN:
            reason += " (the same command resumes it)"
    print(f"{title}: {reason} after {seconds:.0f} s; last lines of {escaped(run.log)}:", file=output)
    for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]:
        print(f"    {escaped(line)}", file=output)
    output.flush()
    return status or 1


def _kill(child: subprocess.Popen) -> None:
    """Sends a second interruption, which lets a launcher end what it started elsewhere; kills the child if it stays."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        child.wait(_KILL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP stop the sweep as Ctrl-C does; otherwise the run would go on without its sweep."""
    previous = _handle(signal.default_int_handler)
    try:
        yield
    finally:
        _handle(previous)


def _handle(handlers: Any) -> dict[int, Any]:
    """Sets the handler of each signal that interrupts a sweep, one for all or one by number; returns the earlier
    ones."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    by_number = handlers if isinstance(handlers, dict) else dict.fromkeys(numbers, handlers)
    return {number: signal.signal(number, by_number[number]) for number in numbers}


def _print_table(command: Sequence[str], output: TextIO) -> None:
    print(f"asking for the table: {escaped(shlex.join(command))}", file=output, flush=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    ended = subprocess.run(command, **pipes, encoding="utf-8", errors="replace")
    print(escaped(ended.stdout), end="", file=output, flush=True)
    if ended.returncode:
        print(f"no table: status {ended.returncode}", file=output, flush=True)


def _report(runs: Sequence[Run], done: Set[str], path: Path, output: TextIO) -> None:
    """Writes and prints one row per run: its overrides, whether it is done, the last value of each of its metrics."""
    last = {run.name: _last_values(run.workdir / "metrics.jsonl") for run in runs}
    fields = sorted({field for run in runs for field in run.overrides})
    metrics = [metric for metric in METRICS if any(metric in values for values in last.values())]
    header = ["run", *fields, "done", *metrics]
    rows = []
    for run in runs:
        cells = [str(run.overrides.get(field, "")) for field in fields]
        values = [last[run.name].get(metric, "") for metric in metrics]
        rows.append([run.name, *cells, "yes" if run.name in done else "no", *values])
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    os.replace(temporary, path)
    # The name repeats the overrides, so the printed table omits it.
    first = 1 if fields else 0
    table = Table(*header[first:])
    for row in rows:
        table.add_row(*(escaped(cell) if isinstance(cell, str) else f"{cell:.4g}" for cell in row[first:]))
    Console(file=output, width=None if output.isatty() else _PLAIN_WIDTH, markup=False, highlight=False).print(table)
    print(escaped(path), file=output, flush=True)


def _last_values(path: Path) -> dict[str, float]:
    """Returns metric -> its value in the last record that has it; null becomes nan."""
    latest: dict[str, float] = {}
    for record in read_metrics(path):
        latest |= {name: float("nan") if value is None else value for name, value in record.items()}
    return latest
