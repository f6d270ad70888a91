"""Several processes train one run: they compute what one process computes, and none waits for a dead one."""

import functools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from recorded_batches import MESHES, three_updates
from runs import after_step, comparable, environment, patched, raise_signal, wait_for_step
from synthetic import relative_difference

from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.models.sources import SINGLE
from echo_jax.system.metrics import read_metrics
from echo_jax.system.peers import AGAIN, PeerError, Peers, _arguments
from echo_jax.system.sharding import make_mesh
from echo_jax.tools import sandbox

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
# Enough steps to interrupt, little to compile.
SMALL = (
    "--config=configs/tiny.py", "--config.mesh.fsdp=0", "--config.warm_start.num_steps=24", "--config.num_steps=3",
    "--config.rollout.save_every=1", "--config.checkpoint.every=8", "--config.rollout.groups=3",
    "--config.system.silence_seconds=6.0", "--config.rollout.refill_tries=2",
)  # fmt: skip
PROLOGUE = "import sys, time\nfrom echo_jax.system.peers import JointError, PeerError, start\n"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(arguments: list[str], *, count: int, devices: int = 1, last: Sequence[str] = ()) -> list[subprocess.Popen]:
    """Starts `count` processes of one run with `devices` each; the last one gets the extra arguments `last`."""
    shared = environment(devices) | {"PYTHONPATH": str(ROOT)}
    address = f"localhost:{free_port()}"
    processes = []
    for index in range(count):
        peer = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, *arguments, *(last if index == count - 1 else ())]
        given = shared | (peer if count > 1 else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=given, text=True, **pipes))
    return processes


def train(workdir: Path, *more: str, count: int = 2) -> list[subprocess.Popen]:
    return start(["-m", "echo_jax.train", f"--workdir={workdir}", *SMALL, *more], count=count)


def finish(processes: list[subprocess.Popen], seconds: float = 600.0) -> tuple[list[int], list[str]]:
    """Returns each process's exit status and output; kills them all if they take longer."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [p.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], outputs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("peers") / "w"
    statuses, outputs = finish(train(workdir))
    assert statuses == [0, 0], outputs
    return workdir


# Results.


# All axes at once; what each mesh takes is two programs to compile.
FEW = ((2, 2, 2),)
SLOW = pytest.mark.slow  # whole runs of two processes, and what starts three
SHAPES = [pytest.param(shape, marks=[] if shape in FEW else pytest.mark.variant) for shape in MESHES]


@functools.cache
def recorded(folder: Path, shapes: Sequence[tuple]) -> dict[str, np.ndarray]:
    """The updates of `recorded_batches`, by two processes of four devices, started by launch.sh."""
    folder = folder / str(len(shapes))
    folder.mkdir()
    script = f"""
with start(silence_seconds=60.0, barrier_seconds=300.0) as peers:
    sys.path.append("tests")
    import recorded_batches  # it looks up the devices when imported
    recorded_batches.write({str(folder / "found.npz")!r}, peers, {shapes!r})
