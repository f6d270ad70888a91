"""The transformer: packed sequences equal separate ones, decoding equals the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import MESH, SPARSE, TINY

from echo_jax.models.lora import Lora
from echo_jax.models.transformer import PARAM_AXES, REMAT, abstract_params, as_used, bind, init_params, init_pool
from echo_jax.system.sharding import MESH_AXES, MESH_AXIS_OF, make_mesh

UNTIED = dataclasses.replace(TINY, tie_embeddings=False)


def forward(config, params, tokens, positions, segment_ids):
    graphdef, _ = abstract_params(config, MESH)
    return jax.jit(lambda params: bind(graphdef, params)(tokens, positions, segment_ids))(params)


def random_tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize(
    "config", [pytest.param(TINY, marks=pytest.mark.variant), UNTIED, SPARSE], ids=["tied", "untied", "experts"]
)
def test_decoding_token_by_token_equals_the_forward_pass(config):
    graphdef, params = init_params(config, 3, MESH)
    assert ("lm_head" in params) is not config.tie_embeddings
    tokens = random_tokens(0, 3, 9)
    positions = np.broadcast_to(np.arange(9), (3, 9))
    whole = forward(config, params, tokens, positions, np.ones_like(tokens))
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    step = jax.jit(lambda params, t, p, pool: bind(graphdef, params).paged(t, p, pool, table, attention="xla"))
    pool = init_pool(config, 9, 4)
    for t in range(9):
        hidden, pool = step(params, tokens[:, [t]], positions[:, [t]], pool)
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], atol=2e-5)


def test_heads_as_one_axis_change_no_bit_of_decoding():
    """The sampler holds the matrices that yield heads so, with their biases and adapters."""
    adapters = Lora(2, 4.0, ("query", "key", "value", "attention_out"))
    config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True, lora=adapters)
    graphdef, params = init_params(config, 3, MESH)
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(0.0, 0.25, x.shape).astype(x.dtype), x.sharding)  # noqa: E731
    params = jax.tree.map(draw, params)
    held = jax.tree_util.tree_map_with_path(lambda path, x: x.reshape(as_used(path, x, config).shape), params)
    changed = {name for name, x in params["layers"].items() if x.shape != held["layers"][name].shape}
    assert changed == {name + part for name in ("query", "key", "value") for part in ("", "_bias", "_lora_b")}
    tokens, positions, table = random_tokens(0, 3, 9), np.broadcast_to(np.arange(9), (3, 9)), np.arange(9).reshape(3, 3)
    feed = jax.jit(
        lambda params: bind(graphdef, params).paged(
            tokens, positions, init_pool(config, 9, 4), jnp.asarray(table, jnp.int32), attention="xla"
        )
    )
    for a, b in zip(feed(params), feed(held), strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_writes_nothing():
    graphdef, params = init_params(TINY, 3, MESH)
    table, positions = jnp.array([[0], [1]]), jnp.array([[0], [-1]])
    model = bind(graphdef, params)
    _, pool = model.paged(jnp.array([[5], [6]]), positions, init_pool(TINY, 2, 4), table, attention="xla")
    layers = pool.reshape(TINY.num_layers, 2, 4, -1)
    assert (layers[:, 0, 0] != 0).all()
    assert (layers[:, 0, 1:] == 0).all()
    assert (layers[:, 1] == 0).all()


@pytest.mark.parametrize("config", [TINY, SPARSE], ids=["plain", "experts"])
def test_two_sequences_packed_in_a_row_equal_each_alone(config):
    _, params = init_params(config, 3, MESH)
    a, b = random_tokens(1, 5), random_tokens(2, 7)
    packed = forward(
        config,
        params,
        np.concatenate([a, b])[None],
        np.concatenate([np.arange(5), np.arange(7)])[None],
        np.concatenate([np.full(5, 1), np.full(7, 2)])[None],
    )[0]
    for found, alone in ((packed[:5], a), (packed[5:], b)):
        expected = forward(config, params, alone[None], np.arange(len(alone))[None], np.ones((1, len(alone)), np.int32))
        np.testing.assert_allclose(found, expected[0], atol=2e-5)


def test_rematerialisation_changes_no_gradient():
    tokens = random_tokens(4, 2, 6)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    grads = []
    for remat in REMAT:
        config = dataclasses.replace(TINY, remat=remat)
        graphdef, params = init_params(config, 3, MESH)

        def loss(params, graphdef=graphdef):
            return jnp.sum(bind(graphdef, params)(tokens, positions, np.ones_like(tokens)) ** 2)

        grads.append(jax.jit(jax.grad(loss))(params))
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads[0], other)


def test_bfloat16_compute_keeps_float32_parameters():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    _, params = init_params(config, 3, MESH)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = random_tokens(5, 1, 6)
    hidden = forward(config, params, tokens, np.arange(6)[None], np.ones_like(tokens))
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        hidden.astype(np.float32), forward(TINY, params, tokens, np.arange(6)[None], np.ones_like(tokens)), atol=0.1
    )


def test_initial_variance_follows_fan_in():
    """Matrices that end a residual branch start smaller the more layers there are; experts match a plain FFN."""
    config = dataclasses.replace(SPARSE, embed_dim=64, ffn_dim=96)
    _, params = init_params(config, 3, MESH)
    for name, fan_in, ends in (
        ("query", 64, False), ("attention_out", 32, True), ("router", 64, False), ("expert_gate", 64, False),
        ("expert_down", 96, True),
    ):  # fmt: skip
        expected = fan_in**-0.5 * ((2 * config.num_layers) ** -0.5 if ends else 1.0)
        assert float(params["layers"][name].std()) == pytest.approx(expected, rel=0.1), name


def test_axis_tables_are_consistent():
    logical = {axis for axes in PARAM_AXES.values() for axis in axes}
    assert logical <= MESH_AXIS_OF.keys()
    used = {axis for axes in MESH_AXIS_OF.values() for axis in ((axes,) if isinstance(axes, str) else axes or ())}
    assert used <= set(MESH_AXES)


def test_mesh_that_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"needs 27 devices, but only 8 are available"):
        make_mesh(3, 3, 3)
    with pytest.raises(ValueError, match=r"64 is not divisible by mesh\.tensor = 3"):
        abstract_params(TINY, make_mesh(1, 1, 3))
