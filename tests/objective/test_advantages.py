"""Laws of group-normalised advantages."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_trajectory

from echo_jax.objective.advantages import ADVANTAGES, advantages_of

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


def rollout(reward, group=0, scored=True, **fields):
    return make_trajectory([0, 0], group=group, reward=reward, scored=scored, **fields)


def apart(rollouts):
    """Returns the trajectories as separate rollouts."""
    return [dataclasses.replace(r, rollout=i) for i, r in enumerate(rollouts)]


def advantages(*rewards, estimator="group"):
    return advantages_of(apart(rollout(reward) for reward in rewards), ADVANTAGES[estimator])


rewards = st.floats(0, 1).map(lambda x: round(x, 3))  # differences exceed rounding errors


def test_numbers_by_hand():
    """Mean 1/4; deviations 3/4 and -1/4; std with ddof 0 is sqrt(3)/4 (ddof 1 would give 1/2, and 1.5)."""
    std = 3**0.5 / 4
    expected = np.asarray([0.75, -0.25, -0.25, -0.25]) / (std + 1e-6)
    np.testing.assert_allclose(advantages(1, 0, 0, 0), expected, rtol=1e-6)
    np.testing.assert_allclose(advantages(1, 0), [0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6)], rtol=1e-7)


def test_epsilon_is_a_millionth_added_to_the_std():
    np.testing.assert_allclose(advantages(2e-6, 0), [0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, size):
    assert (advantages(*[reward] * size) == 0).all()


def test_unscored_rollouts_leave_the_baseline_and_get_zero():
    scored = advantages(1, 0, 0.5)
    mixed = advantages_of(
        apart([rollout(1), rollout(9, scored=False), rollout(0), rollout(0, scored=False), rollout(0.5)])
    )
    np.testing.assert_array_equal(mixed[[0, 2, 4]], scored)
    np.testing.assert_array_equal(mixed[[1, 3]], 0.0)


def test_single_scored_rollout_and_unscored_group_get_zero():
    assert (advantages_of(apart([rollout(1), rollout(0, scored=False), rollout(0, scored=False)])) == 0).all()
    assert (advantages_of(apart([rollout(1, scored=False), rollout(0, scored=False)])) == 0).all()


def test_nan_reward_of_an_unscored_rollout_is_ignored():
    mixed = advantages_of(apart([rollout(1), rollout(float("nan"), scored=False), rollout(0)]))
    np.testing.assert_array_equal(mixed[[0, 2]], advantages(1, 0))
    assert mixed[1] == 0


def test_no_rollouts_give_no_advantages():
    assert advantages_of([]).shape == (0,)


@PATIENT
@given(st.lists(st.tuples(rewards, st.integers(0, 3), st.booleans()), min_size=1, max_size=24))
def test_advantages_are_finite_centred_and_independent_of_other_groups(entries):
    rollouts = apart(rollout(*entry) for entry in entries)
    together = advantages_of(rollouts)
    assert together.dtype == np.float32
    assert together.shape == (len(entries),)
    assert np.isfinite(together).all()
    for group in {r.group for r in rollouts}:
        members = [i for i, r in enumerate(rollouts) if r.group == group]
        np.testing.assert_array_equal(together[members], advantages_of([rollouts[i] for i in members]))
        scored = [i for i in members if rollouts[i].scored]
        assert abs(sum(together[i] for i in scored)) < 1e-3
        best = max(scored, key=lambda i: rollouts[i].reward, default=None)
        assert best is None or together[best] >= 0


@PATIENT
@given(st.lists(rewards, min_size=2, max_size=8), st.floats(0.1, 10), st.floats(-10, 10))
def test_scale_and_shift_of_rewards_do_not_matter(values, scale, shift):
    """Up to epsilon, which is 3 % of the smallest std of these rewards: seven equal and one 1e-3 apart, scaled."""
    moved = advantages(*[scale * value + shift for value in values])
    np.testing.assert_allclose(moved, advantages(*values), rtol=0.05, atol=1e-5)


@PATIENT
@given(st.lists(rewards, min_size=2, max_size=8), st.randoms())
def test_the_order_of_rollouts_does_not_matter(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    np.testing.assert_allclose(
        advantages(*[values[i] for i in order]), advantages(*values)[order], rtol=1e-5, atol=1e-6
    )


def test_the_other_estimators_by_hand():
    np.testing.assert_allclose(advantages(1, 0, 0, 0, estimator="group_mean"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(
        advantages(1, 0, 0, 0, estimator="leave_one_out"), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6
    )
    np.testing.assert_array_equal(advantages(1, 0, 0.5, estimator="reward"), [1, 0, 0.5])
    np.testing.assert_array_equal(advantages(1, 1, estimator="reward"), [1, 1])


@pytest.mark.parametrize("estimator", sorted(set(ADVANTAGES) - {"reward"}))
def test_with_a_baseline_equal_rewards_and_a_single_one_get_zero(estimator):
    assert not advantages(0.3, 0.3, 0.3, estimator=estimator).any()
    assert not advantages(1.0, estimator=estimator).any()


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_branches_of_one_rollout_count_as_one(estimator):
    """Rollout 0 has three branches; counted three times, it would move the mean."""
    branched = [rollout(1, rollout=0)] * 3 + [rollout(0, rollout=1), rollout(0, rollout=2)]
    plain = advantages(1, 0, 0, estimator=estimator)
    np.testing.assert_array_equal(advantages_of(branched, ADVANTAGES[estimator]), plain[[0, 0, 0, 1, 2]])
