"""Exceptions out of code that users bring: what becomes of them, of the run and of its work."""

import re
import types

import pytest
from runs import comparable
from test_outside import config

from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.rollout.trajectory import load
from echo_jax.run import lifecycle
from echo_jax.run.build import build
from echo_jax.run.evaluator import FIRST_EVAL_ROLLOUT
from echo_jax.system.metrics import read_metrics
from echo_jax.system.user_code import UserCodeError

# OSError is one that programs print as a user's mistake. All kinds: rollout/test_world.py.
ERRORS = ["OSError", *(pytest.param(name, marks=pytest.mark.variant) for name in ("ValueError", "KeyError"))]


def broken(*, talks_only=False, tool="mine:Count", tool_options=None, **family):
    """Returns a config with the tasks of raising.py. Every second rollout calls the tool `count`; with `talks_only`
    each does."""
    made = config(num_steps=2)
    made.task.counting = {"family": "raising:BrokenFamily", "most": 3} | family
    made.tools = {"count": {"tool": tool, "unit": "words"} | (tool_options or {})}
    if talks_only:
        made.rollout.engine_options.conversations = (("count oak oak", "submit 2"),)
    return made


def rollouts(workdir, step):
    learner = build(broken()).learner
    return load(workdir / "rollouts" / f"step_{step:06d}.jsonl.gz", vocab_size=learner.vocab_size)


def saved_step(workdir):
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        return checkpoints.latest_step()


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_a_tool_an_exception_is_an_observation(tmp_path, error, capfd):
    made = broken(tool="raising:BrokenCount", tool_options={"error": error})
    assert lifecycle.train(made, tmp_path) == 0
    seen = [t for t in rollouts(tmp_path, 2) if t.attempts[0].tool == "count"]
    assert len(seen) == 2
    tokenizer = build(made).renderer.tokenizer
    for t in seen:
        assert t.attempts[0].status == "nonzero"
        assert f"{error}: " in tokenizer.decode(t.ids.tolist())
    steps = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [record["rollout/raised"] for record in steps] == [2, 2]
    log = (tmp_path / "errors.log").read_text()
    assert log.count("tool 'count' in task counting/train/") >= 4
    assert log.count("raising.py") >= 8  # in the first line and in the traceback
    printed = capfd.readouterr().out
    assert printed.count("exceptions in 2 rollouts") == 1  # once, not at every step
    assert "errors.log" in printed


@pytest.mark.variant
def test_a_tool_that_returns_nothing_is_an_observation_too(tmp_path):
    made = broken(tool="raising:Forgetful")
    made.rollout.max_tokens = made.pack.length = 128
    assert lifecycle.train(made, tmp_path) == 0
    log = (tmp_path / "errors.log").read_text()
    assert "TypeError: it returned a NoneType; it must return a CommandResult" in log


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_a_score_an_exception_is_reward_0(tmp_path, error):
    assert lifecycle.train(broken(where="score", error=error, every=2), tmp_path) == 0
    made = [(t.task, t.scored, t.reward) for t in rollouts(tmp_path, 1)]
    assert made[:2] == [("counting/train/8", True, 0.0)] * 2
    assert all(scored and reward in (-1.0, 2.0) for _, scored, reward in made[2:])
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["rollout/raised"] == 2
    log = (tmp_path / "errors.log").read_text()
    assert f"the score of task counting/train/8 raised {error}" in log
    assert "Traceback (most recent call last)" in log
    assert "raising.py" in log


@pytest.mark.variant
def test_a_world_that_cannot_be_made_leaves_its_rollouts_unscored(tmp_path, capfd):
    assert lifecycle.train(broken(where="world", first=10, every=2), tmp_path) == 0
    assert re.search(r"^ECHO  2/2 .* solve rate [0-9.]+ .* unscored 2$", capfd.readouterr().out, re.MULTILINE)
    step = read_metrics(tmp_path / "metrics.jsonl")[2]
    assert (step["rollout/raised"], step["rollout/rejected"], step["rollout/retried"]) == (2, 2, 2)