"""
    (folder / "script.py").write_text(PROLOGUE + script)
    python = folder / "python"  # launch.sh takes this for the interpreter, with which it would run echo_jax.train
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/script.py"\n')
    python.chmod(0o755)
    launch = [ROOT / "tpu_scripts" / "launch.sh", "--local=2", "--config=-", f"--workdir={folder}"]
    run = subprocess.run(
        launch,
        cwd=ROOT,
        env=environment(4) | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(np.load(folder / "found.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    return three_updates(make_mesh(1, 1, 1), Peers())


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=CLOSE)
    for part in ("gradient", "parameters"):
        ours, theirs = ({n: x for n, x in tree.items() if n.startswith(part)} for tree in (found, expected))
        assert len(ours) > 8
        assert relative_difference(ours, theirs) < CLOSE, part


@pytest.mark.variant  # learner/test_step.py compares one update on these meshes
@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_compute_the_updates_of_one(shape, one_device):
    close(three_updates(make_mesh(*shape), Peers()), one_device)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_with_uneven_rollouts_compute_the_updates_of_one_device(shape, folder, one_device):
    all_found = recorded(folder, FEW if shape in FEW else tuple(other for other in MESHES if other not in FEW))
    found = {name.removeprefix(f"{shape}/"): x for name, x in all_found.items() if name.startswith(f"{shape}/")}
    close(found, one_device)


@SLOW
def test_two_processes_train_as_one(uninterrupted, tmp_path):
    """Rollouts are equal too: each process has an engine, and the two share three groups unevenly."""
    statuses, outputs = finish(train(tmp_path / "w", count=1))
    assert statuses == [0], outputs
    packed_otherwise = ("pack/efficiency", "pack/slots", "policy/sampler_gap", "policy/reference")
    for two, one in zip(comparable(uninterrupted), comparable(tmp_path / "w"), strict=True):
        assert two.keys() == one.keys()
        for name in (n for n in two if not n.startswith(packed_otherwise)):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5, err_msg=f"{one['step']} {name}")
    assert len((uninterrupted / "provenance.jsonl").read_text().splitlines()) == 1
    files = sorted(path.name for path in (tmp_path / "w" / "rollouts").iterdir())
    assert files == sorted(path.name for path in (uninterrupted / "rollouts").iterdir())


# Interruptions.


class Start(NamedTuple):
    """What one start of a run of two processes came to, and what the workdir then held."""

    statuses: list[int]
    outputs: list[str]
    steps: int  # in metrics.jsonl
    saved: int  # the newest checkpoint
    rollouts: set[str]


# In the second RL step, while groups are replaced.
IN_ROLLOUTS = """
import os, signal, time
from echo_jax.rollout import collector as rollout
collect = rollout._Collection._collect
def slowly(self, i, result):
    collect(self, i, result)
    if (1 << 29) + 2 * 6 <= self._jobs[0].rollout < 1 << 30 and self._done:
        if os.environ["JAX_PROCESS_ID"] == "1" and not self._collector.stop.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
rollout._Collection._collect = slowly
"""
# But for what metrics take.
FILL_THE_DISK = """
        with open(self.workdir.parent / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(50_000)):
                    pass
            except OSError:
                filler.truncate(filler.tell() - 150_000)
"""


def on_a_small_disk(workdir: Path, patch: str) -> tuple[list[int], list[str]]:
    """Goes on with a run of two processes on a file system of 30 MB, from which its workdir comes back."""
    disk = workdir.with_name("disk")
    train_one = shlex.join([sys.executable, *patched(patch, f"--workdir={disk / 'w'}", *SMALL)])
    script = f"""
    cp -r {workdir} {disk}/w
    JAX_PROCESS_ID=1 {train_one} & other=$!
    JAX_PROCESS_ID=0 {train_one}; first=$?
    wait $other; echo "statuses $first $?"
    rm -r {disk}/filler {workdir}; cp -r {disk}/w {workdir}"""
    small = ["--dev-bind", "/", "/", "--size", "30000000", "--tmpfs", str(disk)]
    others = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [str(sandbox.probe()), *small, "sh", "-c", script],
        cwd=ROOT, env=environment(1) | others, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    statuses = re.search(r"statuses (\d+) (\d+)", run.stdout)
    assert statuses, run.stdout + run.stderr
    return [int(status) for status in statuses.groups()], [run.stdout, run.stderr]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[dict[str, Start], Path]:
    """What each start of a run of two processes came to, and its workdir: it was interrupted in every way, one after
    the other, and then ended."""
    workdir = tmp_path_factory.mktemp("interrupted") / "w"
    starts = {}

    def started(name: str, statuses: list[int], outputs: list[str]) -> None:
        records = read_metrics(workdir / "metrics.jsonl")
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            saved = checkpointer.latest_step()
        rollouts = {path.name for path in (workdir / "rollouts").iterdir()}
        starts[name] = Start(statuses, outputs, records[-1]["step"], saved, rollouts)

    def patched_by(patch: str) -> tuple[list[int], list[str]]:
        return finish(start(patched(patch, f"--workdir={workdir}", *SMALL), count=2))

    started("SIGTERM to 1", *patched_by(after_step(11, raise_signal("SIGTERM"), process=1)))
    started("SIGKILL to 1", *patched_by(after_step(14, raise_signal("SIGKILL"), process=1)))
    started("full disk", *on_a_small_disk(workdir, after_step(17, FILL_THE_DISK)))
    started("SIGTERM in rollouts", *patched_by(IN_ROLLOUTS))
    started("to the end", *finish(train(workdir)))
    return starts, workdir


@SLOW
def test_a_run_that_was_interrupted_in_every_way_is_as_if_nothing_had_happened(interrupted, uninterrupted):
    starts, workdir = interrupted
    assert starts["to the end"].statuses == [0, 0], starts["to the end"].outputs
    first, *others = starts.values()
    assert "resuming" not in first.outputs[0]
    assert all("resuming" in start.outputs[0] for start in others)
    assert comparable(workdir) == comparable(uninterrupted)


@SLOW
def test_sigterm_to_one_of_two_saves_and_stops_both(interrupted):
    stopped = interrupted[0]["SIGTERM to 1"]
    assert stopped.statuses == [AGAIN, AGAIN], stopped.outputs
    assert 11 <= stopped.steps == stopped.saved < 14


@SLOW
def test_survivor_names_a_killed_process_and_stops(interrupted):
    stopped = interrupted[0]["SIGKILL to 1"]
    assert stopped.statuses == [AGAIN, -signal.SIGKILL], stopped.outputs
    assert f"process 1 of 2 on {socket.gethostname()} sent no heartbeat for 6 s" in stopped.outputs[0]
    assert "run the same command again to resume" in stopped.outputs[0]


def ended_without_process_0(statuses: list[int], outputs: list[str]) -> bool:
    assert statuses[0] == -signal.SIGKILL, outputs
    assert statuses[1] in (AGAIN, -signal.SIGABRT)
    return "process 0" in outputs[1] or "another task died" in outputs[1]


def test_without_process_0_the_other_ends_too():
    statuses, outputs = two_that_run("""
