"""Runs in processes of their own: how tests wait for them and compare what they wrote."""

import subprocess
import time
from pathlib import Path

from echo_jax.system.metrics import read_metrics


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(workdir / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def comparable(workdir: Path) -> list[dict]:
    timed = ("time/", "rollout/tokens_per_second", "train/tokens_per_second", "train/flops_per_second", "train/mfu")
    return [
        {name: value for name, value in record.items() if not name.startswith(timed)}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]
