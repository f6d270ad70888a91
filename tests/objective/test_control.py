"""The controller of lambda alone, on measures that are made up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.objective.control import Control


def test_factor_by_hand():
    control = Control(target=0.5, gain=0.5)
    assert control.factor(2.0, policy=4.0, observation=1.0) == 2.0  # at its target
    np.testing.assert_allclose(control.factor(2.0, policy=16.0, observation=1.0), 4.0)
    assert Control(target=0.5, gain=1.0).factor(7.0, policy=3.0, observation=1.0) == 1.5


@pytest.mark.parametrize(("policy", "observation"), [(0.0, 1.0), (1.0, 0.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_a_zero_gradient_leaves_the_factor_as_it_is(policy, observation):
    assert Control(target=0.5).factor(3.0, policy, observation) == 3.0


@given(st.floats(0.1, 10.0), st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(0.01, 10.0))
def test_noisy_ratios_come_near_the_target_from_ten_times_too_small_or_large(wrong, seed, natural, target):
    """Of the ratios that steps 11 to 20 train with, while the terms' own ratio varies by a third from step to step."""
    control, rng = Control(target), np.random.default_rng(seed)
    factor, ratios = wrong * target / natural, []
    for observation in natural * np.exp(rng.normal(0.0, 0.3, 20)):
        factor = control.factor(factor, 1.0, observation)
        ratios.append(factor * observation)
    assert abs(np.mean(ratios[10:]) / target - 1) < 0.2
    steady = factor
    for _ in range(30):
        steady = control.factor(steady, 1.0, natural)
    np.testing.assert_allclose(steady * natural, target, rtol=1e-5)
