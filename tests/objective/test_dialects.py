"""The recipes of other systems on a handful of tokens, against numbers from plain arithmetic outside this package.

Every token has the id 0 of a vocabulary of two, and its hidden state is the difference d of the two logits: its
log-prob at temperature T is -log(1 + exp(-d / T)). Expected values were computed token by token with `math`, from the
formulas of each system.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from synthetic import make_trajectory

from echo_jax.objective.advantages import ADVANTAGES, advantages_of
from echo_jax.objective.loss import HeadOptions, LossOptions, denominators, echo_loss
from echo_jax.objective.packing import pack
from echo_jax.objective.policy_losses import POLICY_LOSSES, Tokens
from echo_jax.objective.selection import Selection
from echo_jax.objective.weights import Objective, weigh_each
from echo_jax.roles import Role

ROLES = {"A": Role.ACTION, "O": Role.OBSERVATION, "N": Role.BOILERPLATE, "F": Role.FEEDBACK, "W": Role.WARNING}
HEAD = HeadOptions(token_block=8, vocab_block=2)


def rollout(roles: str, number: int, reward: float, sampler, **fields):
    """Returns a rollout of a prompt token and one token of each role. `sampler`: log-probs, 0 where not sampled."""
    role = [Role.PROMPT, *(ROLES[letter] for letter in roles)]
    return make_trajectory([0] * len(role), role, logprob=[0.0, *sampler], rollout=number, reward=reward, **fields)


def loss_of(chosen, logits, objectives, options, advantages, old=None, reference=None):
    """Returns the metrics, and the loss's gradient by the difference of logits at each token of each rollout."""
    weights = weigh_each(chosen, advantages, objectives)

    def packed(logprobs):
        own = [dataclasses.replace(t, logprob=np.float32([0.0, *p])) for t, p in zip(chosen, logprobs, strict=True)]
        return pack(own, weights, length=16, rows=len(chosen), micro_batches=1).batch

    batch = packed([t.logprob[1:] for t in chosen])
    if old is not None:
        batch = batch.replace(old_logprob=packed(old).sampler_logprob)
    if reference is not None:
        batch = batch.replace(reference_logprob=packed(reference).sampler_logprob)
    given = packed(logits).sampler_logprob[0]  # where packing puts each token
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    inverse = denominators(batch)
    head = jnp.asarray([[1.0], [0.0]])
    of = lambda d: echo_loss(d[..., None], head, micro, inverse, options)  # noqa: E731
    grads, sums = jax.grad(of, has_aux=True)(jnp.asarray(given))
    numbers = [np.float32([0.0, *np.arange(len(d)) + 1 + 100 * i]) for i, d in enumerate(logits)]
    places = packed([n[1:] for n in numbers]).sampler_logprob[0]
    return sums, [[float(grads[places == n].item()) for n in own[1:]] for own in numbers]


def check(sums, grads, expected_grads, **terms):
    for name, value in terms.items():
        np.testing.assert_allclose(sums[f"{name}"], value, rtol=2e-5, err_msg=name)
    for found, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-7)


def test_the_released_recipe_of_echo():
    """Advantage with ddof 1; clip .2 / .2; mean of sequences; λ .05 over |O| + 1e-3, without warnings, at the sampling
    temperature .8."""
    chosen = [
        rollout("AANOOFW", 0, 1.0, [-0.4, -1.1, 0, 0, 0, 0, 0]),
        rollout("AO", 1, 0.0, [-0.15, 0]),
    ]
    logits = [[0.5, -0.4, 1.0, 0.3, -1.2, 0.7, 2.0], [1.2, -0.5]]
    objective = Objective(
        observation_weight=0.05,
        temperature=0.8,
        observation_temperature=0.8,
        observation_epsilon=1e-3,
        selection=Selection(class_weights={"body": 1.0, "boilerplate": 1.0, "truncation": 1.0, "feedback": 1.0}),
    )
    advantages = advantages_of(chosen, functools.partial(ADVANTAGES["group"], ddof=1))
    np.testing.assert_allclose(advantages, [0.7071058, -0.7071058], rtol=1e-6)
    options = LossOptions(policy="grpo", head=HEAD)
    sums, grads = loss_of(chosen, logits, {"": objective}, options, advantages)
    expected = [
        [-0.0748606, -0.156003, -0.0013916, -0.0025453, -0.0051088, -0.0018385, 0.0],
        [0.0765811, -0.0203345],
    ]
    check(sums, grads, expected, **{"policy/loss": -0.0364389, "loss/observation": 0.0404379})


