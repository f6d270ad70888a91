"""A run started without standard streams, in another locale or with few open files is a run as usual."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import after_step, environment, patched, raise_signal

from configs import tiny
from echo_jax.run import build as build_lib
from echo_jax.system.errors import ConfigError
from echo_jax.system.metrics import read_metrics
from echo_jax.tools import bubblewrap
from echo_jax.tools.sandbox import Limits, Sandbox

ROOT = Path(__file__).parents[2]
FEW = ["--config=configs/tiny.py", "--config.warm_start.num_steps=4", "--config.num_steps=2"]


def shell(script: str, arguments: list[str], **more: str) -> subprocess.CompletedProcess[bytes]:
    """Runs Python with these arguments in a shell, as `script` says with PYTHON for the command."""
    line = script.replace("PYTHON", shlex.join([sys.executable, *arguments]))
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment() | more, capture_output=True, timeout=240)


@pytest.mark.variant
def test_a_run_without_standard_streams_stops_and_resumes_in_any_locale(tmp_path):
    flags = [*FEW, f"--workdir={tmp_path / 'w'}"]
    ended = shell("PYTHON <&- >&- 2>&-", patched(after_step(3, raise_signal("SIGTERM")), *flags))
    assert ended.returncode == 75
    assert [record["step"] for record in read_metrics(tmp_path / "w" / "metrics.jsonl")] == [1, 2, 3]

    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    ended = shell("ulimit -Sn 100; PYTHON", ["-m", "echo_jax.train", *flags], **ascii_only)
    assert ended.returncode == 0, ended.stderr
    assert rb"held-out solve rate 0.000 \xb1 0.000" in ended.stdout.replace(b"1.0", b"0.0")
    assert [record["step"] for record in read_metrics(tmp_path / "w" / "metrics.jsonl")] == list(range(1, 7))
    assert (tmp_path / "w" / "DONE").exists()
    again = shell("PYTHON >/dev/full 2>/dev/full", ["-m", "echo_jax.train", *flags])
    assert again.returncode == 0


def test_a_sandbox_takes_as_many_descriptors_as_the_check_counts():
    limits = Limits(memory_bytes=256 << 20, disk_bytes=16 << 20)
    with Sandbox(limits=limits):  # starts the fork server, where there is one
        before = len(os.listdir("/proc/self/fd"))
        with Sandbox(limits=limits), Sandbox(limits=limits):
            assert len(os.listdir("/proc/self/fd")) - before <= 2 * bubblewrap.DESCRIPTORS


@pytest.mark.parametrize(("groups", "most", "said"), [(64, 0, "128 sandboxes"), (64, 100, "100 sandboxes")])
def test_too_few_descriptors_are_named_before_work_starts(monkeypatch, groups, most, said):
    config = tiny.get_config()
    config.rollout.groups, config.rollout.max_sandboxes = groups, most
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 256))
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: None)
    with pytest.raises(ConfigError, match=f"^{said} are open at once .* set config.rollout.max_sandboxes to at most"):
        build_lib.build(config)
    config.rollout.max_sandboxes = 8
    build_lib.build(config)


def test_a_run_without_sandboxes_needs_no_descriptors_for_them(monkeypatch):
    config = tiny.get_config()
    config.rollout.groups, config.task.mixture, config.loss.tool_weights = 64, {"maze": 1.0}, {}
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: None)
    build_lib.build(config)