import os, signal
with start(silence_seconds=6.0, barrier_seconds=60.0) as peers:
    peers.gather(1)
    if peers.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    peers.gather(2)
""")
    assert ended_without_process_0(statuses, outputs)


@pytest.mark.variant
def test_without_process_0_the_other_ends_its_training(tmp_path):
    patch = after_step(2, raise_signal("SIGKILL"), process=0)
    processes = start(patched(patch, f"--workdir={tmp_path / 'w'}", *SMALL), count=2)
    assert ended_without_process_0(*finish(processes))


@SLOW
def test_a_full_disk_during_a_save_stops_both_with_advice(interrupted):
    stopped = interrupted[0]["full disk"]
    said, errors = stopped.outputs
    assert set(stopped.statuses) <= {1, AGAIN}
    assert 1 in stopped.statuses, said + errors
    assert "no space left on the disk" in errors
    assert "resumes from step 16" in errors
    assert stopped.saved == 16


@SLOW
def test_stop_during_the_rollouts_of_one_keeps_those_of_both(interrupted):
    """It happens in the second RL step; the other process, between two of its rollouts, is told."""
    stopped, ended = (interrupted[0][name] for name in ("SIGTERM in rollouts", "to the end"))
    assert stopped.statuses == [AGAIN, AGAIN], stopped.outputs
    assert stopped.saved == 25
    assert "interrupted_000025.jsonl.gz" in stopped.rollouts
    assert "interrupted_000025.jsonl.gz" not in ended.rollouts


@SLOW
@pytest.mark.parametrize("what", ["--samples=2", "--trajectories=rollouts/step_000026.jsonl.gz"])
def test_two_processes_evaluate_as_one(what, uninterrupted):
    name, value = what.split("=")
    value = str(uninterrupted / value) if name == "--trajectories" else value
    arguments = ["-m", "echo_jax.evaluate", f"--workdir={uninterrupted}", *SMALL, "--episodes=3", f"{name}={value}"]
    found = []
    for count in (2, 1):
        statuses, outputs = finish(start(arguments, count=count))
        assert statuses == [0] * count, outputs
        found.append(json.loads(next(line for line in outputs[0].splitlines() if line.startswith("{"))))
        assert all("{" not in output for output in outputs[1:])
    two, one = found
    assert two.keys() == one.keys()
    for key in one:
        assert two[key] == (one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-4, abs=1e-6)), key


@SLOW
def test_two_processes_export_as_one(uninterrupted, tmp_path):
    files = []
    for count in (2, 1):
        output = tmp_path / str(count)
        arguments = ["-m", "echo_jax.export", f"--workdir={uninterrupted}", *SMALL, f"--output={output}"]
        statuses, outputs = finish(start(arguments, count=count))
        assert statuses == [0] * count, outputs
        assert f" to {output}" in outputs[0]
        assert all(str(output) not in text for text in outputs[1:])
        files.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert files[0] == files[1]
    assert SINGLE in files[0]


@SLOW
def test_run_resumes_with_a_different_number_of_processes(uninterrupted, tmp_path):
    """It uses recorded rollouts, so that only rounding can differ, and no KL, which is pure rounding at first."""
    recorded = uninterrupted / "rollouts" / "step_000025.jsonl.gz"
    replay = (
        f"--config.rollout.replay={recorded}", "--config.warm_start.num_steps=0", "--config.num_steps=9",
        "--config.optimizer.learning_rate=1e-2", "--config.loss.kl_weight=0.0", "--config.checkpoint.every=3",
        "--config.rollout.refill_tries=0",
    )  # fmt: skip
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    statuses, outputs = finish(train(whole, *replay, count=1))
    assert statuses == [0], outputs
    processes = train(moved, *replay)
    wait_for_step(moved, 4, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes, 60)[0] == [AGAIN, AGAIN]
    statuses, outputs = finish(train(moved, *replay, "--config.pack.rows=4", count=1))
    assert statuses == [0], outputs
    assert "resuming" in outputs[0]
    for ours, theirs in zip(comparable(moved), comparable(whole), strict=True):
        for name in ("loss/total", "train/gradient_norm", "observation/ce"):
            if name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=CLOSE, err_msg=f"{ours['step']} {name}")


# Messages.


def two_that_run(script: str) -> tuple[list[int], list[str]]:
    return finish(start(["-c", PROLOGUE + script], count=2), 60)


def test_an_error_that_one_can_fix_ends_all_processes_at_the_same_place():
    statuses, outputs = two_that_run("""