def test_prime_rls_default_in_two_environments():
    """DPPO with its KL to the sampler, r - mean, one mean over all action tokens of the batch; cross-entropy over all
    selected tokens of the batch, with a λ of .1 in one environment and .02 in the other."""
    chosen = [
        rollout("AAO", 0, 1.0, [-0.9, -0.75, 0], environment="x"),
        rollout("AOO", 1, 0.0, [-0.6, 0, 0], environment="x"),
        rollout("AO", 2, 1.0, [-1.2, 0], environment="y", group=1),
        rollout("AAO", 3, 0.5, [-0.7, -0.3, 0], environment="y", group=1),
    ]
    logits = [[0.8, -0.2, 0.4], [2.5, -0.3, 1.1], [-1.0, 0.6], [0.1, 0.9, -0.8]]
    objective = Objective(
        observation_weight=0.1,
        temperature=1.0,
        policy_normalizer="token",
        observation_normalizer="token",
        every_action=True,
    )
    objectives = {"": objective, "y": dataclasses.replace(objective, observation_weight=0.02)}
    options = LossOptions(policy="dppo", head=HEAD)
    advantages = advantages_of(chosen, ADVANTAGES["group_mean"])
    sums, grads = loss_of(chosen, logits, objectives, options, advantages)
    expected = [
        [5.47e-05, -0.0436749, -0.0080262],
        [0.010658, -0.0114889, -0.0049948],
        [-0.0272265, -0.0014174],
        [0.020933, 0.0115542, -0.0027599],
    ]
    check(sums, grads, expected, **{"policy/loss": 0.107834, "loss/observation": 0.0395285})
    assert sums["policy/clip_fraction"] == (1, 6)  # the first token moved up by more than .2


def test_which_tokens_the_masks_of_prime_rl_leave_out():
    """By probabilities: DPPO's in the direction of the advantage alone, IPO's in both, at half the distance."""
    before, now = (
        np.asarray([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        np.asarray([0.75, 0.65, 0.25, 0.35, 0.55, 0.75, 0.25]),
    )
    advantage = np.asarray([1.0, 1.0, 1.0, -2.0, -2.0, -2.0, -2.0])
    ratio, kl = now / before, 1e-3 * np.log(now / before) ** 2
    ones = jnp.ones(7)
    tokens = Tokens(*map(jnp.asarray, (np.log(now), np.log(before), advantage)), ones, ones, ones)
    for loss, kept in (
        ("dppo", [0, 1, 1, 1, 1, 1, 0]),
        ("ipo", [0, 0, 0, 0, 1, 0, 0]),
    ):
        found = POLICY_LOSSES[loss].surrogate(tokens)
        np.testing.assert_allclose(found.loss, kl - kept * ratio * advantage, rtol=1e-5, err_msg=loss)
        np.testing.assert_array_equal(found.metrics["clip_fraction"], ~np.asarray(kept, bool))


def test_verls_grpo():
    """Advantage with ddof 1; clip .2 / .28 and dual clip 3; token mean; truncated importance sampling up to 2 by token;
    its `low_var_kl`, clamped at 10, with a weight of .1."""
    chosen = [
        rollout("AA", 0, 1.0, [-0.9, -2.5]),
        rollout("AA", 1, 0.0, [-1.4, -2.0]),
        rollout("A", 2, 0.0, [-0.6]),
    ]
    logits = [[0.5, -0.7], [3.0, -2.0], [0.2]]
    objective = Objective(observation_weight=0.0, temperature=1.0, policy_normalizer="token", kl_weight=0.1)
    options = LossOptions(
        policy="grpo",
        head=HEAD,
        policy_options=(("clip_high", 0.28), ("dual_clip", 3.0)),
        importance_cap=2.0,
        kl_clamp=10.0,
    )
    advantages = advantages_of(chosen, functools.partial(ADVANTAGES["group"], ddof=1))
    old = [[-0.6, -1.3], [-1.5, -2.1], [-0.55]]
    reference = [[-0.5, -1.0], [-0.2, -14.0], [-0.8]]
    sums, grads = loss_of(chosen, logits, {"": objective}, options, advantages, old, reference)
    expected = [[-0.1332936, -0.3772055], [0.0001333, 0.0895819], [0.0537232]]
    check(sums, grads, expected, **{"policy/loss": -0.3850808, "loss/kl": 0.2007164})


def test_trls_grpo_with_its_sequence_mask():
    """Advantage with ddof 1 and epsilon 1e-4; token mean; a sequence whose ratio of probabilities to the sampler's is
    above 3 leaves, the others are weighed by it."""
    chosen = [
        rollout("AA", 0, 1.0, [-0.75, -1.2]),
        rollout("AA", 1, 0.0, [-0.9, -1.6]),
        rollout("A", 2, 0.5, [-0.6]),
    ]
    logits = [[0.5, -0.7], [1.0, -0.2], [0.2]]
    objective = Objective(observation_weight=0.0, temperature=0.9, policy_normalizer="token")
    options = LossOptions(policy="grpo", head=HEAD, importance_cap=3.0, importance_correction="sequence_mask")
    advantages = advantages_of(chosen, functools.partial(ADVANTAGES["group"], ddof=1, epsilon=1e-4))
    old = [[-0.7, -1.3], [-0.3, -0.85], [-0.5]]
    sums, grads = loss_of(chosen, logits, {"": objective}, options, advantages, old)
    expected = [[0.0, -0.1672708], [0.0, 0.0], [0.0]]
    check(sums, grads, expected, **{"policy/loss": -0.4479568})
