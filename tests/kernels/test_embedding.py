"""The look-up over a mesh equals plain indexing, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.kernels.embedding import embed
from echo_jax.system.hlo import collectives
from echo_jax.system.sharding import make_mesh, sharding_of

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 1, 8), (4, 2, 1)]
V, D, B, T = 40, 16, 8, 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_equal_plain_indexing(shape, dtype):
    rng = np.random.default_rng(0)
    table, out = rng.normal(size=(V, D)).astype(np.float32), rng.normal(size=(B, T, D)).astype(dtype)
    tokens = rng.integers(0, V, (B, T))
    tokens[0, :4] = [0, 0, V - 1, V - 1]  # both ends, repeated so that gradients add up
    mesh = make_mesh(*shape)
    placed = [
        jax.device_put(x, sharding_of(mesh, axes))
        for x, axes in ((table, ("vocab", "embed")), (tokens, ("batch", "time")), (out, ("batch", "time", "norm")))
    ]

    def both(table, tokens, out, mesh):
        value, pull = jax.vjp(lambda table: embed(table, tokens, dtype, mesh), table)
        return value, pull(out)[0]

    value, gradient = jax.jit(both, static_argnums=3)(*placed, mesh)
    expected_value, expected_gradient = both(jnp.asarray(table), tokens, jnp.asarray(out), None)
    assert value.dtype == dtype
    np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_no_collective_is_larger_than_one_groups_result():
    mesh = make_mesh(4, 2, 1)
    axes = {"table": ("vocab", "embed"), "tokens": ("batch", "time")}
    table = jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=sharding_of(mesh, axes["table"]))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding_of(mesh, axes["tokens"]))
    gradient = jax.jit(jax.grad(lambda table, tokens: jnp.sum(embed(table, tokens, "float32", mesh) ** 2)))
    found = collectives(gradient.lower(table, tokens).compile().as_text())
    assert max(c.elements for c in found) <= max(V * D // 2, B // 4 * T * D)
