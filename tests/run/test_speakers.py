"""A run in an environment that answers as a user and as the system, from its rollouts to the loss."""

from pathlib import Path

import numpy as np
import pytest

from echo_jax.config import default_config, load_config_file
from echo_jax.objective.selection import Selection
from echo_jax.objective.weights import Objective, weigh
from echo_jax.roles import Role
from echo_jax.rollout.collector import Job
from echo_jax.rollout.trajectory import load
from echo_jax.run import lifecycle
from echo_jax.run.build import build
from echo_jax.system.errors import ConfigError
from echo_jax.system.metrics import read_metrics

MODULE = load_config_file(Path(__file__).parents[1] / "outside" / "guessing.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Returns the workdir of a run of one step."""
    workdir = tmp_path_factory.mktemp("guessing") / "run"
    assert lifecycle.train(MODULE.get_config(), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def saved(finished):
    return load(
        finished / "rollouts" / "step_000001.jsonl.gz", vocab_size=build(MODULE.get_config()).learner.vocab_size
    )


def test_turns_without_a_call_go_on_and_each_token_has_its_writer(saved):
    parts = build(MODULE.get_config())
    tokenizer = parts.renderer.tokenizer
    by = lambda t, role: tokenizer.decode(t.ids[t.role == role].tolist())  # noqa: E731
    assert len(saved) == 4
    for t in saved:
        secret = 5 + int(t.task.rsplit("/", 1)[1]) % 2
        if t.rollout % 2 == 0:
            assert (t.turns, t.outcome) == (3, "submitted")
            assert by(t, Role.USER) == "no, not 2" + ("yes" if secret == 5 else "no, not 5")
            assert by(t, Role.SYSTEM) == ""
            assert t.reward == float(secret == 5)
        else:
            assert by(t, Role.SYSTEM) == "write a number"
        assert {t.tools[i - 1] for i in t.tool[np.isin(t.role, (Role.USER, Role.SYSTEM))]} == {"listen"}
        assert not np.isin(t.role, (Role.OBSERVATION, Role.FEEDBACK)).any()
        assert [(attempt.tool, attempt.status) for attempt in t.attempts[:2]] == [("listen", "ok")] * 2


def test_both_classes_have_metrics_and_are_trained(finished, saved):
    last = read_metrics(finished / "metrics.jsonl")[-1]
    for name, role in (("user", Role.USER), ("system", Role.SYSTEM)):
        assert last[f"observation/tokens_{name}"] == sum(t.count(role) for t in saved)
        assert last[f"observation/ce_{name}"] > 0
    assert "observation/ce" not in last  # no tool wrote anything
    assert last["loss/observation"] > 0


@pytest.mark.parametrize(("user", "system"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5)])
def test_a_class_is_trained_as_its_weight_says(saved, user, system):
    selection = Selection({"user": user, "system": system}, {"listen": 0.5})
    objective = Objective(observation_weight=1.0, temperature=1.0, selection=selection)
    for t, weights in zip(saved, weigh(saved, np.zeros(len(saved)), objective), strict=True):
        length = t.count(Role.USER, Role.SYSTEM)  # |O|: both count, trained or not
        expected = np.where(t.role == Role.USER, user, np.where(t.role == Role.SYSTEM, system, 0.0)) * 0.5 / length
        np.testing.assert_allclose(weights.observation_weight, expected, rtol=1e-6)


def test_a_run_from_before_these_classes_trains_neither():
    weights = default_config().loss.class_weights
    assert (weights.user, weights.system) == (0.0, 0.0)


def test_a_script_can_speak_to_a_user():
    config = MODULE.get_config()
    parts = build(config)
    with parts.make_collector() as collector:
        jobs = [Job(parts.train_tasks[i], group=i, rollout=i) for i in range(4)]
        made = collector.scripted(jobs, [True, True, False, False], 0)
    assert [t.reward for t in made] == [1.0, 1.0, 0.0, 0.0]
    assert all(t.count(Role.USER) and t.count(Role.SYSTEM) for t in made)


@pytest.mark.parametrize(
    ("listener", "message"),
    [("nobody", "unknown tools: nobody"), ("edit", "listener edit of task .* it must require one")],
)
def test_a_listener_that_cannot_listen_is_named(listener, message):
    config = MODULE.get_config()
    config.task.guessing.listener = listener
    with pytest.raises(ConfigError, match=message):
        build(config)
