"""Weights by hand, and the laws that keep the two terms apart."""

import dataclasses

import numpy as np
import pytest
from synthetic import ECHO, make_trajectory, trajectories

from echo_jax.objective import Objective, weigh
from echo_jax.roles import Role
from echo_jax.trajectory import Trajectory

S, P, A, O, N, T = Role.SCAFFOLD, Role.PROMPT, Role.ACTION, Role.OBSERVATION, Role.BOILERPLATE, Role.TRUNCATION  # noqa: E741


def with_roles(*roles: Role) -> Trajectory:
    return make_trajectory(np.arange(len(roles)), roles)


def weigh_one(trajectory: Trajectory, advantage: float, objective: Objective = ECHO):
    return weigh([trajectory], [advantage], objective)[0]


EXAMPLE = with_roles(S, P, A, A, S, O, O, O, T, N, S)  # |A| = 2, |O'| = 3, |O| = 5


@pytest.mark.parametrize(
    ("normalizer", "weight", "denominator"),
    [("observation", 1 / 5, 1.0), ("selected", 1 / 3, 1.0), ("token", 1.0, 3.0)],
)
def test_observation_normalizers_by_hand(normalizer, weight, denominator):
    weights = weigh_one(EXAMPLE, 1.0, dataclasses.replace(ECHO, observation_normalizer=normalizer))
    expected = np.where(EXAMPLE.role == O, 0.05 * weight, 0.0)
    np.testing.assert_allclose(weights.observation_weight, expected, rtol=1e-6)
    assert weights.observation_denominator.sum() == denominator


@pytest.mark.parametrize(("normalizer", "weight", "denominator"), [("sequence", 1 / 2, 1.0), ("token", 1.0, 2.0)])
def test_policy_normalizers_by_hand(normalizer, weight, denominator):
    weights = weigh_one(EXAMPLE, -3.0, dataclasses.replace(ECHO, policy_normalizer=normalizer))
    np.testing.assert_allclose(weights.policy_weight, np.where(EXAMPLE.role == A, weight, 0.0))
    assert weights.policy_denominator.sum() == denominator


def test_the_first_token_is_never_trained():
    weights = weigh_one(with_roles(A, O, A), 1.0, ECHO)
    assert weights.policy_weight[0] == weights.observation_weight[0] == weights.policy_denominator[0] == 0


def test_a_sequence_without_observations_counts_in_the_mean_over_sequences():
    weights = weigh_one(with_roles(S, P, A, A), 1.0, ECHO)
    assert weights.observation_weight.sum() == 0
    assert weights.observation_denominator.sum() == 1


def test_zero_lambda_leaves_the_policy_weights_bit_for_bit():
    for t in trajectories(1):
        with_echo, without = (
            weigh_one(t, 0.7, ECHO),
            weigh_one(t, 0.7, dataclasses.replace(ECHO, observation_weight=0.0)),
        )
        assert not without.observation_weight.any()
        for name in ("policy_weight", "policy_denominator", "advantage", "temperature"):
            np.testing.assert_array_equal(getattr(with_echo, name), getattr(without, name))


def test_advantage_scale_does_not_touch_the_observation_term():
    for t in trajectories(2):
        small, large = weigh_one(t, 0.1, ECHO), weigh_one(t, 1000.0, ECHO)
        np.testing.assert_array_equal(small.observation_weight, large.observation_weight)
        np.testing.assert_array_equal(small.policy_weight, large.policy_weight)


def test_the_sampling_temperature_is_for_actions_only():
    weights = weigh_one(EXAMPLE, 1.0, ECHO)
    np.testing.assert_allclose(weights.temperature, np.where(EXAMPLE.role == A, 0.8, 1.0))
