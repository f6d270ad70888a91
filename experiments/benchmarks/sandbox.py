"""Measures sandbox starts and calls per second, with all limits on.

    python experiments/benchmarks/sandbox.py [--output=experiments/benchmarks/sandbox.md]

A start is that of one episode: open a sandbox with files, run a first command, close it. A call is one more command in
an open sandbox. Each row is measured with several sandboxes at once, each driven by one thread.
"""

import concurrent.futures
import contextlib
import datetime
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags

from echo_jax.tools.sandbox import Limits, Sandbox, Status

OUTPUT = flags.DEFINE_string("output", None, "also write the table to this file")
SECONDS = flags.DEFINE_float("seconds", 5.0, "duration of each measurement")
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


def table() -> Iterator[str]:
    with Sandbox(limits=LIMITS) as sandbox:
        limits_by = sandbox.limits_by
    yield "# The sandbox: operations per second\n"
    yield (
        f"`python experiments/benchmarks/sandbox.py`, {datetime.date.today()}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}; {limits_by}.\n"
    )
    yield "| | 1 at once | 8 at once | 64 at once |"
    yield "|---|---|---|---|"
    for name, (action, in_open_sandbox) in ROWS.items():
        rates = (rate(action, in_open_sandbox, workers) for workers in (1, 8, 64))
        yield f"| {name} | " + " | ".join(f"{found:.0f}" for found in rates) + " |"


def main(_) -> None:
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
