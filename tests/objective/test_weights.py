"""Weights by hand, and the laws that keep the two terms apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ECHO, OPTIONS, columns, make_trajectory, trajectories, varied

from echo_jax.objective.advantages import advantages_of
from echo_jax.objective.loss import denominators, echo_loss
from echo_jax.objective.packing import pack
from echo_jax.objective.selection import Selection
from echo_jax.objective.weights import (
    MODES,
    OBSERVATION_NORMALIZERS,
    POLICY_NORMALIZERS,
    SCHEDULES,
    Objective,
    mode_at,
    scheduled_weight,
    weigh,
    weigh_each,
)
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import Trajectory

S, P, A, O, N, T = Role.SCAFFOLD, Role.PROMPT, Role.ACTION, Role.OBSERVATION, Role.BOILERPLATE, Role.TRUNCATION  # noqa: E741
W = Role.WARNING


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
    assert weights.denominators["observation"].sum() == denominator


@pytest.mark.parametrize(("normalizer", "weight", "denominator"), [("sequence", 1 / 2, 1.0), ("token", 1.0, 2.0)])
def test_policy_normalizers_by_hand(normalizer, weight, denominator):
    weights = weigh_one(EXAMPLE, -3.0, dataclasses.replace(ECHO, policy_normalizer=normalizer))
    np.testing.assert_allclose(weights.policy_weight, np.where(EXAMPLE.role == A, weight, 0.0))
    assert weights.denominators["policy"].sum() == denominator


def test_the_constant_normalisers_divide_by_a_given_length():
    objective = dataclasses.replace(
        ECHO,
        observation_normalizer="constant",
        observation_constant=8.0,
        policy_normalizer="constant",
        policy_constant=16.0,
    )
    weights = weigh_one(EXAMPLE, 1.0, objective)
    np.testing.assert_allclose(weights.policy_weight, np.where(EXAMPLE.role == A, 1 / 16, 0.0))
    np.testing.assert_allclose(weights.observation_weight, np.where(EXAMPLE.role == O, 0.05 / 8, 0.0), rtol=1e-6)
    assert weights.denominators["policy"].sum() == weights.denominators["observation"].sum() == 1


def observation_loss(objective: Objective) -> float:
    """The observation term of three sequences, through packing and loss, over a vocabulary of 16 in which the model
    gives token k the probability 2^-k.

    Sequence one: bodies of probability 1/2, 1/4, 1/8 and two warnings; two: two bodies of 1/2; three: none.
    """
    sequences = [
        make_trajectory([0, 1, 2, 3, 1, 2], [P, O, O, O, W, W]),
        make_trajectory([0, 1, 1, 0], [P, O, O, A], rollout=1),
        make_trajectory([0, 0, 0], [P, A, A], rollout=2),
    ]
    batch = pack(sequences, weigh(sequences, np.zeros(3), objective), length=16, rows=1, micro_batches=1).batch
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    probabilities = np.full((16, 16), 1e-9)
    for k in range(16):  # hidden states are one-hot by target, so row k of the head holds the logits that score it
        probabilities[k, k] = 2.0**-k if k else 0.5
        probabilities[k, (k + 1) % 16] = 1.0 - probabilities[k].sum() + 1e-9
    head = jnp.asarray(np.log(probabilities).T, jnp.float32)
    hidden = jax.nn.one_hot(micro.targets, 16)
    total, sums = echo_loss(hidden, head, micro, denominators(batch), OPTIONS)
    assert total == sums["loss/observation"]
    return float(total)


def test_observation_loss_by_hand_with_the_papers_normaliser():
    """Z = |O|, with warnings only in Z: sequence one (1 + 2 + 3) ln 2 / 5, two (1 + 1) ln 2 / 2, three 0; lambda times
    their mean."""
    expected = 0.05 * (6 / 5 + 2 / 2 + 0) / 3 * np.log(2)
    np.testing.assert_allclose(observation_loss(ECHO), expected, rtol=1e-5)


def test_observation_loss_by_hand_with_prime_rls_normaliser():
    """Weight 0.1 for the role, over the global count of selected tokens: (1 + 2 + 3 + 1 + 1) ln 2 / 5."""
    prime = dataclasses.replace(ECHO, observation_weight=0.1, observation_normalizer="token")
    np.testing.assert_allclose(observation_loss(prime), 0.1 * 8 / 5 * np.log(2), rtol=1e-5)


def test_class_weights_enter_only_the_numerator():
    """Warnings at half weight: one has 1 ln 2, the other 2 ln 2; seven tokens are selected."""
    prime = dataclasses.replace(
        ECHO,
        observation_weight=0.1,
        observation_normalizer="token",
        selection=Selection(class_weights={"body": 1.0, "warning": 0.5}),
    )
    np.testing.assert_allclose(observation_loss(prime), 0.1 * (8 + 0.5 * 3) / 7 * np.log(2), rtol=1e-5)


def test_the_first_token_is_never_trained():
    weights = weigh_one(with_roles(A, O, A), 1.0, ECHO)
    assert weights.policy_weight[0] == weights.observation_weight[0] == weights.denominators["policy"][0] == 0


def test_a_sequence_without_observations_counts_in_the_mean_over_sequences():
    weights = weigh_one(with_roles(S, P, A, A), 1.0, ECHO)
    assert weights.observation_weight.sum() == 0
    assert weights.denominators["observation"].sum() == 1


def test_zero_lambda_leaves_the_policy_weights_bit_for_bit():
    for t in trajectories(1):
        with_echo, without = (
            weigh_one(t, 0.7, ECHO),
            weigh_one(t, 0.7, dataclasses.replace(ECHO, observation_weight=0.0)),
        )
        assert not without.observation_weight.any()
        for name in ("policy_weight", "denominators.policy", "advantage", "temperature"):
            np.testing.assert_array_equal(columns(with_echo)[name], columns(without)[name])


def test_advantage_scale_does_not_touch_the_observation_term():
    for t in trajectories(2):
        small, large = weigh_one(t, 0.1, ECHO), weigh_one(t, 1000.0, ECHO)
        np.testing.assert_array_equal(small.observation_weight, large.observation_weight)
        np.testing.assert_array_equal(small.policy_weight, large.policy_weight)


def test_the_sampling_temperature_is_for_actions_only():
    weights = weigh_one(EXAMPLE, 1.0, ECHO)
    np.testing.assert_allclose(weights.temperature, np.where(EXAMPLE.role == A, 0.8, 1.0))


def test_grpo_mode_equals_lambda_zero_bit_for_bit():
    chosen = varied()
    advantages = np.linspace(-1, 1, len(chosen))
    mode = weigh(chosen, advantages, dataclasses.replace(ECHO, mode="grpo"))
    zero = weigh(chosen, advantages, dataclasses.replace(ECHO, observation_weight=0.0))
    for a, b in zip(mode, zero, strict=True):
        for name in columns(a):
            assert columns(a)[name].tobytes() == columns(b)[name].tobytes()


def test_env_only_has_no_policy_term_and_skips_rollouts_of_low_quality():
    calls = [{"ok": 3, "unclosed": 1}, {"ok": 1, "unknown_tool": 3}, {"ok": 4}]
    chosen = [make_trajectory([0] * 4, [P, A, O, O], rollout=i, turns=4, calls=c) for i, c in enumerate(calls)]
    env_only = dataclasses.replace(ECHO, mode="env_only")
    trained = lambda **options: [  # noqa: E731
        bool(w.observation_weight.any() and w.denominators["observation"].any())
        for w in weigh(chosen, np.ones(3), dataclasses.replace(env_only, **options))
    ]
    assert trained() == [True, True, True]
    assert trained(min_valid_calls=0.5) == [True, False, True]
    assert trained(clean_parse=True) == [False, True, True]
    assert not any(w.policy_weight.any() or w.denominators["policy"].any() for w in weigh(chosen, np.ones(3), env_only))


def test_reward_adaptive_lambda_is_larger_for_failed_tasks():
    rewards = [1.0, 0.5, 0.0, 0.0, 1.0, 1.0]
    chosen = [make_trajectory([0] * 3, [P, A, O], group=i // 2, rollout=i, reward=r) for i, r in enumerate(rewards)]
    weights = weigh(chosen, np.zeros(6), dataclasses.replace(ECHO, reward_adaptive=True))
    np.testing.assert_allclose([w.observation_weight[2] / 0.05 for w in weights], [0.25, 0.25, 1, 1, 0, 0], rtol=1e-6)


def test_reward_adaptive_lambda_goes_by_the_range_of_the_tasks_rewards():
    t = make_trajectory([0] * 3, [P, A, O], reward=0.5, reward_range=(-1.0, 2.0))
    weights = weigh([t], [0.0], dataclasses.replace(ECHO, reward_adaptive=True))
    np.testing.assert_allclose(weights[0].observation_weight[2], 0.05 / 2)


def test_shared_prefix_is_trained_once_and_branches_share_one_normaliser():
    first = make_trajectory([1, 2, 3, 4, 5], [P, A, O, A, O])
    second = make_trajectory([1, 2, 3, 6, 7, 8], [P, A, O, A, A, O], shared=3)
    one, two = weigh([first, second], [1.0, 1.0], ECHO)
    np.testing.assert_allclose(one.policy_weight, [0, 1 / 4, 0, 1 / 4, 0])
    np.testing.assert_allclose(two.policy_weight, [0, 0, 0, 1 / 4, 1 / 4, 0])
    np.testing.assert_allclose(two.observation_weight / 0.05, [0, 0, 0, 0, 0, 1 / 3], rtol=1e-6)
    assert one.denominators["policy"].sum() + two.denominators["policy"].sum() == 1
    assert one.denominators["observation"].sum() + two.denominators["observation"].sum() == 1


def test_active_tokens_are_those_whose_log_probability_is_read():
    chosen = [make_trajectory([0] * 4, [P, A, O, N])]
    active = lambda advantage, **options: weigh(chosen, [advantage], dataclasses.replace(ECHO, **options))[0].active  # noqa: E731
    assert active(1.0).tolist() == [0, 1, 1, 0]
    assert active(0.0).tolist() == [0, 0, 1, 0]
    assert active(0.0, observation_weight=0.0).tolist() == [0, 0, 0, 0]
    assert active(0.0, kl_weight=0.1).tolist() == [0, 1, 1, 0]
    assert active(0.0, every_action=True).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("schedule", "at_0", "at_5", "at_10", "later"),
    [
        ("constant", 1, 1, 1, 1),
        ("linear", 1, 0.5, 0, 0),
        ("cosine", 1, 0.5, 0, 0),
        ("step", 1, 1, 0, 0),
        ("warmup", 0, 0.5, 1, 1),
    ],
)
def test_schedules_by_hand(schedule, at_0, at_5, at_10, later):
    values = [scheduled_weight(0.2, schedule, step, 10) for step in (0, 5, 10, 500)]
    np.testing.assert_allclose(values, 0.2 * np.asarray([at_0, at_5, at_10, later]), atol=1e-15)
    assert len(SCHEDULES) == 5
    ends = [scheduled_weight(0.2, schedule, step, 10, end=0.25) for step in (0, 10)]
    np.testing.assert_allclose(ends, 0.2 * (0.25 + 0.75 * np.asarray([at_0, at_10])))


def test_cosine_schedule_a_third_of_the_way():
    np.testing.assert_allclose(scheduled_weight(0.2, "cosine", 5, 15), 0.2 * 0.75)


def test_piecewise_schedule_joins_its_points_with_straight_lines():
    points = ((20, 0.0), (10, 1.0), (40, 0.5))
    values = [scheduled_weight(0.2, "piecewise", step, 0, points=points) for step in (0, 10, 15, 20, 30, 40, 99)]
    np.testing.assert_allclose(values, 0.2 * np.asarray([1, 1, 0.5, 0, 0.25, 0.5, 0.5]))


def test_rollouts_of_each_environment_are_weighed_by_its_own_objective():
    """As if each were alone, with the rules that look at a whole update too; an environment without settings of its own
    is under ""."""
    made = [dataclasses.replace(t, environment={0: "a", 1: "b", 9: "c"}[t.group]) for t in varied()]
    uncertain = Selection(top_entropy=0.5, dedupe=True, class_weights={"body": 1.0, "warning": 0.5})
    objectives = {
        "": ECHO,
        "b": dataclasses.replace(ECHO, mode="env_only", selection=uncertain, min_valid_calls=0.5),
        "c": dataclasses.replace(ECHO, observation_weight=0.5, temperature=0.6, policy=1, kl_weight=0.1),
    }
    advantages = advantages_of(made)
    whole = weigh_each(made, advantages, objectives)
    for environment, own in (("a", ""), ("b", "b"), ("c", "c")):
        members = [i for i, t in enumerate(made) if t.environment == environment]
        assert members
        alone = weigh([made[i] for i in members], advantages[members], objectives[own])
        for i, expected in zip(members, alone, strict=True):
            for name, values in columns(expected).items():
                assert columns(whole[i])[name].tobytes() == values.tobytes(), name


def test_the_cross_entropy_may_have_the_sampling_temperature():
    weights = weigh_one(EXAMPLE, 1.0, dataclasses.replace(ECHO, observation_temperature=0.7))
    np.testing.assert_allclose(weights.temperature, np.where(EXAMPLE.role == A, 0.8, 0.7))


def test_an_epsilon_is_added_to_the_length_that_an_observation_term_divides_by():
    for normalizer, length in (("observation", 5), ("selected", 3)):
        objective = dataclasses.replace(ECHO, observation_normalizer=normalizer, observation_epsilon=1e-3)
        expected = 0.05 / (length + 1e-3)
        np.testing.assert_allclose(weigh_one(EXAMPLE, 1.0, objective).observation_weight[EXAMPLE.role == O], expected)


def test_quality_filters_leave_the_policy_term_alone():
    calls = [{"ok": 3, "unclosed": 1}, {"ok": 4}]
    chosen = [make_trajectory([0] * 4, [P, A, O, O], rollout=i, turns=4, calls=c) for i, c in enumerate(calls)]
    poor, good = weigh(chosen, [1.0, 1.0], dataclasses.replace(ECHO, clean_parse=True))
    assert not poor.observation_weight.any()
    assert not poor.denominators["observation"].any()
    assert good.observation_weight.any()
    assert poor.policy_weight.tobytes() == good.policy_weight.tobytes()


def test_mode_holds_from_its_step_on():
    changes = ((10, "echo"), (30, "grpo"))
    assert [mode_at(step, "env_only", changes) for step in (0, 9, 10, 29, 30, 99)] == [
        "env_only", "env_only", "echo", "echo", "grpo", "grpo"
    ]  # fmt: skip
    assert mode_at(7, "echo", ()) == "echo"
    assert {mode for _, mode in changes} <= MODES.keys()


def test_the_last_listed_mode_of_a_step_holds():
    assert mode_at(3, "env_only", ((3, "grpo"), (3, "echo"))) == "echo"


def test_reward_adaptive_lambda_is_never_negative():
    chosen = [make_trajectory([0] * 3, [P, A, O], reward=2.0)]
    assert (
        weigh(chosen, [0.0], dataclasses.replace(ECHO, reward_adaptive=True))[0].observation_weight.tolist() == [0] * 3
    )


def test_unscored_rollouts_add_no_variance_and_no_reward():
    """One rollout fails, another is unscored with a made-up reward: the group has no variance, and its mean reward is
    0."""
    chosen = [
        make_trajectory([0] * 3, [P, A, O]),
        make_trajectory([0] * 3, [P, A, O], rollout=1, reward=1.0, scored=False),
    ]
    objective = dataclasses.replace(ECHO, filter_zero_variance=True, reward_adaptive=True)
    for w in weigh(chosen, [0.0, 0.0], objective):
        assert not w.policy_weight.any()
        np.testing.assert_allclose(w.observation_weight[2], 0.05)


POLICY_FIELDS = ("policy_weight", "denominators.policy", "kl_weight", "advantage")


@pytest.mark.parametrize("normalizer", POLICY_NORMALIZERS)
@pytest.mark.parametrize("mode", ["grpo", "echo", "env_only"])
def test_one_unscored_rollout_of_16_leaves_the_policy_term_of_the_other_15(normalizer, mode):
    everyone = trajectories(3, count=16)
    lost = dataclasses.replace(everyone[5], scored=False, outcome="infra", reward=0.7)
    chosen = [*everyone[:5], lost, *everyone[6:]]
    others = [*everyone[:5], *everyone[6:]]
    objective = dataclasses.replace(ECHO, mode=mode, policy_normalizer=normalizer, policy_constant=9.0, kl_weight=0.1)
    weights, expected = (weigh(rollouts, advantages_of(rollouts), objective) for rollouts in (chosen, others))
    mine = weights.pop(5)
    for name in POLICY_FIELDS:
        assert not columns(mine)[name].any(), name
        for ours, theirs in zip(weights, expected, strict=True):
            assert columns(ours)[name].tobytes() == columns(theirs)[name].tobytes(), name
    whole = weigh(everyone, advantages_of(everyone), objective)[5]
    for name in ("observation_weight", "denominators.observation"):  # its observations train as if it were scored
        assert columns(mine)[name].tobytes() == columns(whole)[name].tobytes(), name


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_unscored_rollouts_never_weigh_on_the_policy_term_of_the_others(data):
    """With branches, groups of their own, overlong rollouts; also if no rollout was scored."""
    scored = data.draw(st.lists(st.booleans(), min_size=9, max_size=9))
    chosen = [dataclasses.replace(t, scored=scored[t.rollout]) for t in varied()]
    objective = dataclasses.replace(
        ECHO,
        policy_normalizer=data.draw(st.sampled_from(sorted(POLICY_NORMALIZERS))),
        observation_normalizer=data.draw(st.sampled_from(sorted(OBSERVATION_NORMALIZERS))),
        filter_zero_variance=data.draw(st.booleans()),
        mask_overlong=data.draw(st.booleans()),
        every_action=data.draw(st.booleans()),
        kl_weight=0.1,
    )
    weights = weigh(chosen, advantages_of(chosen), objective)
    of_scored = [w for t, w in zip(chosen, weights, strict=True) if t.scored]
    kept = [t for t in chosen if t.scored]
    for ours, theirs in zip(of_scored, weigh(kept, advantages_of(kept), objective), strict=True):
        for name in POLICY_FIELDS:
            assert columns(ours)[name].tobytes() == columns(theirs)[name].tobytes(), name
    for t, w in zip(chosen, weights, strict=True):
        assert t.scored or not any(columns(w)[name].any() for name in POLICY_FIELDS)


def test_imitation_needs_no_score():
    chosen = [dataclasses.replace(t, scored=False) for t in trajectories(4)]
    scored = weigh(trajectories(4), np.zeros(7), dataclasses.replace(ECHO, mode="sft"))
    for ours, theirs in zip(weigh(chosen, np.zeros(7), dataclasses.replace(ECHO, mode="sft")), scored, strict=True):
        assert ours.policy_weight.tobytes() == theirs.policy_weight.tobytes()
        assert ours.denominators["policy"].tobytes() == theirs.denominators["policy"].tobytes()


def test_more_observations_anywhere_leave_the_policy_weights_bit_for_bit():
    short = with_roles(S, P, A, O, A, A)
    long = with_roles(S, P, A, O, O, O, N, A, A)
    few, many = weigh_one(short, 0.7), weigh_one(long, 0.7)
    for name in ("policy_weight", "advantage", "temperature"):
        np.testing.assert_array_equal(
            columns(few)[name][short.role == A], columns(many)[name][long.role == A], err_msg=name
        )
    assert few.denominators["policy"].sum() == many.denominators["policy"].sum()


@pytest.mark.parametrize("mode", ["grpo", "echo", "env_only"])
def test_process_without_rollouts_has_no_weights(mode):
    """Applies every rule to no rollouts: a step may have fewer rollouts than processes."""
    selection = Selection(top_entropy=0.5, dedupe=True)
    objective = Objective(
        1.0, 1.0, mode=mode, selection=selection, reward_adaptive=True, filter_zero_variance=True, mask_overlong=True,
        min_valid_calls=0.5, clean_parse=True,
    )  # fmt: skip
    assert weigh([], advantages_of([]), objective) == []
    packed = pack([], [], length=16, rows=2, micro_batches=1)
    assert packed.micro_batches == 0
