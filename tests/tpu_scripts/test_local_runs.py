"""launch.sh --local 2 on real training: two processes, a sweep of four runs, a kill in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import comparable, environment

from echo_jax.system.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tpu_scripts" / "launch.sh"
SWEEP = """
from configs.tiny import get_config as tiny

def get_config(arg=None):
    config = tiny()
    config.update_from_flattened_dict({
        "mesh.fsdp": 0, "warm_start.num_steps": 12, "num_steps": 2, "loss.kl_weight": 0.0, "checkpoint.every": 4,
        "system.silence_seconds": 10.0,
    })
    return config

def sweep():
    for weight in (0.0, 0.05):
        for seed in (0, 1):
            yield {"loss.observation_weight": weight, "seed": seed}
"""


def launch(config: Path, workdir: Path, output: Path, *more: str) -> subprocess.Popen:
    clean = {name: value for name, value in environment(1).items() if name != "PYTHONPATH"}
    given = clean | {"PYTHON": sys.executable, "POLL_SECONDS": "0.2"}
    with output.open("ab") as file:
        return subprocess.Popen(
            [LAUNCH, "--local=2", "--sweep", f"--config={config}", f"--workdir={workdir}", *more],
            cwd=ROOT, env=given, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def processes_in(workdir: Path) -> list[int]:
    """Returns the pids of runs below a folder; launch.sh starts two processes at a time."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"echo_jax.train" in arguments and any(f"--workdir={workdir}/".encode() in a for a in arguments):
            found.append(int(path.parent.name))
    return sorted(found)


def wait_until(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_sweep_survives_a_kill_and_a_stop(tmp_path):
    """In the second run a process is killed, and launch.sh restarts the run. In the third everything is stopped, and
    the same command resumes. Each run ends like an undisturbed one."""
    config, workdir, output = tmp_path / "c.py", tmp_path / "w", tmp_path / "output"
    config.write_text(SWEEP)
    names = [f"observation_weight={weight},seed={seed}" for weight in ("0.0", "0.05") for seed in (0, 1)]
    reached = lambda name, step: any(r["step"] >= step for r in read_metrics(workdir / name / "metrics.jsonl"))  # noqa: E731

    sweep = launch(config, workdir, output)
    wait_until(lambda: reached(names[1], 6))
    os.kill(processes_in(workdir)[-1], signal.SIGKILL)
    wait_until(lambda: reached(names[2], 6))
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(120) == 130, output.read_text()
    assert not processes_in(workdir)
    assert [(workdir / name / "DONE").exists() for name in names] == [True, True, False, False]

    sweep = launch(config, workdir, output)
    assert sweep.wait(600) == 0, output.read_text()
    text = output.read_text()
    assert all((workdir / name / "DONE").exists() for name in names)
    assert text.count("done before") == 2
    log = (workdir / names[1] / "log.txt").read_text()
    assert "restart 1 of 2" in log
    assert "resuming" in (workdir / names[2] / "log.txt").read_text()

    alone = launch(config, tmp_path / "quiet", output, "--only=weight=0.0,seed=1")
    assert alone.wait(600) == 0, output.read_text()
    assert comparable(workdir / names[1]) == comparable(tmp_path / "quiet" / names[1])
