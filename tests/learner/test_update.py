"""Laws of an update over several passes, and of one that fails."""

import dataclasses

import numpy as np
import pytest
from synthetic import varied

from configs import tiny
from echo_jax.learner import update as update_lib
from echo_jax.learner.update import Update, UpdateError, mean_of_passes
from echo_jax.models.transformer import init_params
from echo_jax.objective.weights import weigh
from echo_jax.run.build import build


def test_metrics_are_means_over_passes_except_the_samplers_mismatch():
    first = {"loss/total": 1.0, "policy/sampler_gap": 0.1, "policy/sampler_gap_max": 0.2, "policy/mismatch_kl": 0.3}
    second = {"loss/total": 2.0, "policy/sampler_gap": 9.0, "policy/sampler_gap_max": 9.0, "policy/mismatch_kl": 9.0}
    assert mean_of_passes([first, second]) == first | {"loss/total": 1.5}


@pytest.mark.parametrize("name", ["loss/total", pytest.param("train/gradient_norm", marks=pytest.mark.variant)])
def test_non_finite_update_is_an_error_with_its_numbers(name, monkeypatch):
    config = tiny.get_config()
    config.pack.length = 128
    learner = build(config).learner
    _, params = init_params(learner.model_config, 0, learner.mesh)
    state = learner.init_state(params)
    chosen = [dataclasses.replace(t, ids=t.ids % learner.vocab_size) for t in varied()[:4]]
    weights = weigh(chosen, np.zeros(4), learner.objective(0))
    finish = update_lib.finish_metrics
    monkeypatch.setattr(update_lib, "finish_metrics", lambda sums: finish(sums) | {name: float("nan")})
    with pytest.raises(UpdateError, match="nan"):
        Update(learner, learner.loss_options(), learner.schedule())(state, chosen, weights, at_most=4)
