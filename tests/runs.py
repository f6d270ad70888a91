"""Runs in separate processes: starting them, waiting for them and comparing their results."""

import os
import subprocess
import time
from pathlib import Path

from echo_jax.system.metrics import read_metrics


def environment(devices: int | None = None) -> dict[str, str]:
    """Returns the environment of a process with `devices` devices that compiles as the tests do.

    By default it has as many as the tests, whatever a run's mesh takes of them: only processes with equally many
    devices share compiled programs.
    """
    if devices is None:
        return dict(os.environ)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_NUM_CPU_DEVICES": str(devices)}


def patched(patch: str, *flags: str) -> list[str]:
    """Returns Python's arguments for a training run with these flags, after executing `patch`."""
    run = f"""
import runpy, sys
sys.argv[1:] = {list(flags)!r}
runpy.run_module("echo_jax.train", run_name="__main__", alter_sys=True)
"""
    return ["-c", patch + run]


def after_step(step: int, deed: str, *, process: int = 0) -> str:
    """Returns a patch: one process executes `deed` after a step, once everything it saved is on disk."""
    return f"""
import os, signal
from echo_jax.run.trainer import Trainer
finish = Trainer._finish_step
def finish_and(self, metrics, progress):
    finish(self, metrics, progress)
    if self.step == {step} and self.peers.index == {process}:
        self.checkpointer.wait()
        {deed.strip()}
Trainer._finish_step = finish_and
"""


def raise_signal(name: str) -> str:
    """Returns code that sends a signal to its process."""
    return f"os.kill(os.getpid(), signal.{name})"


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(workdir / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def comparable(workdir: Path) -> list[dict]:
    rates = ("rollout/tokens_per_second", "train/tokens_per_second", "train/flops_per_second", "train/mfu")
    timed = ("time/", "engine/", "rollout/device_busy", *rates)  # what an engine counts depends on when tools answer
    return [
        {name: value for name, value in record.items() if not name.startswith(timed)}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]
