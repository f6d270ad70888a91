"""Measures sandbox starts and calls per second, with all limits on.

    python experiments/benchmarks/sandbox.py [--output=experiments/benchmarks/sandbox.md] [--before=FOLDER]

A start is that of one episode: open a sandbox with files, run a first command, close it. A call is one more command in
an open sandbox. Each row is measured with several sandboxes at once, each driven by one thread of a new process.
`git worktree add FOLDER COMMIT` makes a checkout of an earlier commit for --before: its sandboxes are measured in turns
with those of this one, so that whatever else the machine does meets both.
"""

import concurrent.futures
import contextlib
import datetime
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from tables import emit

from echo_jax.tools.sandbox import Limits, Sandbox, Status

OUTPUT = flags.DEFINE_string("output", None, "also write the table to this file")
BEFORE = flags.DEFINE_string("before", None, "a checkout of an earlier commit, to compare with")
SECONDS = flags.DEFINE_float("seconds", 2.0, "duration of each measurement")
REPEATS = flags.DEFINE_integer("repeats", 5, "measurements of each cell, of which it has the median", lower_bound=1)
ROW = flags.DEFINE_string("row", None, "measure only this row, once, and print its rate alone")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "sandboxes of that row")
HERE = Path(__file__).resolve().parents[2]
LIMITS = Limits(memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)
FILES = {f"d{i % 3}/f{i}": b"one\ntwo\nthree\n" * 20 for i in range(8)} | {"f": b"line\n" * 100}


def start(_: Sandbox | None) -> None:
    with Sandbox(limits=LIMITS, files=FILES) as sandbox:
        assert sandbox.run("cat f | wc -l").head == b"100\n"


def bash(sandbox: Sandbox) -> None:
    assert sandbox.run("cat f | wc -l").head == b"100\n"


def bash_builtin(sandbox: Sandbox) -> None:
    assert sandbox.run("cd d1; export X=1").status is Status.OK


def python(sandbox: Sandbox) -> None:
    assert sandbox.run_python("len(open('/work/f').readlines())").head == b"100\n"


def read(sandbox: Sandbox) -> None:
    assert len(sandbox.read_file("f", limit=1000)) == 500


ROWS: dict[str, tuple[Callable, bool]] = {  # name -> (action, whether it needs an open sandbox)
    "episode start": (start, False),
    "bash: `cat f \\| wc -l`": (bash, True),
    "bash: `cd d1; export X=1`": (bash_builtin, True),
    "python: `len(open('/work/f').readlines())`": (python, True),
    "read a file": (read, True),
}


def rate(action: Callable, in_open_sandbox: bool, workers: int) -> float:
    """Returns how often per second `workers` threads together complete the action."""

    def work(_) -> float:
        with contextlib.ExitStack() as stack:
            sandbox = stack.enter_context(Sandbox(limits=LIMITS, files=FILES)) if in_open_sandbox else None
            action(sandbox)  # warms up: the first call starts the interpreter
            ready.wait()
            begin, done = time.monotonic(), 0
            while (now := time.monotonic()) < begin + SECONDS.value:
                action(sandbox)
                done += 1
            ready.wait()
            return done / (now - begin)

    ready = threading.Barrier(workers)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, range(workers)))


def measure(checkout: Path, name: str, workers: int) -> float:
    """Returns a rate of the sandboxes of a checkout."""
    command = [sys.executable, __file__, f"--row={name}", f"--at_once={workers}", f"--seconds={SECONDS.value}"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def cell(checkouts: Sequence[Path], name: str, workers: int) -> str:
    """Returns the median rate of the first checkout; in brackets that of the second, and their ratio."""
    rounds = [[measure(checkout, name, workers) for checkout in checkouts] for _ in range(REPEATS.value)]
    found, *others = map(statistics.median, zip(*rounds, strict=True))
    return f"{found:.0f}" + "".join(f" ({before:.0f}, {found / before:.2f})" for before in others)


def table() -> Iterator[str]:
    checkouts = [HERE]
    compared = ""
    if BEFORE.value:
        checkouts.append(Path(BEFORE.value).resolve())
        commit = subprocess.check_output(["git", "-C", BEFORE.value, "rev-parse", "--short", "HEAD"], text=True).strip()
        compared = f", measured in turns; in brackets those of commit {commit}, and the ratio"
    with Sandbox(limits=LIMITS) as sandbox:
        limits_by = sandbox.limits_by
    yield "# The sandbox: operations per second\n"
    yield (
        f"`python experiments/benchmarks/sandbox.py`, {datetime.date.today()}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}; {limits_by}. "
        f"Medians of {REPEATS.value} runs of {SECONDS.value:g} s{compared}.\n"
    )
    yield "| | 1 at once | 8 at once | 64 at once |"
    yield "|---|---|---|---|"
    for name in ROWS:
        yield f"| {name} | " + " | ".join(cell(checkouts, name, workers) for workers in (1, 8, 64)) + " |"


def main(_) -> None:
    if ROW.value:
        print(rate(*ROWS[ROW.value], AT_ONCE.value))
    else:
        emit(table(), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
