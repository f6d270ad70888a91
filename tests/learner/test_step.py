"""Laws of the loss and its gradient, through packing, the model and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import log_softmax
from synthetic import (
    ABSTRACT_PARAMS,
    ECHO,
    GRAPHDEF,
    MESH,
    OPTIONS,
    SPARSE,
    TINY,
    gradient,
    initial,
    relative_difference,
    trajectories,
)

from echo_jax.learner.optimizer import make_optimizer, make_schedule
from echo_jax.learner.step import abstract_state, init_state, make_train_step
from echo_jax.models.transformer import abstract_params, bind
from echo_jax.objective.advantages import advantages_of
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.packing import pack
from echo_jax.objective.weights import OBSERVATION_NORMALIZERS, POLICY_NORMALIZERS, weigh
from echo_jax.roles import ENVIRONMENT_ROLES, Role
from echo_jax.system.sharding import make_mesh

CHOSEN = trajectories(0)
ADVANTAGES = advantages_of(CHOSEN)
CLOSE = 1e-5


def unpacked_logits(params, chosen):
    """Returns the logits of each trajectory, alone in a row."""
    model = bind(GRAPHDEF, params)
    longest = max(len(t.ids) for t in chosen)
    ids = np.stack([np.pad(t.ids, (0, longest - len(t.ids))) for t in chosen])
    hidden = model(ids, np.broadcast_to(np.arange(longest), ids.shape), np.ones_like(ids))
    return [h[: len(t.ids) - 1] @ model.head().T for h, t in zip(hidden, chosen, strict=True)]


def unpacked_loss(params, chosen, advantages, objective):
    """Computes the paper's loss one trajectory at a time: eq. 2 (sequence means) and eq. 3 with Z = |O|."""
    policy_terms, observation_terms = [], []
    for logits, t, advantage in zip(unpacked_logits(params, chosen), chosen, advantages, strict=True):
        role = t.role[1:]
        at = np.arange(len(role)), t.ids[1:]
        tempered = jax.nn.log_softmax(logits / objective.temperature)[at]
        plain = jax.nn.log_softmax(logits)[at]
        ratio = jnp.exp(tempered - t.logprob[1:])
        surrogate = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
        action = role == Role.ACTION
        policy_terms.append(jnp.sum(jnp.where(action, surrogate, 0.0)) / max(action.sum(), 1))
        environment = (role >= Role.OBSERVATION).sum()
        observation = jnp.sum(jnp.where(role == Role.OBSERVATION, -plain, 0.0)) / max(environment, 1)
        observation_terms.append(observation)
    mean = lambda terms: sum(terms) / len(terms)  # noqa: E731
    return mean(policy_terms) + objective.observation_weight * mean(observation_terms)


def unpacked_gradient(params, objective):
    return jax.jit(jax.value_and_grad(lambda params: unpacked_loss(params, CHOSEN, ADVANTAGES, objective)))(params)


@pytest.mark.variant  # objective/test_loss.py has it in float64
def test_packed_loss_equals_the_papers_computed_one_trajectory_at_a_time():
    # Broken on purpose: dividing by |O'| instead of |O|, or one shared denominator, moves it by > 1e-2.
    sums, grads, params = gradient(CHOSEN, ADVANTAGES)
    loss, expected = unpacked_gradient(params, ECHO)
    np.testing.assert_allclose(sums["loss/total"], loss, rtol=CLOSE)
    assert relative_difference(grads, expected) < CLOSE


@pytest.mark.parametrize("observation_normalizer", OBSERVATION_NORMALIZERS)
@pytest.mark.parametrize("policy_normalizer", POLICY_NORMALIZERS)
@pytest.mark.parametrize(
    "layout",
    [
        {"length": 64, "rows": 2},
        {"length": 29, "rows": 1},
        pytest.param({"length": 200, "rows": 1}, marks=pytest.mark.variant),
    ],
)
def test_packing_and_micro_batches_change_nothing(observation_normalizer, policy_normalizer, layout):
    objective = dataclasses.replace(
        ECHO, observation_normalizer=observation_normalizer, policy_normalizer=policy_normalizer, observation_weight=0.5
    )
    one_a_row = gradient(CHOSEN, ADVANTAGES, objective=objective, length=29, rows=7)
    sums, grads, _ = gradient(CHOSEN, ADVANTAGES, objective=objective, **layout)
    assert relative_difference(grads, one_a_row[1]) < CLOSE
    for name in sums.keys() - {"pack/slots", "pack/efficiency"}:
        np.testing.assert_allclose(sums[name], one_a_row[0][name], rtol=CLOSE, atol=1e-6, err_msg=name)