# What fails -> part of the message. Each fails in the second step, the loss of course in the first.
FAILURES = {
    "score": ("in all 4 rollouts the task or a tool raised", "the score of task counting/train/10 raised"),
    "make": ("environment counting: make('train', 10) raised",),
    "tool": ("in all 4 rollouts the task or a tool raised", "tool 'count' in task counting/heldout/0 raised"),
    "observation_filter": ("the observation filter observation_filter on a rollout of task counting/train/", "raised"),
    "advantage": ("the advantage estimator advantage on the rewards [", "raised"),
    "loss": ("the policy loss 'raising:loss' raised",),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("error", ERRORS)
def test_a_failure_that_stops_the_run_names_its_place(tmp_path, failure, error):
    with pytest.raises(UserCodeError) as raised:
        lifecycle.train(failing(failure, error), tmp_path)
    message = str(raised.value)
    for part in (*FAILURES[failure], f"{error}: ", "raising.py:", "Traceback (most recent call last)"):
        assert part in message


def test_an_error_while_making_tasks_ahead_is_left_to_their_step():
    def jobs(step):
        raise UserCodeError(f"no task for the step after {step}")

    run = types.SimpleNamespace(step=3, parts=types.SimpleNamespace(replay=()), _jobs=jobs)
    run._evaluates_after = lambda step: False
    lifecycle.Trainer._prepare(run)


@pytest.mark.variant
def test_a_task_that_cannot_be_made_stops_its_own_step_and_not_the_one_before(tmp_path):
    """Though tasks are made a step ahead. The first 16 are made, to check them, before the run starts."""
    made = broken(where="make", first=16)
    made.num_steps = 6
    with pytest.raises(UserCodeError, match=r"make\('train', 16\) raised"):
        lifecycle.train(made, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == saved_step(tmp_path) == 4


def failing(failure, error="OSError"):
    """Returns a config with one of FAILURES."""
    options = {"error": error}
    made = broken(where=failure, first=10, talks_only=failure == "tool", **options)
    if failure == "tool":
        made.tools.count = {"tool": "raising:BrokenCount", "unit": "words"} | options
    elif failure in FAILURES and failure not in ("score", "make"):
        field = failure.replace("loss", "policy")
        made.loss[field], made.loss[f"{field}_options"] = f"raising:{failure}", options
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run in which nothing fails."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    made = broken()
    made.loss.observation_filter = "mine:not_the_first"
    made.loss.observation_filter_options = {}
    assert lifecycle.train(made, workdir) == 0
    return workdir


@pytest.mark.parametrize("failure", [pytest.param("score", marks=pytest.mark.variant), "observation_filter"])
def test_once_mended_a_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, failure, whole, capfd):
    import mine  # found, like the next, in the config's folder
    import raising

    made = failing(failure)
    made.checkpoint.every = 100  # only the failure makes it save step 1
    made.loss.observation_filter_options = {} if failure == "score" else made.loss.observation_filter_options
    with pytest.raises(UserCodeError):
        lifecycle.train(made, tmp_path)
    assert "stopped by an error; step 1 of 2 is saved" in capfd.readouterr().out
    assert saved_step(tmp_path) == 1
    kept = (tmp_path / "rollouts" / "interrupted_000001.jsonl.gz").exists()
    assert kept == (failure == "observation_filter")  # rewards of 0 out of broken scores must not stay

    monkeypatch.setattr(raising.BrokenTask, "check", lambda self, where: None)
    monkeypatch.setattr(raising, "observation_filter", lambda t, mask, error: raising.not_the_first(t, mask))
    opened = []
    open_session = mine.Replay.open
    monkeypatch.setattr(mine.Replay, "open", lambda self, *which: opened.append(which[0]) or open_session(self, *which))
    assert lifecycle.train(made, tmp_path) == 0
    assert comparable(tmp_path) == comparable(whole)
    assert any(rollout < FIRST_EVAL_ROLLOUT for rollout in opened) == (failure == "score")
