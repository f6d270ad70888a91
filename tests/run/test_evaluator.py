"""Metrics of an evaluation from a set of rollouts."""

import dataclasses
from math import comb

import numpy as np
import pytest
from synthetic import trajectories

from echo_jax.run.evaluator import evaluation_line, pass_at_k


def rollouts(*rewards_of_tasks, scored=True):
    base = trajectories(0, 1)[0]
    return [
        dataclasses.replace(base, group=task, reward=reward, scored=scored)
        for task, rewards in enumerate(rewards_of_tasks)
        for reward in rewards
    ]


def test_pass_at_k_by_hand():
    metrics = pass_at_k(rollouts([1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0.5, 1, 0]), samples=4)
    assert metrics["eval/pass@1"] == (0.5 + 0 + 1 + 0.25) / 4
    assert metrics["eval/pass@4"] == 0.75
    assert metrics["eval/pass@1_stderr"] == pytest.approx(np.std([0.5, 0, 1, 0.25], ddof=1) / 2)
    assert metrics["eval/pass@4_stderr"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_rollouts():
    """3 of 8 are solved; with k = 8 and two rollouts lost, the others still estimate pass@1, but not pass@8."""
    kept = rollouts([1, 1, 1, 0, 0, 0])
    lost = rollouts([1, 0], scored=False)
    metrics = pass_at_k(kept + lost, samples=8)
    assert metrics["eval/pass@1"] == 1 - comb(3, 1) / comb(6, 1)
    assert "eval/pass@8" not in metrics


def test_one_task_has_zero_standard_error():
    assert pass_at_k(rollouts([1, 0]), samples=1) == {"eval/pass@1": 0.5, "eval/pass@1_stderr": 0.0}


def test_unscored_rollouts_are_counted_beside_the_solve_rate():
    record = {"step": 7, "eval/solve_rate": 0.5, "eval/pass@1": 0.5, "eval/pass@1_stderr": 0.25, "eval/submitted": 64}
    assert evaluation_line(record) == evaluation_line(record | {"eval/rejected": 0})
    assert evaluation_line(record) == "step 7: held-out solve rate 0.500 ± 0.250"
    unscored = evaluation_line(record | {"eval/rejected": 3})
    assert unscored == "step 7: held-out solve rate 0.500 ± 0.250 (3 of 64 rollouts unscored)"