def test_the_order_of_trajectories_changes_nothing():
    order = np.random.default_rng(0).permutation(len(CHOSEN))
    _, straight, _ = gradient(CHOSEN, ADVANTAGES)
    _, shuffled, _ = gradient([CHOSEN[i] for i in order], ADVANTAGES[order])
    assert relative_difference(shuffled, straight) < CLOSE


@pytest.mark.parametrize(
    "shape",
    [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.variant) for s in ((8, 1, 1), (1, 8, 1), (1, 4, 2), (4, 1, 2)))],
)
def test_eight_devices_equal_one(shape):
    sums, grads, params = gradient(CHOSEN, ADVANTAGES, rows=8, mesh=make_mesh(*shape))
    one_sums, one_grads, one_params = gradient(CHOSEN, ADVANTAGES)
    for own, expected in zip(jax.tree.leaves(params), jax.tree.leaves(one_params), strict=True):
        np.testing.assert_array_equal(own, expected)
    assert relative_difference(grads, one_grads) < CLOSE
    np.testing.assert_allclose(sums["loss/total"], one_sums["loss/total"], rtol=CLOSE)


@pytest.mark.variant  # kernels/test_experts.py compares every mesh
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_eight_devices_train_experts_as_one_does(shape):
    _, grads, _ = gradient(CHOSEN, ADVANTAGES, rows=8, mesh=make_mesh(*shape), config=SPARSE)
    _, one, _ = gradient(CHOSEN, ADVANTAGES, config=SPARSE)
    assert relative_difference(grads, one) < CLOSE
    assert all(np.abs(one["layers"][name]).max() > 0 for name in SPARSE.matrices)


def test_parameters_are_sharded_as_the_axis_table_says():
    _, params = initial(TINY, make_mesh(2, 2, 2))
    assert params["embedding"].sharding.shard_shape((64, 16)) == (32, 8)
    assert params["layers"]["gate"].sharding.shard_shape((2, 16, 32)) == (2, 8, 16)


def only(*roles):
    """Returns the trajectories with all other roles replaced by PROMPT, so that nothing else is trained."""
    return [
        dataclasses.replace(t, role=np.where(np.isin(t.role, roles), t.role, Role.PROMPT).astype(np.int8))
        for t in CHOSEN
    ]


def test_prompt_scaffold_status_and_pad_have_exactly_zero_gradient():
    untrained = only(Role.SCAFFOLD, *set(ENVIRONMENT_ROLES) - {Role.OBSERVATION})
    sums, grads, _ = gradient(
        untrained, np.ones(len(CHOSEN)), objective=dataclasses.replace(ECHO, observation_weight=9.0)
    )
    assert sums["loss/total"] == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_lambda_gives_observations_a_separate_gradient():
    # Broken on purpose: with the observation weight multiplied by the advantage this gradient is zero.
    _, grads, _ = gradient(only(Role.OBSERVATION), np.zeros(len(CHOSEN)))
    assert optax.tree.norm(grads) > 1e-4
    _, none, _ = gradient(
        only(Role.OBSERVATION), np.zeros(len(CHOSEN)), objective=dataclasses.replace(ECHO, observation_weight=0.0)
    )
    assert all((g == 0).all() for g in jax.tree.leaves(none))


def test_zero_variance_groups_keep_their_observation_gradient():
    failed = [dataclasses.replace(t, reward=0.0) for t in CHOSEN]
    advantages = advantages_of(failed)
    assert not advantages.any()
    sums, grads, _ = gradient(failed, advantages)
    _, observations, _ = gradient(only(*ENVIRONMENT_ROLES), advantages)
    assert sums["policy/loss"] == 0
    assert relative_difference(grads, observations) < CLOSE


def test_zero_lambda_is_grpo():
    objective = dataclasses.replace(ECHO, observation_weight=0.0)
    sums, grads, params = gradient(CHOSEN, ADVANTAGES, objective=objective)
    loss, expected = unpacked_gradient(params, objective)
    assert abs(float(sums["loss/total"]) - float(loss)) <= 1e-6
    assert relative_difference(grads, expected) <= 1e-6