from echo_jax.system.errors import ConfigError
with start(silence_seconds=30.0, barrier_seconds=30.0) as peers:
    try:
        with peers.failing_together():
            if not peers.is_first:
                raise ConfigError("oak is no tree")
        peers.gather(1)
    except JointError as error:
        print("saved:", error)
        peers.gather(2)
        raise
""")
    assert statuses == [1, 1], outputs
    assert all("saved: oak is no tree" in output for output in outputs)


def test_late_process_is_named():
    statuses, outputs = two_that_run("""
with start(silence_seconds=30.0, barrier_seconds=2.0) as peers:
    if not peers.is_first:
        time.sleep(30)
    peers.gather(1, "lunch")
""")
    assert statuses == [1, 1], outputs
    late = f"process 1 of 2 on {socket.gethostname()} did not reach 'lunch' within system.barrier_seconds = 2"
    assert f"error: {late}" in outputs[0]
    assert late in outputs[1]  # process 1 is told why


@SLOW
def test_failed_process_keeps_its_exit_status_when_others_leave():
    """Process 0 fails and waits for two others to leave. One hangs; the other leaves, which changes nothing."""
    script = """
import os, signal
with start(silence_seconds=5.0, barrier_seconds=60.0) as peers:
    if peers.index == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if peers.is_first:
        raise PeerError("lunch is cancelled")
    peers.gather(1)
"""
    *ending, hung = start(["-c", PROLOGUE + script], count=3)
    try:
        statuses, outputs = finish(ending, 60)
    finally:
        hung.kill()
        hung.communicate()
    assert statuses == [1, 1], outputs
    assert outputs[0].count("error: ") == 1
    assert "lunch is cancelled" in outputs[1]


def test_hanging_process_0_is_named_and_not_waited_for():
    """Its connection stays open but unanswered, like that of a machine that lost its network."""
    script = """
import os, signal
with start(silence_seconds=3.0, barrier_seconds=60.0) as peers:
    peers.gather(0)  # then both watch
    if peers.is_first:
        os.kill(os.getpid(), signal.SIGSTOP)
    peers.gather(1)
"""
    hung, other = start(["-c", PROLOGUE + script], count=2)
    try:
        output = other.communicate(timeout=40)[0]
    finally:
        hung.kill()
        hung.communicate()
    assert other.returncode == AGAIN, output
    assert f"process 0 of 2 on {socket.gethostname()} has not answered for 3 s" in output


def test_lost_message_is_not_a_lost_process():
    statuses, outputs = two_that_run("""
