"""The packed, micro-batched, sharded loss and its gradient equal the papers' equations written out in float64.

Seen to fail when broken on purpose: |O'| for |O| in one normaliser; class weights missing in the numerator or put into
a denominator; one denominator for both terms; the shared prefix of a branch trained twice; the two clip bounds swapped;
the ratio to the sampler although old log-probs are given; the importance weight on observations too.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
from synthetic import GRAPHDEF, HEAD, MESH, OPTIONS, TINY, gradient, initial, relative_difference, varied

from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.models.transformer import bind
from echo_jax.objective import loss
from echo_jax.objective.advantages import ADVANTAGES, LengthPenalty, advantages_of
from echo_jax.objective.loss import IMPORTANCE_CORRECTIONS, HeadOptions, LossOptions, finish_metrics
from echo_jax.objective.policy_losses import KL_ESTIMATORS, POLICY_LOSSES
from echo_jax.objective.selection import Selection
from echo_jax.objective.weights import OBSERVATION_NORMALIZERS, POLICY_NORMALIZERS, Objective, weigh
from echo_jax.roles import Role
from echo_jax.system.sharding import make_mesh

CHOSEN = varied()
# The same tokens in three environments, of which each has rollouts with an advantage.
IN_ENVIRONMENTS = [
    dataclasses.replace(t, environment={0: "a", 1: "b", 9: "c"}[t.group], reward=1.0 if t.rollout == 7 else t.reward)
    for t in CHOSEN
]
LOW, HIGH, TEMPERATURE, WEIGHT, CONSTANT = 0.2, 0.28, 0.8, 0.3, 17.0
CLASS_WEIGHTS = {"body": 1.0, "boilerplate": 0.5, "truncation": 0.0, "feedback": 0.25, "warning": 0.0}
CLASS_WEIGHTS |= {"user": 0.75, "system": 0.0}
BASE = Objective(
    observation_weight=WEIGHT,
    temperature=TEMPERATURE,
    selection=Selection(class_weights=CLASS_WEIGHTS),
    observation_constant=CONSTANT,
    policy_constant=CONSTANT,
)
CLOSE = 1e-5


@functools.cache
def logits_and_pullback():
    """Returns each trajectory's logits, alone in a row, and the map from their gradients to the parameters'."""
    longest = max(len(t.ids) for t in CHOSEN)
    ids = np.stack([np.pad(t.ids, (0, longest - len(t.ids))) for t in CHOSEN])

    def forward(params):
        model = bind(GRAPHDEF, params)
        hidden = model(ids, np.broadcast_to(np.arange(longest), ids.shape), np.ones_like(ids))
        return hidden @ model.head().T

    logits, pullback = jax.vjp(jax.jit(forward), initial(TINY, MESH)[1])
    pullback = jax.jit(pullback)
    logits = np.asarray(logits, np.float64)

    def to_parameters(gradients):
        padded = np.zeros(logits.shape, np.float32)
        for i, g in enumerate(gradients):
            padded[i, : len(g)] = g
        return jax.device_get(pullback(padded)[0])

    return [z[: len(t.ids) - 1] for z, t in zip(logits, CHOSEN, strict=True)], to_parameters


CLIP = (("clip_high", HIGH), ("clip_low", LOW))


def clips_of(policy: str) -> tuple:
    """Returns the clip bounds of the tests, if the loss has a clip."""
    return tuple(pair for pair in CLIP if pair[0] in POLICY_LOSSES[policy].hyperparameters)


ONE_DEVICE = dict(length=64, rows=2)
EIGHT_DEVICES = dict(length=40, rows=8, mesh=make_mesh(2, 2, 2))


def check(
    objective: Objective | dict[str, Objective],
    options: LossOptions,
    advantage: str,
    *,
    layout=ONE_DEVICE,
    arguments=None,
    advantages=None,
    chosen=CHOSEN,
    **written_out,
):
    """Compares loss and gradient with the equations.

    Args:
      objective: one, or {environment: its own}.
      chosen: trajectories with the tokens of CHOSEN.
    """
    arguments = arguments or {}
    logits, to_parameters = logits_and_pullback()
    shared = dict(advantage=advantage, weight=WEIGHT, temperature=TEMPERATURE, low=LOW, high=HIGH, constant=CONSTANT)
    shared |= {"class_weights": tuple(CLASS_WEIGHTS.values()), "policy": options.policy}
    loss, by_logits = reference.loss(chosen, logits, **shared | arguments | written_out)
    expected = to_parameters(by_logits)
    if advantages is None:
        advantages = advantages_of(chosen, ADVANTAGES[advantage])
    sums, grads, _ = gradient(chosen, advantages, objective=objective, options=options, **layout, **arguments)
    np.testing.assert_allclose(sums["loss/total"], loss, rtol=CLOSE, atol=1e-7)
    assert relative_difference(grads, expected) < CLOSE


@pytest.mark.parametrize(
    ("policy", "layout"),
    [
        pytest.param(
            policy,
            layout,
            id=f"{policy}-{where}",
            # The losses' differences do not depend on devices; learner/test_step.py compares one of them by default.
            marks=[] if where == "one device" else pytest.mark.variant,
        )
        for policy in sorted(POLICY_LOSSES)
        for where, layout in (("one device", ONE_DEVICE), ("eight", EIGHT_DEVICES))
    ],
)
def test_every_policy_loss_with_every_normaliser_on_one_device_and_on_eight(policy, layout):
    options = LossOptions(policy=policy, policy_options=clips_of(policy), head=HEAD)
    for policy_normalizer in POLICY_NORMALIZERS:
        for observation_normalizer in OBSERVATION_NORMALIZERS:
            normalizers = dict(policy_normalizer=policy_normalizer, observation_normalizer=observation_normalizer)
            mode = "sft" if policy == "imitation" else "echo"
            every_action = POLICY_LOSSES[policy].every_action
            objective = dataclasses.replace(BASE, mode=mode, every_action=every_action, **normalizers)
            check(objective, options, POLICY_LOSSES[policy].advantage, layout=layout, **normalizers)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage(advantage):
    check(BASE, dataclasses.replace(OPTIONS, policy_options=CLIP), advantage)


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_std_of_an_advantage_with_ddof_1_and_another_epsilon(advantage):
    given = {"ddof": 1, "epsilon": 1e-4}
    advantages = advantages_of(CHOSEN, functools.partial(ADVANTAGES[advantage], **given))
    options = dataclasses.replace(OPTIONS, policy_options=CLIP)
    check(BASE, options, advantage, advantages=advantages, advantage_options=given)


@pytest.mark.parametrize("advantage", ["group_mean", pytest.param("batch", marks=pytest.mark.variant)])
def test_length_penalty(advantage):
    weights = (0.25, 0.1, 0.2)
    penalty = LengthPenalty(*weights, max_tokens=40, max_turns=3)
    advantages = advantages_of(CHOSEN, ADVANTAGES[advantage], penalty=penalty)
    options = dataclasses.replace(OPTIONS, policy_options=CLIP)
    check(BASE, options, advantage, advantages=advantages, advantage_options={"penalty": (*weights, 40, 3)})


@pytest.mark.parametrize("policy_normalizer", POLICY_NORMALIZERS)
def test_filtered_and_masked_rollouts_leave_the_policy_term_and_keep_their_observations(policy_normalizer):
    objective = dataclasses.replace(
        BASE, policy_normalizer=policy_normalizer, filter_zero_variance=True, mask_overlong=True
    )
    options = dataclasses.replace(OPTIONS, policy="dapo", policy_options=CLIP)
    check(
        objective,
        options,
        "group",
        zero_variance_filter=True,
        mask_overlong=True,
        policy_normalizer=policy_normalizer,
    )


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    options = dataclasses.replace(OPTIONS, policy_options=(*CLIP, ("dual_clip", 1.3)))
    check(BASE, options, "group", dual=1.3)


def test_env_only_trains_only_observations():
    check(dataclasses.replace(BASE, mode="env_only"), OPTIONS, "group", use_policy=False)


def noisy_logprobs(seed):
    rng = np.random.default_rng(seed)
    return [(t.logprob + rng.normal(0, 0.4, len(t.ids)) * (t.role == 3)).astype(np.float32) for t in CHOSEN]


@pytest.mark.parametrize(
    "policy", ["gspo", *(pytest.param(policy, marks=pytest.mark.variant) for policy in ("grpo", "cispo", "reinforce"))]
)
def test_old_log_probs_and_truncated_importance_sampling(policy):
    options = LossOptions(policy=policy, policy_options=clips_of(policy), head=HEAD, importance_cap=1.2)
    check(BASE, options, "group", arguments={"old": noisy_logprobs(1)}, cap=1.2)


@pytest.mark.parametrize("correction", IMPORTANCE_CORRECTIONS)
def test_importance_corrections_of_a_token_and_of_a_rollout_with_branches(correction):
    cap = {"token": 1.2, "sequence": 2.0}[correction.partition("_")[0]]
    options = dataclasses.replace(OPTIONS, policy_options=CLIP, importance_cap=cap, importance_correction=correction)
    check(BASE, options, "group", arguments={"old": noisy_logprobs(1)}, cap=cap, correction=correction)


def test_what_a_user_or_the_system_says_within_an_episode_is_an_observation_of_its_own_class():
    spoken = []
    for t in CHOSEN:
        role, third = t.role.copy(), np.arange(len(t.role)) % 3
        role[(role == Role.OBSERVATION) & (third == 1)] = Role.USER
        role[(role == Role.OBSERVATION) & (third == 2)] = Role.SYSTEM
        spoken.append(dataclasses.replace(t, role=role))
    assert {Role.USER, Role.SYSTEM} <= {role for t in spoken for role in t.role}
    check(BASE, dataclasses.replace(OPTIONS, policy_options=CLIP), "group", chosen=spoken)


def test_entropy_bonus():
    objective = dataclasses.replace(BASE, entropy_weight=0.3)
    options = dataclasses.replace(OPTIONS, policy_options=CLIP, entropy_bonus=True)
    check(objective, options, "group", entropy_weight=0.3)


def test_cross_entropy_at_the_sampling_temperature_over_a_length_with_an_epsilon():
    objective = dataclasses.replace(BASE, observation_temperature=TEMPERATURE, observation_epsilon=0.5)
    options = dataclasses.replace(OPTIONS, policy_options=CLIP)
    check(objective, options, "group", observation_temperature=TEMPERATURE, observation_epsilon=0.5)


MIXED_LOSSES = (("cispo", CLIP), ("gspo", CLIP), ("dppo", ()))


@pytest.mark.parametrize(
    ("policies", "layout"),
    [
        pytest.param(MIXED_LOSSES[:2], ONE_DEVICE, id="cispo, gspo"),
        pytest.param(MIXED_LOSSES[1:], EIGHT_DEVICES, id="gspo, dppo on eight"),
        pytest.param((("sapo", ()), ("reinforce", ())), ONE_DEVICE, id="sapo, reinforce", marks=pytest.mark.variant),
    ],
)
def test_environments_with_their_own_objectives_in_one_batch(policies, layout):
    """One run of three environments: GRPO and λ of the run, and two others with losses, advantages, λ, classes,
    temperatures and modes of their own; the terms have one denominator each."""
    (one, _), (other, _) = policies
    options = dataclasses.replace(
        OPTIONS, policy_options=CLIP, other_policies=policies, entropy_bonus=True, kl_estimator="k2"
    )
    classes = {
        "body": 0.5,
        "boilerplate": 0.0,
        "truncation": 1.0,
        "feedback": 0.0,
        "warning": 0.25,
        "user": 0.0,
        "system": 0.0,
    }
    of_b = dataclasses.replace(
        BASE,
        policy=1,
        observation_weight=0.7,
        temperature=1.1,
        selection=Selection(class_weights=classes),
        every_action=POLICY_LOSSES[one].every_action,
        entropy_weight=0.2,
    )
    of_c = dataclasses.replace(
        BASE, policy=2, mode="grpo", kl_weight=0.4, every_action=POLICY_LOSSES[other].every_action
    )
    advantages = np.zeros(len(CHOSEN))
    for environment, estimator in (("a", "group"), ("b", "group_mean"), ("c", "mean")):
        members = [i for i, t in enumerate(IN_ENVIRONMENTS) if t.environment == environment]
        advantages[members] = advantages_of([IN_ENVIRONMENTS[i] for i in members], ADVANTAGES[estimator])
        assert advantages[members].any()
    written = {
        "b": dict(policy=one, advantage="group_mean", weight=0.7, temperature=1.1, entropy_weight=0.2),
        "c": dict(policy=other, advantage="mean", use_observations=False, kl_weight=0.4),
    }
    written["b"]["class_weights"] = tuple(classes.values())
    check(
        {"": BASE, "b": of_b, "c": of_c},
        options,
        "group",
        layout=layout,
        advantages=advantages,
        chosen=IN_ENVIRONMENTS,
        arguments={"reference": noisy_logprobs(2)},
        environments=written,
        kl_estimator="k2",
    )


def test_the_kl_is_clamped():
    clamp = 0.05
    options = dataclasses.replace(OPTIONS, policy_options=CLIP, kl_clamp=clamp)
    arguments = {"reference": noisy_logprobs(2)}
    objective = dataclasses.replace(BASE, kl_weight=0.3)
    check(objective, options, "group", arguments=arguments, kl_weight=0.3, kl_clamp=clamp)


@pytest.mark.parametrize(
    "estimator", [pytest.param(name, marks=[] if name == "k3" else pytest.mark.variant) for name in KL_ESTIMATORS]
)
def test_the_kl_to_a_reference(estimator):
    options = LossOptions(policy="grpo", policy_options=CLIP, head=HEAD, kl_estimator=estimator)
    objective = dataclasses.replace(BASE, kl_weight=0.3)
    arguments = {"reference": noisy_logprobs(2)}
    check(objective, options, "group", arguments=arguments, kl_weight=0.3, kl_estimator=estimator)


def test_token_above_the_clip_probability_is_no_longer_trained():
    clip = 1 / 64  # about half of an untrained model's probabilities exceed this
    options = dataclasses.replace(OPTIONS, policy_options=CLIP, observation_clip=clip)
    check(BASE, options, "group", observation_clip=clip)


def test_scoring_only_trained_tokens_changes_no_gradient():
    """Also if a token that is not scored has a log-prob so low that its ratio to 0 would overflow."""
    advantages = advantages_of(CHOSEN)
    idle = [i for i, t in enumerate(CHOSEN) if advantages[i] == 0 and (t.role[1:] == 3).any()]
    assert idle
    low = [np.where((t.role == 3) & (i in idle), -200.0, t.logprob).astype(np.float32) for i, t in enumerate(CHOSEN)]
    chosen = [dataclasses.replace(t, logprob=own) for t, own in zip(CHOSEN, low, strict=True)]
    frugal = dataclasses.replace(OPTIONS, head=dataclasses.replace(HEAD, score_all=False))
    all_sums, expected, _ = gradient(CHOSEN, advantages, objective=BASE)
    sums, grads, _ = gradient(chosen, advantages, objective=BASE, options=frugal)
    assert relative_difference(grads, expected) < CLOSE
    np.testing.assert_allclose(sums["loss/total"], all_sums["loss/total"], rtol=CLOSE)
    assert 0 < sums["policy/tokens"] < all_sums["policy/tokens"]


def test_metrics_without_score_all_count_scored_tokens_by_class_and_tool():
    names = {
        "observation/tokens": (4, None),
        "observation/tokens_tool_bash": (4, 1),
        "observation/tokens_tool_python": (4, 2),
    }
    chosen = [dataclasses.replace(t, tool=(t.tool * (1 + i % 2)).astype(np.int8)) for i, t in enumerate(CHOSEN)]
    advantages = advantages_of(chosen)
    objective = dataclasses.replace(
        BASE, selection=Selection(class_weights={"body": 1.0}, tool_weights={"python": 0.0})
    )
    frugal = dataclasses.replace(OPTIONS, head=dataclasses.replace(HEAD, score_all=False))
    sums, _, _ = gradient(chosen, advantages, objective=objective, options=frugal)
    active = [w.active > 0 for w in weigh(chosen, advantages, objective)]
    assert sums["loss/active_fraction"].total == sum(a[1:].sum() for a in active)
    for name, (role, tool) in names.items():
        expected = sum(
            (a & (t.role == role) & (True if tool is None else t.tool == tool))[1:].sum()
            for t, a in zip(chosen, active, strict=True)
        )
        assert sums[name] == expected, name
    assert sums["observation/tokens_tool_python"] == 0 < sums["observation/tokens_tool_bash"]


def test_head_options_reach_the_kernel(monkeypatch):
    seen = []

    def spy(*arguments, **options):
        seen.append(options)
        return fused_logprobs(*arguments, **options)

    monkeypatch.setattr(loss, "fused_logprobs", spy)
    head = HeadOptions(token_block=24, vocab_block=56, score_all=True, mesh=None)
    gradient(CHOSEN, advantages_of(CHOSEN), objective=BASE, options=dataclasses.replace(OPTIONS, head=head))
    assert (seen[0]["token_block"], seen[0]["vocab_block"]) == (24, 56)


def test_metrics_equal_their_definitions():
    """Per token, in float64, over every predicted token."""
    low, high = 0.05, 0.1
    control = tuple(range(0, 64, 3))
    bounds = (("clip_low", low), ("clip_high", high))
    options = dataclasses.replace(OPTIONS, policy_options=bounds, control_ids=control)
    advantages = advantages_of(CHOSEN)
    sums, _, _ = gradient(CHOSEN, advantages, objective=dataclasses.replace(BASE, kl_weight=0.1), options=options)
    metrics = finish_metrics(sums)
    entropies, gaps, kls, stopped, reference_kls = [], [], [], [], []
    ce = {role: [] for role in range(4, 9)}
    correct, controls = [], []
    for t, z, advantage in zip(CHOSEN, logits_and_pullback()[0], advantages, strict=True):
        for p in range(1, len(t.ids)):
            row = reference.log_softmax(z[p - 1] / (TEMPERATURE if t.role[p] == 3 else 1.0))
            if t.role[p] in ce:
                ce[t.role[p]].append(-row[t.ids[p]])
            if t.role[p] == 4:
                correct.append(row.argmax() == t.ids[p])
            if t.role[p] != 3:
                continue
            difference = row[t.ids[p]] - t.logprob[p]
            if t.ids[p] in control:
                controls.append(np.exp(row[t.ids[p]]))
            entropies.append(-(np.exp(row) * row).sum())
            gaps.append(abs(difference))
            kls.append(np.exp(difference) - 1 - difference)
            ratio = np.exp(difference)
            stopped.append((advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low))
            if t.scored and p >= t.shared:
                reference_kls.append(np.exp(-row[t.ids[p]]) - 1 + row[t.ids[p]])  # k3 to log-probs of 0
    expected = {
        "policy/entropy": np.mean(entropies),
        "policy/control_share": len(controls) / len(entropies),
        "policy/control_probability": np.mean(controls),
        "policy/sampler_gap": np.mean(gaps),
        "policy/sampler_gap_max": np.max(gaps),
        "policy/mismatch_kl": np.mean(kls),
        "policy/clip_fraction": np.mean(stopped),
        "policy/reference_kl": np.mean(reference_kls),
        "observation/ce": np.mean(ce[4]),
        "observation/accuracy": np.mean(correct),
        "observation/ce_boilerplate": np.mean(ce[5]),
        "observation/ce_truncation": np.mean(ce[6]),
        "observation/ce_feedback": np.mean(ce[7]),
        "observation/ce_warning": np.mean(ce[8]),
        "observation/tokens": len(ce[4]),
        "observation/loss": metrics["loss/observation"] / WEIGHT,
    }
    assert 0.1 < expected["policy/clip_fraction"] < 0.9
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
