"""Laws of an update over several passes and mini-batches, of one with a controller, and of one that fails."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest
from synthetic import varied

from configs import tiny
from echo_jax.learner import update as update_lib
from echo_jax.learner.learner import Learner
from echo_jax.learner.update import Update, UpdateError, deal, mean_of_passes
from echo_jax.models.transformer import init_params
from echo_jax.objective.control import Control
from echo_jax.objective.weights import weigh
from echo_jax.run.build import build


def test_metrics_are_means_over_passes_except_the_samplers_mismatch():
    first = {"loss/total": 1.0, "policy/sampler_gap": 0.1, "policy/sampler_gap_max": 0.2, "policy/mismatch_kl": 0.3}
    second = {"loss/total": 2.0, "policy/sampler_gap": 9.0, "policy/sampler_gap_max": 9.0, "policy/mismatch_kl": 9.0}
    assert mean_of_passes([first, second]) == first | {"loss/total": 1.5}


RATE = optax.constant_schedule(0.01)


def made(**loss):
    """Returns a learner for the recorded trajectories, a state, and the trajectories."""
    config = tiny.get_config()
    config.pack.length = 128
    config.loss.update(loss)
    learner = build(config).learner
    _, params = init_params(learner.model_config, 0, learner.mesh)
    chosen = [dataclasses.replace(t, ids=t.ids % learner.vocab_size) for t in varied()]
    return learner, learner.init_state(params), chosen


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)


def test_rollouts_are_dealt_out_to_mini_batches_with_their_branches_each_once():
    chosen = varied()
    weights = list(range(len(chosen)))
    parts = deal(chosen, weights, 3, (7, 1))
    rollouts = [{t.rollout for t in own} for own, _ in parts]
    assert sorted(map(len, rollouts)) == [3, 3, 3]
    assert set.union(*rollouts) == set(range(9))
    assert sorted(w for _, own in parts for w in own) == weights
    assert all(chosen[w] is t for own, of in parts for t, w in zip(own, of, strict=True))
    dealt = lambda parts, *order: [own for _, own in deal(chosen, weights, parts, order)]  # noqa: E731
    assert dealt(3, 7, 1) == [own for _, own in parts] != dealt(3, 7, 2)
    assert dealt(1, 7, 1) == [weights]


@pytest.mark.parametrize("processes", [2, 4, 9])
@pytest.mark.parametrize("parts", [2, 4, 9, 20])
def test_mini_batches_have_the_same_rollouts_however_many_processes_share_them(processes, parts):
    """Also where a process has fewer rollouts than there are parts; none is empty, which would be an update of momentum
    and weight decay alone."""
    chosen = varied()
    names = lambda own: [(t.group, t.rollout, t.shared) for t in own]  # noqa: E731
    rollouts = list(dict.fromkeys((t.group, t.rollout) for t in chosen))
    everyone = [list(rollout) for rollout in rollouts]
    alone = [sorted(names(own)) for own, _ in deal(chosen, names(chosen), parts, (7, 1))]
    assert len(alone) == min(parts, len(rollouts))
    assert all(alone)
    joined = [[] for _ in alone]
    for index in range(processes):
        share = [t for t in chosen if (t.group, t.rollout) in rollouts[index::processes]]
        for part, (own, of) in zip(joined, deal(share, names(share), parts, (7, 1), lambda _: everyone), strict=True):
            assert names(own) == of
            part += of
    assert [sorted(part) for part in joined] == alone


def test_a_process_has_room_for_all_its_rollouts_that_can_be_in_one_mini_batch():
    three = types.SimpleNamespace(processes=3)  # with up to 4 rollouts each
    assert [Learner.share_of_part(three, 4, parts) for parts in (1, 3, 4, 6, 12)] == [4, 4, 3, 2, 1]


def test_an_update_of_mini_batches_is_one_update_on_each_part_with_its_own_denominators():
    learner, state, chosen = made()
    advantages = np.linspace(-1, 1, len(chosen))
    weights = weigh(chosen, advantages, learner.objective(0))
    options = learner.loss_options()
    whole = Update(learner, options, RATE, mini_batches=2)(copy(state), chosen, weights, at_most=12, order=(3, 4))
    one = Update(learner, options, RATE)
    by_hand, metrics = copy(state), []
    for part in deal(chosen, weights, 2, (3, 4)):
        by_hand, found, _ = one(by_hand, *part, at_most=6)
        metrics.append(found)
    for ours, theirs in zip(jax.tree.leaves(whole.state), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name in ("pack/tokens", "pack/slots", "pack/pairs", "policy/tokens"):
        assert whole.metrics[name] == sum(m[name] for m in metrics)
    for name in ("loss/total", "train/gradient_norm"):
        np.testing.assert_allclose(whole.metrics[name], np.mean([m[name] for m in metrics]), rtol=1e-6)
    actions = [m["policy/tokens"] for m in metrics]
    entropy = np.average([m["policy/entropy"] for m in metrics], weights=actions)
    np.testing.assert_allclose(whole.metrics["policy/entropy"], entropy, rtol=1e-6)


@pytest.mark.parametrize("measure", ["gradients", "terms"])
def test_an_update_holds_the_ratio_of_the_terms_that_it_trains(measure):
    """With a gain of 1 the ratio of the update itself is the target, by the metrics of a plain update with that
    lambda."""
    learner, state, chosen = made(policy="reinforce")
    # All positive: so is each token's loss -A log p, and the size of the policy term is the term itself.
    advantages = np.linspace(0.1, 1, len(chosen))
    objective = learner.objective(0)
    control = Control(target=0.3, measure=measure, gain=1.0)
    held = Update(learner, learner.loss_options(), RATE, control=control)
    updated = held(copy(state), chosen, weigh(chosen, advantages, objective), at_most=12, compare_gradients=True)
    factor = updated.observation_factor
    assert factor != 1.0
    assert updated.metrics["loss/observation_factor"] == factor
    told = dataclasses.replace(objective, observation_weight=objective.observation_weight * factor)
    plain = Update(learner, learner.loss_options(), RATE)
    expected = plain(copy(state), chosen, weigh(chosen, advantages, told), at_most=12, compare_gradients=True)
    ratio = expected.metrics["loss/gradient_ratio"]
    if measure == "terms":
        ratio = abs(expected.metrics["loss/observation"] / expected.metrics["policy/loss"])
    np.testing.assert_allclose(ratio, 0.3, rtol=1e-4)
    np.testing.assert_allclose(updated.metrics["loss/held_ratio"], 0.3, rtol=1e-4)
    for name in ("loss/total", "loss/gradient_ratio", "observation/loss"):
        np.testing.assert_allclose(updated.metrics[name], expected.metrics[name], rtol=1e-5, err_msg=name)


def test_losses_of_either_sign_do_not_cancel_in_the_size_of_the_policy_term():
    learner, state, chosen = made(policy="reinforce")
    signs = np.where(np.arange(len(chosen)) % 2, 1.0, -1.0)
    factors = []
    for advantages in (signs, np.ones(len(chosen))):
        held = Update(learner, learner.loss_options(), RATE, control=Control(target=0.3, measure="terms", gain=1.0))
        weights = weigh(chosen, advantages, learner.objective(0))
        factors.append(held(copy(state), chosen, weights, at_most=12).observation_factor)
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-5)


@pytest.mark.parametrize("name", ["loss/total", pytest.param("train/gradient_norm", marks=pytest.mark.variant)])
def test_non_finite_update_is_an_error_with_its_numbers(name, monkeypatch):
    learner, state, chosen = made()
    chosen = chosen[:4]
    weights = weigh(chosen, np.zeros(4), learner.objective(0))
    finish = update_lib.finish_metrics
    monkeypatch.setattr(update_lib, "finish_metrics", lambda sums: finish(sums) | {name: float("nan")})
    with pytest.raises(UpdateError, match="nan"):
        Update(learner, learner.loss_options(), learner.schedule())(state, chosen, weights, at_most=4)
