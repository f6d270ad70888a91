"""The whole system on configs/tiny.py: real tools, real rollouts, real updates."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import after_step, comparable, environment, patched, raise_signal, wait_for_step

from configs import tiny
from echo_jax import config as config_lib
from echo_jax.config import ConfigError
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError
from echo_jax.render.calls import MALFORMED
from echo_jax.roles import ENVIRONMENT_CLASSES, Role
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.collector import Collector, Job
from echo_jax.run import build as build_lib
from echo_jax.run import lifecycle
from echo_jax.run import workdir as workdir_lib
from echo_jax.run.build import build
from echo_jax.system import metric_table
from echo_jax.system.errors import UserError
from echo_jax.system.metrics import read_metrics
from echo_jax.system.peers import Peers
from echo_jax.tools import TOOLS, bubblewrap, sandbox

ROOT = Path(__file__).parents[2]


def command(program: str, workdir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"echo_jax.{program}", "--config=configs/tiny.py", f"--workdir={workdir}", *arguments]


def start(workdir: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command("train", workdir, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


def final_state(workdir: Path):
    abstract = build(tiny.get_config()).learner.abstract_state()
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return jax.device_get(checkpointer.restore(abstract)[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "uninterrupted"
    status, output = finish(start(workdir, "--config.system.profile_steps=(2, 2)"))
    assert status == 0, output
    (workdir.parent / "printed").write_text(output)
    return workdir


def test_evaluations_are_lines_of_their_own(finished):
    printed = (finished.parent / "printed").read_text()
    by_step = {record["step"]: record for record in read_metrics(finished / "metrics.jsonl")}
    for step in (30, 34):
        rate, ce = by_step[step]["eval/solve_rate"], by_step[step]["eval/observation_ce"]
        assert re.search(
            rf"^step {step}: held-out solve rate {rate:.3f} ± .*, observation CE {ce:.3f} nats$", printed, re.MULTILINE
        )
    assert re.search(r"^ECHO  4/4  .*  solve rate [0-9.]+  .*loss ", printed, re.MULTILINE)


def test_run_leaves_the_files_that_the_readme_lists(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json",
        "provenance.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "rollouts",
        "checkpoints",
        "DONE",
    } <= names
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 35))
    assert {"eval/solve_rate", "eval/observation_ce"} <= records[29].keys() & records[-1].keys()
    assert {"policy/loss", "loss/total", "rollout/solve_rate", "pack/efficiency", "policy/sampler_gap"} <= records[
        -1
    ].keys()
    assert all(record["policy/sampler_gap_max"] < 1e-4 for record in records[30:])
    assert records[-1]["train/gradient_norm"] > 0
    # The KL is to the policy that RL started from.
    assert records[30]["policy/reference_kl"] == pytest.approx(0.0, abs=1e-9)
    assert records[-1]["policy/reference_kl"] > 1e-7


IN_THE_EVALUATION = """
import os, signal
from echo_jax.run import evaluator
call = evaluator.Evaluator.__call__
def interrupted(self, *arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return call(self, *arguments, **options)
evaluator.Evaluator.__call__ = interrupted
"""
# In the first RL step, once two rollouts are finished; later ones do not count.
IN_THE_ROLLOUTS = """
import os, signal
from echo_jax.rollout import collector
collect = collector._Collection._collect
def stopped(self, i, result):
    if self._collector.stop.is_set():
        return
    collect(self, i, result)
    if len(self._done) == 2 and self._jobs[0].group == 0 and self._jobs[0].rollout < 1 << 30:
        os.kill(os.getpid(), signal.SIGINT)
collector._Collection._collect = stopped
"""


class Start(NamedTuple):
    """The result of one start of a run, and the state of the workdir afterwards."""

    status: int
    output: str
    steps: int  # in metrics.jsonl
    done: bool
    kept: int | None  # rollouts of an interrupted step, if there are any


def begun(workdir: Path, patch: str = "", *flags: str) -> Start:
    """Starts a run, with a patch applied, and waits for its end."""
    run = subprocess.run(
        [sys.executable, *patched(patch, "--config=configs/tiny.py", f"--workdir={workdir}", *flags)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    steps, done = read_metrics(workdir / "metrics.jsonl")[-1]["step"], (workdir / "DONE").exists()
    kept = workdir / "rollouts" / "interrupted_000030.jsonl.gz"
    vocab_size = build(tiny.get_config()).learner.vocab_size
    count = len(trajectory_lib.load(kept, vocab_size=vocab_size)) if kept.exists() else None
    return Start(run.returncode, run.stdout, steps, done, count)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[dict[str, Start], Path]:
    """Returns the result of each start of a run, interrupted repeatedly and then completed, and its workdir."""
    workdir = tmp_path_factory.mktemp("run") / "interrupted"
    shorter = "--config.num_steps=2"  # than the last start wants
    return {
        "killed": begun(workdir, after_step(13, raise_signal("SIGKILL")), shorter),  # three steps after a checkpoint
        "in the rollouts": begun(workdir, IN_THE_ROLLOUTS, shorter),
        "to the end": begun(workdir),
    }, workdir


def test_killed_and_interrupted_equals_uninterrupted_bit_for_bit(finished, interrupted):
    starts, workdir = interrupted
    assert starts["killed"].status == -signal.SIGKILL, starts["killed"].output
    assert starts["to the end"].status == 0, starts["to the end"].output
    assert all("resuming" in start.output for start in list(starts.values())[1:])
    assert [start.done for start in starts.values()] == [False] * 2 + [True]
    assert comparable(workdir) == comparable(finished)
    for own, expected in zip(
        jax.tree.leaves(final_state(workdir)), jax.tree.leaves(final_state(finished)), strict=True
    ):
        np.testing.assert_array_equal(own, expected)


# Every tool call and every start of a sandbox takes a random time, so that sessions come and go in another order.
SLOW_TOOLS = """
import random, time
from echo_jax.rollout.world import EpisodeWorld
for name in ("open", "run"):
    def slow(self, *arguments, method=getattr(EpisodeWorld, name)):
        time.sleep(random.uniform(0.0, 0.4))
        return method(self, *arguments)
    setattr(EpisodeWorld, name, slow)
"""


@pytest.mark.variant
def test_random_delays_of_tools_change_no_bit_of_a_run(finished, tmp_path):
    delayed = begun(tmp_path / "w", SLOW_TOOLS)
    assert delayed.status == 0, delayed.output
    assert comparable(tmp_path / "w") == comparable(finished)
    for own, expected in zip(
        jax.tree.leaves(final_state(tmp_path / "w")), jax.tree.leaves(final_state(finished)), strict=True
    ):
        np.testing.assert_array_equal(own, expected)


def test_ctrl_c_stops_a_run_and_prints_how_to_resume(interrupted):
    stopped = interrupted[0]["in the rollouts"]
    assert stopped.status == 130, stopped.output
    assert "run the same command again to resume from step 30" in stopped.output
    assert "Traceback" not in stopped.output


@pytest.mark.slow
def test_an_extended_run_equals_one_of_that_length_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "w"
    assert begun(workdir, "", "--config.num_steps=2").done
    assert (workdir / "DONE").read_text() == "32 steps\n"
    assert begun(workdir, "", "--config.eval.every=1").status == 0
    assert (workdir / "DONE").read_text() == "34 steps\n"
    for ours, theirs in zip(comparable(workdir), comparable(finished), strict=True):
        assert theirs.items() <= ours.items()  # ours has more evaluations
    for own, expected in zip(
        jax.tree.leaves(final_state(workdir)), jax.tree.leaves(final_state(finished)), strict=True
    ):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.slow
def test_a_run_from_anothers_warm_start_has_the_lines_of_one_that_made_it_itself(finished, tmp_path):
    started = begun(tmp_path / "w", "", f"--config.init_from={finished}:30")
    assert started.status == 0, started.output
    assert f"at step 30 of 34, from {finished}:30" in started.output
    assert comparable(tmp_path / "w")[1:] == comparable(finished)[30:]
    first, theirs = comparable(tmp_path / "w")[0], comparable(finished)[29]
    assert first["step"] == 30
    assert first.items() <= theirs.items()  # of the warm start's end only the evaluation is made again
    for own, expected in zip(
        jax.tree.leaves(final_state(tmp_path / "w")), jax.tree.leaves(final_state(finished)), strict=True
    ):
        np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warm_start.batch": 4}, "warm_start.batch: that run has 8, this config 4"),
        ({"model.num_layers": 3}, "model.num_layers: that run has 2, this config 3"),
        (
            {"num_steps": 2},
            "its checkpoint is of step 34, but this run has a warm start of 30 steps and ends at step 32",
        ),
        ({"num_steps": 9, "rollout.groups": 3}, "other rollout.groups"),
        ({"num_steps": 9, "optimizer.schedule": "linear", "optimizer.warmup_steps": 1}, "set optimizer.schedule_steps"),
        ({"init_from": "STEP 99"}, r"no such checkpoint; .* has steps \[.*30, 34\]"),
        ({"init_from": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_a_run_that_cannot_start_from_another_says_why(finished, tmp_path, fields, message):
    config = tiny.get_config()
    config.init_from = str(finished)
    config.update_from_flattened_dict(fields)
    config.init_from = config.init_from.replace("STEP ", f"{finished}:")
    with pytest.raises(UserError, match=message):
        lifecycle.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()  # so that the corrected command can start


def test_a_run_under_nohup_goes_on_after_a_hang_up():
    stopping = types.SimpleNamespace(stop=threading.Event())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with lifecycle.stop_on_signal(stopping, Peers()) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert (received, stopping.stop.is_set()) == ([], False)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("minutes", "seconds", "due"), [(1.0, 59, False), (1.0, 61, True), (0.0, 1e6, False)])
def test_a_checkpoint_is_due_when_its_minutes_are_over(minutes, seconds, due):
    config = tiny.get_config()
    config.checkpoint.minutes = minutes
    run = types.SimpleNamespace(config=config, peers=Peers(), saved_time=time.monotonic() - seconds)
    assert lifecycle.Trainer._minutes_are_over(run) == due


@pytest.mark.slow
@pytest.mark.parametrize("pipe", ["", "2>&1 | tee printed"])
def test_closing_the_terminal_saves_and_stops(tmp_path, pipe):
    """A run in an interactive shell: it gets a SIGHUP from the kernel and one from the shell, and `tee` is gone."""
    controller, terminal = os.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    shell = subprocess.Popen(["setsid", "--ctty", "bash", "--norc", "-i"], cwd=ROOT, env=environment(), **streams)
    os.close(terminal)
    workdir = tmp_path / "w"
    run = shlex.join(command("train", workdir, "--config.checkpoint.every=1000", "--config.warm_start.num_steps=300"))
    os.write(controller, f"{run} {pipe.replace('printed', str(tmp_path / 'printed'))}\n".encode())
    output = b""
    while not any(record["step"] >= 12 for record in read_metrics(workdir / "metrics.jsonl")):
        assert shell.poll() is None, output.decode()
        if select.select([controller], [], [], 0.02)[0]:
            output += os.read(controller, 4096)
    os.close(controller)
    shell.wait(timeout=60)
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", str(workdir)], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    last = read_metrics(workdir / "metrics.jsonl")[-1]["step"]
    assert 12 <= last < 300
    assert (workdir / "checkpoints" / str(last)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_run_that_nobody_reads_saves_too(tmp_path, name):
    with subprocess.Popen(
        command("train", tmp_path / "w", "--config.checkpoint.every=1000", "--config.warm_start.num_steps=300"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        wait_for_step(tmp_path / "w", 12, process)
        process.stdout.close()
        process.send_signal(getattr(signal, name))
        process.wait(timeout=60)
    last = read_metrics(tmp_path / "w" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "w" / "checkpoints" / str(last)).exists()


@pytest.mark.slow
def test_an_interruption_inside_an_evaluation_loses_nothing(finished, tmp_path):
    """The step is done but its metrics are not written, so it is repeated from the previous checkpoint."""
    workdir = tmp_path / "w"
    stopped = begun(workdir, IN_THE_EVALUATION)
    assert stopped.status == 75, stopped.output
    assert "resume from step 20" in stopped.output
    assert stopped.steps == 29
    assert begun(workdir).status == 0
    assert comparable(workdir) == comparable(finished)


def test_rollouts_finished_before_a_stop_are_kept_and_used(interrupted):
    assert interrupted[0]["in the rollouts"].kept >= 2
    assert interrupted[0]["to the end"].kept is None


@pytest.mark.slow
def test_killed_at_ten_random_moments_equals_uninterrupted_bit_for_bit(tmp_path):
    """In any phase: starting, compiling, demonstrations, warm start, RL, saving, an evaluation."""
    fields = {"num_steps": 60, "warm_start.num_steps": 40, "eval.every": 10, "checkpoint.every": 3}
    longer = [f"--config.{name}={value}" for name, value in fields.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    first = start(whole, *longer)
    wait_for_step(whole, 1, first)
    startup = time.monotonic() - begin
    status, output = finish(first)
    assert status == 0, output
    step_seconds = (time.monotonic() - begin - startup) / 99
    # Spread over the run, so that each start gets somewhere on a machine of any speed.
    random = np.random.default_rng()
    steps = [0, 0, 0, *(11 * i + int(random.integers(8)) for i in range(1, 8))]
    print("killed after steps", steps)
    for step in steps:
        process = start(killed, *longer)
        if step == 0:
            time.sleep(random.uniform(0.1, 1.0) * startup)
        else:
            wait_for_step(killed, step, process)
            time.sleep(random.uniform(0.0, 1.5) * step_seconds)
        process.kill()
        assert "Traceback" not in finish(process)[1]
    assert not (killed / "DONE").exists()
    status, output = finish(start(killed, *longer))
    assert status == 0, output
    assert comparable(killed) == comparable(whole)
    states = [jax.tree.leaves(final_state(workdir)) for workdir in (killed, whole)]
    for own, expected in zip(*states, strict=True):
        np.testing.assert_array_equal(own, expected)


def started_here(capfd, workdir: Path, config=None, **options) -> tuple[int, str]:
    """Starts a run in this process, which is quick if it ends before any work."""
    status = lifecycle.train(config or tiny.get_config(), workdir, **options)
    return status, "".join(capfd.readouterr())


def test_finished_run_is_not_run_again(finished, capfd):
    before = (finished / "metrics.jsonl").read_bytes()
    config = tiny.get_config()
    config.system.profile_steps = (2, 2)
    status, output = started_here(capfd, finished, config)
    assert status == 0
    assert "complete" in output
    assert output.count("held-out solve rate") == 2
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_workdir_of_another_config_is_refused_and_left_alone(finished):
    before = (finished / "config.json").read_bytes()
    config = tiny.get_config()
    config.loss.observation_weight = 0.7
    with pytest.raises(ConfigError) as refused:
        lifecycle.train(config, finished)
    assert "loss.observation_weight: the run has 0.05, this config 0.7" in str(refused.value)
    assert "another --workdir" in str(refused.value)
    assert (finished / "config.json").read_bytes() == before


def test_misspelt_field_gives_one_line_with_a_suggestion(tmp_path):
    status, output = finish(start(tmp_path / "w", "--config.loss.observation_wieght=1"))
    assert status == 1
    assert 'Did you mean "observation_weight"' in output
    assert "Traceback" not in output
    assert not (tmp_path / "w").exists()


def test_misspelt_override_of_an_evaluation_gives_one_line_with_a_suggestion(finished):
    run = evaluate(finished, "--config.rollout.temprature=0.5")
    assert run.returncode == 1
    assert 'Did you mean "temperature"' in run.stderr
    assert "Traceback" not in run.stderr


def test_evaluate_prints_one_line_of_json(finished):
    run = evaluate(finished, "--episodes=3", "--samples=2", "--config.rollout.temperature=0.5")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["step"] == 34
    kept = json.loads((finished / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept.pop("overrides") == {"rollout.temperature": 0.5}
    assert kept.pop("time")
    assert kept == result
    assert {
        "eval/solve_rate",
        "eval/pass@1",
        "eval/pass@2",
        "eval/pass@2_stderr",
        "eval/observation_ce",
    } <= result.keys()
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert result["eval/observation_ce"] == pytest.approx(last["eval/observation_ce"], rel=1e-6)


def evaluate(workdir, *arguments):
    evaluation = [sys.executable, "-m", "echo_jax.evaluate", f"--workdir={workdir}", *arguments]
    return subprocess.run(evaluation, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


def test_saved_rollouts_are_scored_per_class_and_tool_with_their_control(finished, tmp_path):
    vocab_size = build(tiny.get_config()).learner.vocab_size
    rollouts = finished / "rollouts"
    mixed = [
        trajectory
        for name in ("demonstrations", "heldout_transcripts")
        for trajectory in trajectory_lib.load(rollouts / f"{name}.jsonl.gz", vocab_size=vocab_size)
    ]
    trajectory_lib.save(tmp_path / "mixed.jsonl.gz", mixed, vocab_size=vocab_size)
    run = evaluate(finished, f"--trajectories={tmp_path / 'mixed.jsonl.gz'}")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["step"], result["count"]) == (34, len(mixed))
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert result["eval/observation_ce_heldout"] == pytest.approx(last["eval/observation_ce"], rel=1e-5)
    gap = result["eval/observation_ce_heldout"] - result["eval/observation_ce_train"]
    assert result["eval/observation_ce_gap"] == pytest.approx(gap)
    assert result["eval/observation_ce_shuffled"] != result["eval/observation_ce"]
    assert result["eval/observation_ce_tool_bash"] == pytest.approx(result["eval/observation_ce"])
    assert 0 <= result["eval/observation_accuracy"] <= 1
    assert result["eval/observation_tokens"] == sum(t.count(Role.OBSERVATION) for t in mixed)


def test_saved_rollouts_can_be_viewed(finished):
    rollouts = finished / "rollouts" / "step_000034.jsonl.gz"
    saved = trajectory_lib.load(rollouts, vocab_size=build(tiny.get_config()).learner.vocab_size)
    view = [sys.executable, "-m", "echo_jax.view", f"--trajectories={rollouts}"]
    run = subprocess.run([*view, f"--rollout={saved[2].rollout}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert f"{len(saved)} rollouts" in run.stdout
    assert saved[2].task in run.stdout
    assert "| <|task|>" in run.stdout
    assert run.stdout.count(" · reward ") == 1
    none = subprocess.run([*view, "--rollout=7"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (none.returncode, "no rollout 7" in none.stderr) == (1, True)


def test_a_finished_run_is_extended_and_config_json_follows(tmp_path):
    config = tiny.get_config()
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "_run", lambda parts, workdir: asked.append((workdir / "DONE").exists()) or 0)
        for num_steps in (4, 4, 6):
            config.num_steps = num_steps
            (tmp_path / "w").mkdir(exist_ok=True)
            (tmp_path / "w" / "metrics.jsonl").touch()
            assert lifecycle.train(config, tmp_path / "w") == 0
        assert asked == [False, False]  # the second start found it complete
        assert json.loads((tmp_path / "w" / "config.json").read_text())["num_steps"] == 6
        config.num_steps = 5
        with pytest.raises(ConfigError, match=r"num_steps: the run has 6, this config 5\nIt has made 6 RL steps"):
            lifecycle.train(config, tmp_path / "w")
    assert (tmp_path / "w" / "DONE").read_text() == "36 steps\n"


def test_steps_are_profiled_as_configured(finished):
    assert list((finished / "profile").rglob("*.xplane.pb"))


def test_compiled_programs_are_cached_where_the_config_says(tmp_path):
    config = tiny.get_config()
    config.system.compilation_cache = str(tmp_path / "cache")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    compilation_cache.reset_cache()  # the tests' cache, which is in use
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lifecycle, "_run", lambda *_: jax.jit(lambda x: x + 1)(jax.numpy.ones(3)).size)
            assert lifecycle.train(config, tmp_path / "w") == 3
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()
    assert any((tmp_path / "cache").iterdir())


@pytest.fixture(scope="module")
def replayed(finished, tmp_path_factory) -> tuple[Path, list[dict], list]:
    """Of a short run that imitates saved demonstrations and replays two saved groups, six at a time: its workdir,
    its metrics and the jobs that were sampled nevertheless."""
    config = tiny.get_config()
    config.warm_start.num_steps = 2
    config.num_steps = 2
    config.warm_start.update(trajectories=str(finished / "rollouts" / "demonstrations.jsonl.gz"), min_reward=1.0)
    config.rollout.update(replay=str(finished / "rollouts" / "step_000034.jsonl.gz"), groups=6)
    config.checkpoint.minutes = 1e-9
    config.rollout.keep = 1
    workdir = tmp_path_factory.mktemp("replayed") / "w"
    sampled = []
    with pytest.MonkeyPatch.context() as patch:
        original = Collector.rollouts
        patch.setattr(
            Collector, "rollouts", lambda self, jobs, *a, **k: sampled.append(jobs) or original(self, jobs, *a, **k)
        )
        assert lifecycle.train(config, workdir) == 0
    return workdir, read_metrics(workdir / "metrics.jsonl"), sampled


def test_saved_rollouts_can_be_trained_on_off_policy(finished, replayed):
    _, records, sampled = replayed
    path = finished / "rollouts" / "step_000034.jsonl.gz"
    saved = trajectory_lib.load(path, vocab_size=build(tiny.get_config()).learner.vocab_size)
    assert len(sampled) == 2  # only the two evaluations
    for record in records[2:]:
        assert record["rollout/tokens"] == pytest.approx(np.mean([len(t.ids) for t in saved]))
        assert record["policy/sampler_gap"] > 1e-3  # another policy wrote them
        assert record["train/flops_per_second"] > 0


def test_a_checkpoint_comes_after_some_minutes(replayed):
    """The others are due after the warm start, at step 2, and at the end."""
    assert {path.name for path in (replayed[0] / "checkpoints").iterdir()} == {"3", "4"}


def test_only_the_newest_rollout_files_are_kept(replayed):
    names = {path.name for path in (replayed[0] / "rollouts").iterdir()}
    assert names == {"step_000004.jsonl.gz", "heldout_transcripts.jsonl.gz"}


def test_small_file_is_replayed_repeatedly_as_separate_groups(replayed):
    _, records, _ = replayed
    assert all(record["rollout/submitted"] == 3 * 4 for record in records[2:])  # of two groups of two each
    assert all(record["policy/tokens"] > 0 for record in records[2:])


def test_saved_rollouts_can_be_imitated(finished, replayed):
    workdir, records, _ = replayed
    own = read_metrics(finished / "metrics.jsonl")
    assert not (workdir / "rollouts" / "demonstrations.jsonl.gz").exists()
    assert [r["loss/total"] for r in records[:2]] == pytest.approx([r["loss/total"] for r in own[:2]], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "file", "named"),
    [
        ("rollout.replay", "demonstrations", "no policy sampled"),
        ("rollout.replay", "nowhere", "nowhere.jsonl.gz"),
        ("rollout.replay", "heldout_transcripts", "no policy sampled"),
        ("warm_start.trajectories", "heldout_transcripts", "fewer than one batch of warm_start.batch = 8"),
        ("warm_start.trajectories", "nowhere", "nowhere.jsonl.gz"),
    ],
)
def test_unusable_rollouts_are_refused_before_any_work(finished, tmp_path, field, file, named):
    config = tiny.get_config()
    config.update_from_flattened_dict({field: str(finished / "rollouts" / f"{file}.jsonl.gz")})
    with pytest.raises(ValueError, match=named):
        lifecycle.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_file_without_rollouts_gives_one_line(finished, tmp_path):
    (tmp_path / "other").write_text("text")
    run = evaluate(finished, f"--trajectories={tmp_path / 'other'}")
    assert run.returncode == 1
    assert "is not a file of saved rollouts" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train", ("config", "workdir")),
        *(
            pytest.param(*other, marks=pytest.mark.variant)
            for other in (
                ("evaluate", ("workdir", "config", "step")),
                ("sweep", ("config", "workdir")),
                ("view", ("trajectories", "rollout")),
                ("tasks", ("task", "show")),
            )
        ),
    ],
)
def test_help_lists_the_flags(program, flags):
    run = subprocess.run(
        [sys.executable, "-m", f"echo_jax.{program}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"python -m echo_jax.{program} --{flags[0]}=" in run.stdout
    assert all(f"--{flag}" in run.stdout for flag in flags)


def test_damaged_checkpoint_is_named_with_the_remedy(finished, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished, workdir)
    (workdir / "DONE").unlink()
    newest = workdir / "checkpoints" / "34"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"checkpoints/34.*delete") as error:
        lifecycle.train(tiny.get_config(), workdir)
    assert "step 30" in str(error.value)
    assert len(read_metrics(workdir / "metrics.jsonl")) == 34


def test_without_a_sandbox_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(bubblewrap, "candidates", lambda: [])
    sandbox._accepted.cache_clear()
    try:
        with pytest.raises(sandbox.SandboxUnavailable, match="apt install bubblewrap"):
            lifecycle.train(tiny.get_config(), tmp_path / "w")
    finally:
        sandbox._accepted.cache_clear()
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rollout.temperature", 0.0),
        ("rollout.group_size", 0),
        ("rollout.max_tokens", 500),
        ("loss.observation_normalizer", "mean"),
        ("loss.mode", "ehco"),
        ("mesh.data", 3),
        ("mesh.tensor", 64),
        ("tokenizer.path", "/no/such.model"),
        ("task.lookup.words", 10),
        ("warm_start.success_rate", 1.5),
    ],
)
def test_impossible_value_is_named_before_any_work(field, value, tmp_path):
    config = tiny.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=str(value)):
        lifecycle.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def train_on_a_disk_of(size: int, workdir: Path, script: str) -> subprocess.CompletedProcess:
    """Trains in a workdir on a file system of `size` bytes, by a shell script around the command "$@"."""
    small = ["--dev-bind", "/", "/", "--size", str(size), "--tmpfs", str(workdir.parent)]
    run = subprocess.run(
        [str(sandbox.probe()), *small, "sh", "-c", script, "sh", *command("train", workdir)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run


def test_full_disk_gives_advice_before_any_work(tmp_path):
    """Too small for the checkpoints and the other files of a run."""
    script = f'mkdir {tmp_path}/w && head -c 2900000 /dev/zero > {tmp_path}/filler && exec "$@"'
    assert "free" in train_on_a_disk_of(3_000_000, tmp_path / "w", script).stderr


@pytest.mark.slow
def test_disk_that_fills_mid_run_loses_nothing_before_the_last_checkpoint(tmp_path):
    """Something else fills the disk after step 12; the last checkpoint is of step 10."""
    reached = f"""grep -qs '"step": 12' {tmp_path}/w/metrics.jsonl"""
    fill = f"(until {reached}; do sleep 0.02; done; cat /dev/zero >{tmp_path}/filler) 2>&- & "
    after = f"; status=$?; rm {tmp_path}/filler; ls {tmp_path}/w/checkpoints; exit $status"
    run = train_on_a_disk_of(30_000_000, tmp_path / "w", fill + '"$@"' + after)
    assert "resumes from" in run.stderr
    assert "10" in run.stdout.splitlines()


def test_run_of_another_owner_is_left_alone(tmp_path, capfd):
    """If two pods take one run at once, one gets it, and resumes it later."""
    workdir = tmp_path / "w"
    workdir_lib.claim_workdir(tiny.get_config(), workdir)
    workdir_lib.claim_for("pod-a", workdir)
    workdir_lib.claim_for("pod-a", workdir)
    with pytest.raises(workdir_lib.Taken, match="belongs to the owner 'pod-a', not to 'pod-b'"):
        workdir_lib.claim_for("pod-b", workdir)
    status, output = started_here(capfd, workdir, owner="pod-b")
    assert status == lifecycle.TAKEN == 69
    assert f"delete {workdir}/owner" in output
    assert not (workdir / "metrics.jsonl").exists()


def test_second_process_is_kept_out_of_a_workdir(tmp_path, capfd):
    workdir = tmp_path / "w"
    workdir_lib.claim_workdir(tiny.get_config(), workdir)
    with workdir_lib.only_process_in(workdir):
        status, output = started_here(capfd, workdir)
    assert status == lifecycle.TAKEN
    assert f"another process is training in {workdir}" in output
    assert not (workdir / "metrics.jsonl").exists()


class Recorded(NamedTuple):
    """A record of a run."""

    config: ml_collections.ConfigDict
    reads: set[str]  # leaves of the config
    compiled: list[int]  # step at each compilation
    jobs: list[tuple[int, list[Job]]]  # step and jobs of each collection of sampled rollouts
    prepared: list[tuple[int, list[Job]]]  # step at which sandboxes were opened for these jobs
    workdir: Path


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """A run in this process over a 2 × 2 × 2 mesh."""
    compiled, jobs, prepared = [], [], []
    trainer = None
    original = lifecycle.Trainer.__init__

    def remember(self, *arguments):
        nonlocal trainer
        trainer = self
        self.step = -1
        original(self, *arguments)

    def on_event(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(trainer.step if trainer else -1)

    collect, prepare = Collector.rollouts, Collector.prepare

    def remember_jobs(self, chosen, *arguments, **options):
        jobs.append((trainer.step, chosen))
        return collect(self, chosen, *arguments, **options)

    def remember_prepared(self, chosen, engine):
        prepared.append((trainer.step, chosen))
        prepare(self, chosen, engine)

    config = tiny.get_config()
    config.num_steps = 4
    config.warm_start.num_steps = 4
    config.eval.every = 2
    config.mesh.update(data=2, fsdp=2, tensor=2)
    # Enables every option that compiles another program, or runs one more often.
    config.loss.update(old_logprobs="recomputed", gradient_metrics_every=2)
    config.loss.update(observation_schedule="linear", mode_changes=((2, "grpo"),))
    config.loss.update(observation_target_ratio=0.1, entropy_weight=0.01)
    config.optimizer.update(updates_per_batch=2, warmup_steps=1, schedule="linear", end_share=0.5)
    config.rollout.refill_tries = 1
    config.pack.rows = 4
    config.task.mixture = {"lookup": 1.0, "maze": 1.0}
    config.model.num_kv_heads = 2
    reads = set()
    recording = _recording(config, "", reads)
    jax.monitoring.register_event_duration_secs_listener(on_event)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle.Trainer, "__init__", remember)
        patch.setattr(Collector, "rollouts", remember_jobs)
        patch.setattr(Collector, "prepare", remember_prepared)
        # These two read every leaf, to write config.json and to check values, which does not count as use.
        flat, validate = _on(config, config_lib.flat), _on(config, build_lib.validate)
        for module in (build_lib.config_lib, workdir_lib):
            patch.setattr(module, "flat", flat)
        patch.setattr(build_lib, "validate", validate)
        workdir = tmp_path_factory.mktemp("recorded") / "w"
        with build_lib.start_peers(recording) as peers:
            assert lifecycle.train(recording, workdir, peers=peers) == 0
    jax.monitoring.clear_event_listeners()
    return Recorded(config, reads, compiled, jobs, prepared, workdir)


def _recording(config, prefix, reads):
    """Returns a copy of the config that adds the dotted name of each leaf that is read to `reads`."""

    class Recorder(ml_collections.ConfigDict):
        def __getitem__(self, key):
            value = super().__getitem__(key)
            if not isinstance(value, ml_collections.ConfigDict):
                reads.add(prefix + key)
            return value

    copy = Recorder()
    for name in config:
        value = config[name]
        section = isinstance(value, ml_collections.ConfigDict)
        copy[name] = _recording(value, f"{prefix}{name}.", reads) if section else value
    return copy


def _on(config, function):
    """Returns the function, but applied to the unrecorded config."""
    result = function(config)
    return lambda _: result


def test_every_config_leaf_is_read_by_something(recorded_run):
    # Broken on purpose: a field added to the default config and read by nothing is named here.
    unread = set(config_lib.flat(recorded_run.config)) - recorded_run.reads
    unread -= {name for name in unread if name.startswith("task.")}  # of families outside the mixture
    assert not unread


def test_during_an_update_the_sandboxes_of_what_follows_open(recorded_run):
    """They are for the evaluation after the update or, without one, for the next step; none are for after the end."""
    assert [step for step, _ in recorded_run.prepared] == [4, 5, 6, 7]
    for step, jobs in recorded_run.prepared:
        assert next(made for at, made in recorded_run.jobs if at == step + 1) is jobs


def test_metrics_and_metric_table_match(recorded_run, finished):
    workdirs = (recorded_run.workdir, finished)
    written = {name for workdir in workdirs for record in read_metrics(workdir / "metrics.jsonl") for name in record}
    placeholders = {
        "CLASS": "|".join(ENVIRONMENT_CLASSES),
        "TOOL": "|".join(TOOLS),
        "STATUS": "|".join((*sandbox.Status, *MALFORMED, "submit")),
        "K": "[0-9]+",
        "ENVIRONMENT": "lookup|maze",
    }
    assert {name for name in written if metric_table.describe(name, placeholders) is None} == set()
    found = {id(metric_table.describe(name, placeholders)) for name in written}
    unseen = {name for name, metric in metric_table.METRICS.items() if id(metric) not in found}
    # User-defined policy losses and environments of their own settings have tests elsewhere; a CPU's peak is unknown.
    assert unseen <= {"policy/LOSS", "loss/observation_weight_env_ENVIRONMENT", "train/mfu"}


def test_the_rate_falls_over_the_updates_of_rl_and_not_in_the_warm_start(recorded_run):
    optimizer, warm = recorded_run.config.optimizer, recorded_run.config.warm_start
    rates = [record["train/learning_rate"] for record in read_metrics(recorded_run.workdir / "metrics.jsonl")]
    falling = [0.5, *(1.0 - 0.5 * n / 7 for n in range(7))]  # of eight updates, two a step
    expected = [optimizer.learning_rate * (a + b) / 2 for a, b in zip(falling[::2], falling[1::2], strict=True)]
    np.testing.assert_allclose(rates[:4], [warm.learning_rate * share for share in (0.5, 1.0, 1.0, 1.0)], rtol=1e-5)
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-5)


def test_nothing_compiles_after_the_first_step_checkpoint_and_evaluation(recorded_run):
    # Steps 0 and 4 start the phases, 2 is the first checkpoint, 4 the first evaluation; the run continues to 8.
    assert set(recorded_run.compiled) <= {-1, 0, 2, 4}


def test_a_sharded_run_reports_the_same_kind_of_numbers(recorded_run):
    records = read_metrics(recorded_run.workdir / "metrics.jsonl")
    assert len(records) == 8
    assert ["loss/gradient_cosine" in record for record in records] == [True, False] * 4
    assert records[0]["loss/gradient_ratio"] > 0
    assert [record["loss/observation_weight"] for record in records[4:]] == pytest.approx([0.05, 0.0375, 0, 0])
    assert all(record["policy/sampler_gap_max"] < 1e-4 for record in records[4:])


def test_tasks_and_sampling_keys_are_used_once_and_evaluation_uses_held_out_tasks(recorded_run):
    config = recorded_run.config
    demonstrations = trajectory_lib.load(
        recorded_run.workdir / "rollouts" / "demonstrations.jsonl.gz", vocab_size=build(config).learner.vocab_size
    )
    trained = [t.task for t in demonstrations]
    keys, evaluations = [], []
    for step, jobs in recorded_run.jobs:
        if len(jobs) == config.eval.episodes and jobs[0].task.name.split("/")[1] == "heldout":
            evaluations.append((step, [(job.task.name, job.rollout) for job in jobs]))
            continue
        groups = [jobs[i : i + config.rollout.group_size] for i in range(0, len(jobs), config.rollout.group_size)]
        assert all(len({job.task.name for job in group}) == 1 == len({job.group for job in group}) for group in groups)
        trained += [group[0].task.name for group in groups]
        keys += [job.rollout for job in jobs]
    records = read_metrics(recorded_run.workdir / "metrics.jsonl")[-config.num_steps :]
    assert len(trained) == config.warm_start.demonstrations + sum(record["rollout/offered"] for record in records)
    assert len(set(trained)) == len(trained)
    assert all(name.startswith(("lookup/train/", "maze/train/")) for name in trained)
    assert [step for step, _ in evaluations] == [4, 6, 8]
    (names,) = {tuple(jobs) for _, jobs in evaluations}  # the same each time, so that curves are comparable
    assert all(name.startswith(("lookup/heldout/", "maze/heldout/")) for name, _ in names)
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {key for _, key in names}


def test_rl_starts_with_a_fresh_optimizer(finished):
    """There were 34 updates, 4 of them with the optimizer of the second phase."""
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(final_state(finished).opt_state)
              if jax.tree_util.keystr(path).endswith("count")]  # fmt: skip
    assert counts
    assert all(count == 4 for count in counts)
