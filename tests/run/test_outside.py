"""Parts of a run named from outside the package: they are used, and nothing else has to change."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echo_jax.config import load_config_file
from echo_jax.objective.weights import weigh
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import load
from echo_jax.run import lifecycle
from echo_jax.run.build import build
from echo_jax.run.evaluator import Evaluator, evaluate
from echo_jax.run.joint_collector import JointCollector
from echo_jax.system.errors import ConfigError
from echo_jax.system.metrics import read_metrics
from echo_jax.system.user_code import UserCodeError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "outside" / "all_mine.py"


def config(**fields):
    made = load_config_file(CONFIG).get_config()
    made.update_from_flattened_dict(fields)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Returns the workdir of a whole run with all of these parts."""
    workdir = tmp_path_factory.mktemp("outside") / "run"
    assert lifecycle.train(config(), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def saved(finished):
    return load(finished / "rollouts" / "step_000001.jsonl.gz", vocab_size=build(config()).learner.vocab_size)


def test_a_run_of_parts_from_outside_reaches_its_end(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert (finished / "DONE").exists()


def test_rollouts_hold_the_engines_turns_the_tools_output_and_the_tasks_rewards(saved):
    by_rollout = {t.rollout: t for t in saved}
    assert len(by_rollout) == 4
    talks = [t for t in saved if t.rollout % 2 == 0]
    assert all(t.attempts[0].tool == "count" and t.attempts[0].status == "ok" for t in talks)
    assert all({t.tools[i - 1] for i in t.tool if i} == {"count"} for t in talks)
    assert all((t.version[t.role == Role.ACTION] == 0).all() and (t.version[t.role != Role.ACTION] == -1).all()
               for t in saved)  # fmt: skip
    for t in saved:
        index = int(t.task.rsplit("/", 1)[1])
        right = t.rollout % 2 == 0 and 1 + index % 3 == 2
        assert t.reward_range == (-1.0, 2.0)
        if index % 3 == 2:
            assert (t.scored, t.outcome, t.reward) == (False, "unscored", 0.0)
        else:
            assert (t.scored, t.reward, t.solved) == (True, 2.0 if right else -1.0, right)


def test_rollouts_that_a_task_cannot_score_are_counted_and_not_repeated(finished):
    for record in read_metrics(finished / "metrics.jsonl")[1:]:
        assert record["rollout/accepted"] + record["rollout/rejected"] + record["rollout/filtered"] == 4
        assert record["rollout/retried"] == 0
    assert any(record["rollout/rejected"] for record in read_metrics(finished / "metrics.jsonl")[1:])


def test_loss_and_tool_report_their_metrics(finished):
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert 0.0 < last["policy/gate"] < 1.0
    assert "policy/clip_fraction" not in last
    assert last["observation/tokens_tool_count"] > 0
    assert last["observation/ce_tool_count"] == last["observation/ce"]


def test_an_evaluation_counts_unscored_rollouts_in_sight_of_the_solve_rate(finished, capsys):
    """One in three of these tasks cannot be scored."""
    metrics = evaluate(build(config()), finished, episodes=3, samples=2)
    assert [metrics[f"eval/{name}"] for name in ("submitted", "accepted", "rejected", "broken")] == [6, 4, 2, 0]
    assert "2 of 6 rollouts could not be scored and are in no solve rate: task counting/heldout/2" in (
        capsys.readouterr().err
    )


def test_options_reach_loss_advantage_and_filter(saved):
    learner = build(config()).learner
    assert learner.loss_options().policy_options == (("sharpness", 2.0),)
    pair = [t for t in saved if t.scored][:2]
    assert len(pair) == 2
    np.testing.assert_allclose(sorted(learner.advantages(pair)), [-0.25, 0.25])
    objective = learner.objective(0)
    talk = next(t for t in saved if (t.role == Role.OBSERVATION).any())
    bodies = np.flatnonzero(talk.role == Role.OBSERVATION)
    trained = np.flatnonzero(weigh([talk], [0.0], objective)[0].observation_weight)
    assert trained.tolist() == bodies[1:].tolist()  # the filter skips one


def test_without_demonstrators_observation_ce_needs_saved_rollouts(finished, tmp_path, capsys):
    assert all("eval/observation_ce" not in record for record in read_metrics(finished / "metrics.jsonl"))
    for name, expected in (("", False), (str(finished / "rollouts" / "step_000001.jsonl.gz"), True)):
        parts = build(config(**{"eval.trajectories": name}))
        with parts.make_collector() as collector:
            joint = JointCollector(collector, parts.peers)
            evaluator = Evaluator(parts, joint, parts.make_engine(), tmp_path)
            _, params = _initial(parts.learner)
            assert ["eval/observation_ce" in evaluator(params, 0, episodes=2) for _ in range(2)] == [expected] * 2
        assert capsys.readouterr().err.count("eval/observation_ce is left out") == (not expected)


def test_demonstrators_that_call_no_tool_give_no_observation_ce(tmp_path, capsys):
    made = config()
    made.task.counting = {"family": "raising:BrokenFamily", "most": 3, "where": "silent"}
    parts = build(made)
    with parts.make_collector() as collector:
        evaluator = Evaluator(parts, JointCollector(collector, parts.peers), parts.make_engine(), tmp_path)
        assert evaluator.observation_ce(_initial(parts.learner)[1]) is None
    assert "eval/observation_ce is left out: the demonstrators" in capsys.readouterr().err


def _initial(learner):
    from echo_jax.models.transformer import init_params

    return init_params(learner.model_config, 0, learner.mesh)


def test_an_engine_with_one_temperature_is_refused_if_environments_have_their_own():
    def with_temperature(temperature):
        made = config()
        made.environments.counting = {"rollout": {"temperature": temperature}}
        return build(made).make_engine()

    with pytest.raises(ConfigError, match=r"environments.counting.rollout.temperature = 0.3: Replay, .*'mine:Replay'"):
        with_temperature(0.3)
    with_temperature(config().rollout.temperature)  # no other than the run's


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"warm_start.num_steps": 3}, "counting/train/0 has no demonstrator for config.warm_start.num_steps = 3"),
        ({"loss.policy": "mine:gate"}, "loss.policy = 'mine:gate': module 'mine' has no attribute 'gate'"),
        ({"loss.policy": "mine:Role"}, "policy_options has sharpness"),
        ({"loss.advantage_options.spread": None, "loss.advantage": "group"}, "group_normalized takes ddof, epsilon"),
        ({"loss.observation_filter": "mine:ranks"}, "observation_filter_options has skipped"),
        ({"rollout.engine": "mine:Nowhere"}, "engine_options has conversations"),
        ({"task.counting.most": 0}, "environment counting.* raised ZeroDivisionError.*mine.py"),
        ({"task.counting.family": "mine:Counting"}, "config.task.counting.family = 'mine:Counting'"),
        ({"tools.count.tool": "mine:Nowhere"}, "config.tools.count has unit, but Nowhere takes no options"),
        ({"tools.count.unit": None, "tools.count.tool": "mine:gated"}, "config.tools.count has unit"),
    ],
)
def test_error_names_the_field(fields, named):
    with pytest.raises((ConfigError, UserCodeError), match=named):
        build(config(**fields))


def test_program_finds_modules_in_its_configs_folder_from_anywhere(tmp_path):
    arguments = [f"--config={CONFIG}", f"--workdir={tmp_path / 'w'}", "--config.loss.policy=mine:missing"]
    ended = subprocess.run(
        [sys.executable, "-m", "echo_jax.train", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "error: config.loss.policy = 'mine:missing': module 'mine' has no attribute 'missing'" in ended.stderr
    assert "Traceback" not in ended.stderr
