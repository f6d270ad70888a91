"""The mixture of experts equals a plain sum, however uneven the choice, on any mesh; no token is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.kernels.experts import mix
from echo_jax.system.sharding import make_mesh

D, F, E, K = 8, 12, 6, 2


def inputs(seed=0, *, favoured=None):
    rng = np.random.default_rng(seed)
    sizes = [(4, 5, D), (D, E), (E, D, F), (E, D, F), (E, F, D)]
    x, router, *experts = (rng.normal(size=size).astype(np.float32) for size in sizes)
    if favoured is not None:  # all tokens strongly prefer one expert
        x[..., 0], router[0] = 1.0, 0.0
        router[0, favoured] = 100.0
    return x, router, *experts


def written_out(x, router, gate, up, down, *, normalize):
    """Computes it token by token, expert by expert, in numpy."""
    out = np.zeros_like(x, np.float64)
    for place in np.ndindex(x.shape[:-1]):
        token = x[place].astype(np.float64)
        logits = token @ router
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        chosen = np.argsort(-probability, kind="stable")[:K]
        for expert in chosen:
            share = probability[expert] / (probability[chosen].sum() if normalize else 1.0)
            gated = token @ gate[expert]
            out[place] += share * ((gated / (1.0 + np.exp(-gated)) * (token @ up[expert])) @ down[expert])
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("favoured", [None, 3], ids=["any", "all to one expert"])
def test_mixture_equals_the_plain_sum(favoured, normalize):
    values = inputs(favoured=favoured)
    found = jax.jit(lambda *a: mix(*a, per_token=K, normalize=normalize))(*values)
    np.testing.assert_allclose(found, written_out(*values, normalize=normalize), rtol=1e-4, atol=1e-4)


def test_router_and_sum_are_float32_when_experts_are_bfloat16():
    """The experts compute exactly, so the only rounding is in the router's softmax and the sum."""
    x, router, *_ = inputs(2)
    half = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    gate, up, down = np.zeros((E, D, F)), np.zeros((E, D, F)), np.zeros((E, F, D))
    gate[:, 0, :], up[:, 0, 0], down[:, 0, :] = 64.0, 1.0, 1.0
    x[..., 0] = 1.0
    down[:, 0, :] += np.arange(E)[:, None] / 64
    found = mix(*map(half, (x, router, gate, up, down)), per_token=E, normalize=False)
    logits = (half(x).reshape(-1, D) @ half(router)).astype(jnp.float32)
    expected = 64.0 * jax.nn.softmax(logits) @ (1.0 + np.arange(E) / 64)
    np.testing.assert_allclose(found.reshape(-1, D)[:, 0].astype(np.float32), expected.astype(jnp.bfloat16), rtol=1e-6)


def dense(x, router, gate, up, down):
    """Applies all experts to all tokens, with weight 0 where not chosen."""
    probability = jax.nn.softmax(x @ router)
    least = jax.lax.top_k(probability, K)[0][..., -1:]
    weight = jnp.where(probability >= least, probability, 0.0)
    weight = weight / weight.sum(-1, keepdims=True)
    made = jnp.einsum("btef,efd->bted", jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
                      * jnp.einsum("btd,edf->btef", x, up), down)  # fmt: skip
    return jnp.einsum("bted,bte->btd", made, weight)


def gradients(function, values):
    rng = np.random.default_rng(7)
    direction = rng.normal(size=values[0].shape)
    return jax.jit(jax.grad(lambda *a: jnp.sum(function(*a) * direction), argnums=tuple(range(5))))(*values)


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("favoured", [None, 3], ids=["any", "all to one expert"])
def test_gradients_equal_those_of_the_dense_sum(favoured):
    values = inputs(favoured=favoured)
    found = gradients(lambda *a: mix(*a, per_token=K, normalize=True), values)
    assert_close([found[0], *found[2:]], [(g := gradients(dense, values))[0], *g[2:]])
    if favoured is None:  # else the router is nearly certain
        assert_close(found[1:2], g[1:2])


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.variant) for s in ((4, 1, 1), (1, 4, 2), (1, 1, 4)))]
)
def test_every_mesh_computes_what_one_device_does(shape):
    values, mesh = inputs(1), make_mesh(*shape)
    one, many = (lambda *a, m=m: mix(*a, per_token=K, normalize=True, mesh=m) for m in (None, mesh))
    np.testing.assert_allclose(jax.jit(many)(*values), jax.jit(one)(*values), rtol=1e-4, atol=1e-4)
    assert_close(gradients(many, values), gradients(one, values))