with start(silence_seconds=3.0, barrier_seconds=60.0) as peers:
    say, failures = peers._say, []
    def failing(*arguments):
        if len(failures) < 3:
            failures.append(arguments)
            raise RuntimeError("UNAVAILABLE: a blip")
        say(*arguments)
    peers._say = failing
    time.sleep(5)
    peers.gather(1)
    assert len(failures) == 3
""")
    assert statuses == [0, 0], outputs


@pytest.mark.variant  # of a process that is late
def test_process_whose_watch_ended_is_not_taken_for_dead():
    """One process's watch is in the middle of a round when all are done."""
    statuses, outputs = two_that_run("""
with start(silence_seconds=30.0, barrier_seconds=60.0) as peers:
    say = peers._say
    def slowly(*arguments):
        say(*arguments)
        time.sleep(1)
    peers._say = slowly
    time.sleep(4)
""")
    assert statuses == [0, 0], outputs


def test_process_gives_up_if_the_others_never_start(monkeypatch):
    for name, value in (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}).items():
        monkeypatch.setenv(name, value)
    script = PROLOGUE + "start(silence_seconds=30.0, barrier_seconds=2.0)"
    statuses, outputs = finish(start(["-c", script], count=1), 30)
    assert statuses == [AGAIN], outputs
    assert "error: after 2 s this process" in outputs[0]
    assert "num_processes 2, process_id 1" in outputs[0]


def test_an_error_of_one_process_reaches_the_others():
    statuses, outputs = two_that_run("""
with start(silence_seconds=30.0, barrier_seconds=30.0) as peers:
    if not peers.is_first:
        raise OSError("the disk is wet")
    peers.gather(1)
""")
    assert statuses == [1, 1], outputs
    assert "error: the disk is wet\n" in outputs[1]
    assert f"process 1 of 2 on {socket.gethostname()} failed: the disk is wet" in outputs[0]
    assert "to resume" not in outputs[0]  # the same command would fail again
    assert "Traceback" not in "".join(outputs)


def test_gather_returns_all_values_in_order():
    statuses, outputs = two_that_run("""
with start(silence_seconds=30.0, barrier_seconds=30.0) as peers:
    for round in range(5):
        assert peers.gather({"of": [peers.index, round]}) == [{"of": [0, round]}, {"of": [1, round]}]
    assert peers.join(["a"] * (1 + peers.index)) == ["a", "a", "a"]
    assert peers.first(lambda: peers.index) == 0
    peers.same({"x": 1}, "")
""")
    assert statuses == [0, 0], outputs


def test_processes_with_different_configs_do_not_start(tmp_path):
    shared = ["-m", "echo_jax.train", f"--workdir={tmp_path / 'w'}", *SMALL]
    statuses, outputs = finish(start(shared, count=2, last=["--config.seed=7"]), 90)
    assert statuses == [1, 1], outputs
    assert "process 1 of 2" in outputs[0]
    assert "has config.seed = '7'" in outputs[0]
    assert not (tmp_path / "w").exists()


def test_single_process_is_unaffected():
    with Peers() as alone:
        assert (alone.gather({1: 2}), alone.first(lambda: "x"), alone.join([1])) == ([{1: 2}], "x", [1])
    with pytest.raises(KeyError), Peers():
        raise KeyError


STEP = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"ECHO_JAX_CLUSTER": "auto"}, {}),
        ({"ECHO_JAX_CLUSTER": "gcetpu"}, {"cluster_detection_method": "gcetpu"}),
        (STEP | {"SLURM_NTASKS": "2"}, {"cluster_detection_method": "slurm"}),
        (STEP | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # a batch script
    ],
)
def test_environment_determines_the_peers(environment, arguments):
    assert _arguments(environment) == arguments


def test_explicit_environment_takes_precedence():
    known = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert _arguments(EXPLICIT | STEP) == known | {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES = ''"),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID = 'one'"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID = 2: it must be less than JAX_NUM_PROCESSES = 2"),
    ],
)
def test_an_incomplete_environment_is_an_error(environment, message):
    with pytest.raises(PeerError, match=re.escape(message)):
        _arguments(EXPLICIT | environment)
