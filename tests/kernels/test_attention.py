"""Packed attention: all implementations agree in value and gradients, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from echo_jax.kernels.attention import packed_attention
from echo_jax.system.sharding import make_mesh

SHAPE = (2, 128, 2, 1, 128)  # rows, tokens, heads, heads of keys and values, head size


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    b, t, h, g, k = SHAPE
    arrays = (rng.normal(size=(b, t, heads, k)).astype(np.float32) for heads in (h, g, g))
    cuts = np.sort(rng.integers(0, t, (b, 3)), axis=1)
    segments = (np.arange(t)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32)  # from 0: padding in front
    return (*arrays, segments, rng.normal(size=(b, t, h, k)).astype(np.float32))


def value_and_gradients(*arrays, **options):
    q, k, v, segments, cotangent = arrays

    def scalar(q, k, v):
        out = packed_attention(q, k, v, segments, **options)
        return jnp.sum(out * cotangent), out

    grads, out = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def by_loops(q, k, v, segments):
    """Computes attention in float64, one token at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        g = h * k.shape[2] // q.shape[2]
        scores = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max())
        out[b, t, h] = p @ v[b, seen, g] / p.sum()
    return out


def test_attention_equals_a_loop_over_tokens():
    q, k, v, segments, _ = inputs()
    short = slice(None, 1), slice(None, 40)
    arrays = [x[short] for x in (q, k, v, segments)]
    np.testing.assert_allclose(packed_attention(*arrays), by_loops(*arrays), atol=1e-5)


@pytest.mark.parametrize("shape", [None, (1, 2, 1)])
def test_splash_kernel_equals_the_plain_one_in_interpret_mode(shape, monkeypatch):
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    arrays = inputs()
    expected = value_and_gradients(*arrays)
    mesh = None if shape is None else make_mesh(*shape)
    found = value_and_gradients(*arrays, implementation="splash", mesh=mesh)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


@pytest.mark.parametrize("length", [100, 700])
def test_rows_that_do_not_divide_into_blocks_are_refused(length):
    q, k, v, segments, _ = (np.resize(x, (1, length, *x.shape[2:])) for x in inputs())
    with pytest.raises(ValueError, match=f"not {length}"):
        packed_attention(q, k, v, segments, implementation="splash")