def test_observation_count_does_not_scale_the_policy_gradient():
    doubled = [
        dataclasses.replace(
            t,
            ids=np.concatenate([t.ids, t.ids[-5:]]),
            role=np.concatenate([t.role, np.full(5, Role.OBSERVATION, np.int8)]),
            **{name: np.pad(getattr(t, name), (0, 5)) for name in ("tool", "logprob", "entropy", "version")},
        )
        for t in CHOSEN
    ]
    objective = dataclasses.replace(ECHO, observation_weight=0.0)
    _, once, _ = gradient(CHOSEN, ADVANTAGES, objective=objective)
    _, twice, _ = gradient(doubled, ADVANTAGES, objective=objective)
    assert relative_difference(twice, once) < 1e-6


def test_sampling_temperature_changes_only_the_policy_term():
    other = dataclasses.replace(ECHO, temperature=2.0)
    a, b = gradient(CHOSEN, ADVANTAGES)[0], gradient(CHOSEN, ADVANTAGES, objective=other)[0]
    assert a["loss/observation"] == b["loss/observation"]
    assert abs(a["policy/loss"] - b["policy/loss"]) > 1e-3


def test_imitation_is_the_mean_cross_entropy_of_the_actions():
    options = dataclasses.replace(OPTIONS, policy="imitation", policy_options=())
    objective = dataclasses.replace(ECHO, policy_normalizer="token", observation_weight=0.0, temperature=1.0)
    sums, _, params = gradient(CHOSEN, np.zeros(len(CHOSEN)), objective=objective, options=options)
    losses = []
    for logits, t in zip(jax.jit(lambda params: unpacked_logits(params, CHOSEN))(params), CHOSEN, strict=True):
        rows = zip(np.asarray(logits, np.float64), t.ids[1:], t.role[1:], strict=True)
        losses += [-log_softmax(row)[token] for row, token, role in rows if role == Role.ACTION]
    np.testing.assert_allclose(sums["loss/total"], np.mean(losses), rtol=CLOSE)


def three_updates(batches):
    """Returns the jitted step, the state after each of these (trajectories, advantages), and the losses."""
    optimizer = make_optimizer(make_schedule(1e-2, warmup_steps=1), b2=0.99, weight_decay=0.01, clip_norm=1.0)
    step = make_train_step(GRAPHDEF, abstract_state(ABSTRACT_PARAMS, optimizer, MESH), optimizer, MESH, OPTIONS)
    params = jax.tree.map(jnp.copy, initial(TINY, MESH)[1])  # the step donates it
    state = init_state(params, optimizer, MESH)
    losses = []
    for chosen, advantages in batches:
        weights = weigh(chosen, advantages, ECHO)
        packed = pack(chosen, weights, length=40, rows=2, micro_batches=4)
        state, sums = step(state, {}, to_mesh(packed.batch, MESH))
        losses.append(float(sums["loss/total"]))
    return step, state, losses


def test_the_update_compiles_once_whatever_the_batch_holds():
    batches = [trajectories(seed, count=3 + seed) for seed in range(4)]
    step, state, _ = three_updates([(chosen, np.ones(len(chosen))) for chosen in batches])
    assert int(state.step) == 4
    assert step._cache_size() == 1


def test_the_abstract_state_is_the_real_states_shape_and_sharding():
    mesh = make_mesh(2, 2, 2)
    optimizer = make_optimizer(make_schedule(1e-2, warmup_steps=1), b2=0.99, weight_decay=0.01, clip_norm=1.0)
    real = init_state(initial(TINY, mesh)[1], optimizer, mesh)
    abstract = abstract_state(abstract_params(TINY, mesh)[1], optimizer, mesh)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)  # noqa: E731
    assert described(real) == described(abstract)


def test_golden_losses():
    """Three updates of a tiny model. If a change is meant to move these numbers, print and replace them; otherwise it
    is a bug."""
    _, _, losses = three_updates([(CHOSEN, ADVANTAGES)] * 3)
    np.testing.assert_allclose(losses, [0.1158, -0.027901, -0.033335], rtol=1e-4)
