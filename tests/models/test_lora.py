"""Adapters: training changes the declared parameters and no others, and all parts of the system see the same model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic import ECHO, MESH, OPTIONS, SPARSE, TINY, initial, relative_difference, trajectories

from echo_jax.learner.optimizer import make_optimizer, make_schedule
from echo_jax.learner.step import abstract_state, init_state, loss_and_grads, make_train_step
from echo_jax.models import lora
from echo_jax.models.flops import train_flops
from echo_jax.models.lora import Lora
from echo_jax.models.transformer import LINEAR, abstract_params, bind
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.packing import pack
from echo_jax.objective.weights import weigh
from echo_jax.rollout.engine import EngineSetup
from echo_jax.rollout.engine.paged import PagedEngine
from echo_jax.system.sharding import make_mesh

ADAPTED = dataclasses.replace(TINY, lora=Lora(rank=3, alpha=6.0, targets=tuple(LINEAR)))
PARTLY = dataclasses.replace(TINY, lora=Lora(rank=2, alpha=1.0, targets=("value", "down")))
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 10)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(10), (2, 10))


@functools.cache
def random_params(config, shape=(1, 1, 1)):
    """Parameters whose adapters are not zero."""
    rng = np.random.default_rng(1)
    draw = lambda x: jax.device_put((0.2 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)  # noqa: E731
    return jax.tree.map(draw, abstract_params(config, make_mesh(*shape))[1])


def hidden(config, params):
    graphdef, _ = abstract_params(config, MESH)
    return jax.jit(lambda params: bind(graphdef, params)(TOKENS, POSITIONS, np.ones_like(TOKENS)))(params)


def packed(mesh=MESH):
    chosen = trajectories(0, count=6)
    batch = pack(chosen, weigh(chosen, np.linspace(-1, 1, 6), ECHO), length=40, rows=4, micro_batches=3).batch
    return to_mesh(batch, mesh)


def test_initial_adapter_changes_nothing():
    params = initial(ADAPTED, MESH)[1]
    trained, frozen = lora.split(params)
    assert jax.tree.structure(frozen) == jax.tree.structure(initial(TINY, MESH)[1])
    np.testing.assert_array_equal(hidden(ADAPTED, params), hidden(TINY, frozen))
    for name, x in trained["layers"].items():
        assert (x != 0).any() == name.endswith(lora.A)


def merged_layers(params, config):
    layers = params["layers"]
    one = lambda name: jnp.stack([lora.merged(layers, name, (i,), config) for i in range(TINY.num_layers)])  # noqa: E731
    return {name: one(name) for name in lora.without(layers)}


@pytest.mark.parametrize(
    "config", [ADAPTED, pytest.param(PARTLY, marks=pytest.mark.variant)], ids=["all matrices", "two of them"]
)
def test_merged_weights_act_like_weights_with_adapters(config):
    params = random_params(config)
    merged = params | {"layers": merged_layers(params, config.lora)}
    assert jax.tree.structure(merged) == jax.tree.structure(initial(TINY, MESH)[1])
    np.testing.assert_allclose(hidden(TINY, merged), hidden(config, params), atol=2e-5)
    assert np.abs(hidden(config, params) - hidden(TINY, lora.without(params))).max() > 0.01


def test_an_adapter_is_added_in_float32_to_a_matrix_in_bfloat16():
    plain = random_params(PARTLY)["layers"]
    layers = plain | {name: x.astype("bfloat16") for name, x in lora.without(plain).items()}
    found = lora.merged(layers, "down", (1,), PARTLY.lora)
    a, b = (np.asarray(layers["down" + part][1], np.float64) for part in (lora.A, lora.B))
    expected = np.asarray(layers["down"][1], np.float64) + PARTLY.lora.scale * a @ b
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert lora.merged(layers, "up", (1,), PARTLY.lora).dtype == "bfloat16"


def test_split_and_join_are_inverse():
    params = random_params(PARTLY)
    trained, frozen = lora.split(params)
    assert set(trained) == {"layers"}
    assert set(trained["layers"]) == {"value_lora_a", "value_lora_b", "down_lora_a", "down_lora_b"}
    assert jax.tree.structure(lora.join(trained, frozen)) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, lora.join(trained, frozen), params)
    plain = random_params(TINY)
    assert lora.split(plain) == (plain, {})


@pytest.mark.parametrize(
    "config", [pytest.param(ADAPTED, marks=pytest.mark.variant), PARTLY], ids=["all matrices", "two of them"]
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.variant), "bfloat16"])
def test_training_moves_every_declared_parameter_and_no_other(config, dtype):
    config = dataclasses.replace(config, param_dtype=dtype)
    graphdef, params = initial(config, MESH)
    trained, frozen = lora.split(params)
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {dtype}
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
    before = jax.device_get(params)
    optimizer = make_optimizer(make_schedule(1e-2, warmup_steps=0), b2=0.99, weight_decay=0.01, clip_norm=1.0)
    state = init_state(jax.tree.map(jnp.copy, trained), optimizer, MESH)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained))
    step = make_train_step(graphdef, abstract_state(lora.split(params)[0], optimizer, MESH), optimizer, MESH, OPTIONS)
    for _ in range(2):  # in the first step only weight decay moves A, because B is zero
        state, _ = step(state, frozen, packed())
    assert step._cache_size() == 1
    after = jax.device_get(lora.join(state.params, frozen))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        moved = (x != y).any(axis=tuple(range(1, x.ndim)))  # in each layer
        assert moved.all() if lora.is_adapter(path[-1].key) else not moved.any(), path


@pytest.mark.variant  # learner/test_step.py has a whole model's on the same mesh
def test_adapter_gradients_on_eight_devices_equal_those_on_one():
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*shape)
        options = dataclasses.replace(OPTIONS, head=dataclasses.replace(OPTIONS.head, mesh=mesh))
        trained, frozen = lora.split(random_params(ADAPTED, shape))
        graphdef, _ = abstract_params(ADAPTED, mesh)
        grads = jax.jit(
            lambda trained, frozen, batch, graphdef=graphdef, mesh=mesh, options=options: loss_and_grads(
                graphdef, trained, frozen, batch, mesh, options
            )[1]
        )(trained, frozen, packed(mesh))
        found.append(jax.device_get(grads))
    assert relative_difference(found[1], found[0]) < 1e-5


def test_adapter_gradients_follow_from_the_full_gradient_by_the_chain_rule():
    """dA and dB from dW, written out: dA = scale · dW Bᵀ, dB = scale · Aᵀ dW."""
    graphdef, _ = abstract_params(PARTLY, MESH)
    plain, _ = abstract_params(TINY, MESH)
    params = random_params(PARTLY)
    trained, frozen = lora.split(params)
    merged = lora.without(params) | {"layers": merged_layers(params, PARTLY.lora)}
    grads = jax.jit(lambda t, f, b: loss_and_grads(graphdef, t, f, b, MESH, OPTIONS)[1])(trained, frozen, packed())
    whole = jax.jit(lambda p, b: loss_and_grads(plain, p, {}, b, MESH, OPTIONS)[1])(merged, packed())
    a, b = params["layers"]["down_lora_a"], params["layers"]["down_lora_b"]
    gradient = PARTLY.lora.scale * whole["layers"]["down"]
    expected = jnp.einsum("lfd,lrd->lfr", gradient, b), jnp.einsum("lfr,lfd->lrd", a, gradient)
    assert relative_difference([grads["layers"]["down_lora_a"], grads["layers"]["down_lora_b"]], list(expected)) < 1e-4


def test_sampler_uses_the_adapter_and_places_frozen_weights_once():
    graphdef, _ = abstract_params(PARTLY, MESH)
    setup = EngineSetup(
        graphdef=graphdef, model_config=PARTLY, mesh=MESH, sessions=2, max_tokens=24, temperature=1.0, stop_ids=(0,),
        seed=0,
    )  # fmt: skip
    engine = PagedEngine(setup)
    trained, frozen = lora.split(random_params(PARTLY))
    placed = []
    for version in range(3):
        adapters = jax.tree.map(lambda x, v=version: x * (1 + v), trained)
        engine.set_params(lora.join(adapters, frozen), version)
        session = engine.open(1, 0)
        engine.extend(session, (5, 6, 7), 16)
        turn = {}
        while engine.busy:
            turn |= engine.step()
        engine.close(session)
        ids = np.array([(5, 6, 7, *turn[0].ids)])
        model = bind(graphdef, lora.join(adapters, frozen))
        states = model(ids, np.arange(ids.size)[None], np.ones_like(ids))
        logprobs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", states, model.head()))[0]
        expected = [logprobs[i - 1, ids[0, i]] for i in range(3, ids.size)]
        np.testing.assert_allclose(turn[0].logprobs, expected, atol=1e-4)
        placed.append(engine._params["layers"]["query"])
    assert placed[0] is placed[1] is placed[2]
    engine.set_params(lora.join(trained, jax.tree.map(lambda x: x + 1, frozen)), 3)
    np.testing.assert_array_equal(engine._params["layers"]["query"], placed[0] + 1)


def test_bfloat16_parameters_have_float32_gradients_and_moments():
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    graphdef, params = initial(config, MESH)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    optimizer = make_optimizer(make_schedule(1e-2, warmup_steps=0), b2=0.99, weight_decay=0.01, clip_norm=1.0)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, MESH)
    step = make_train_step(graphdef, abstract_state(params, optimizer, MESH), optimizer, MESH, OPTIONS)
    state, _ = step(state, {}, packed())
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))} == {"float32"}
    grads = jax.eval_shape(lambda p, b: loss_and_grads(graphdef, p, {}, b, MESH, OPTIONS)[1], params, packed())
    assert {str(x.dtype) for x in jax.tree.leaves(grads)} == {"float32"}


def test_flops_of_experts_by_hand():
    """A token goes to two of six experts, and through the router over all six."""
    plain, sparse = (train_flops(config, 100, 0) for config in (TINY, SPARSE))
    assert sparse - plain == 6 * 100 * 2 * (16 * 6 + (2 - 1) * 3 * 16 * 32)


def test_flops_by_hand():
    """A frozen matrix needs no weight gradient: four FLOPs per weight and token, but six for an adapter's weight."""
    adapted = dataclasses.replace(TINY, lora=Lora(rank=2, alpha=1.0, targets=("down",)))
    matrices = train_flops(TINY, 1, 0) // 6
    assert train_flops(adapted, 100, 0) == 100 * (4 * matrices + 6 * 2 * 2 * (32 + 16))
    assert train_flops(adapted, 0, 10) == train_flops(TINY, 0, 10)
