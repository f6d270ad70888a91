"""Runs in processes of their own: how tests start them, wait for them and compare what they wrote."""

import os
import subprocess
import time
from pathlib import Path

from echo_jax.system.metrics import read_metrics


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process of so many devices, which compiles as the tests do."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_NUM_CPU_DEVICES": str(devices)}


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
