"""The optimizer equals AdamW after a global-norm clip, written out in numpy; norms and biases do not decay."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echo_jax.learner.optimizer import make_optimizer

B1, B2, DECAY, RATE = 0.9, 0.95, 0.1, 1e-2


def written_out(gradients, params, *, warmup_steps, clip_norm):
    """AdamW (arXiv 1711.05101, algorithm 2), each gradient first scaled to a global norm of at most `clip_norm`."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first, second = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for n, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        rate = RATE * min(1.0, n / (warmup_steps + 1))
        for name in params:
            g = gradient[name] * min(1.0, clip_norm / norm)
            first[name] = B1 * first[name] + (1 - B1) * g
            second[name] = B2 * second[name] + (1 - B2) * g**2
            step = first[name] / (1 - B1**n) / (np.sqrt(second[name] / (1 - B2**n)) + 1e-8)
            params[name] = params[name] - rate * (step + DECAY * params[name] * (name == "a"))
    return params


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_updates_equal_adamw_written_out(warmup_steps, clip_norm):
    # Broken on purpose: without the clip, with a rate of 0 first, with b1 and b2 exchanged, it differs by > 1e-4.
    rng = np.random.default_rng(0)
    sizes = {"a": (3, 2), "b_norm": 4, "c_bias": 3}
    draw = lambda scale: {name: scale * rng.normal(size=size) for name, size in sizes.items()}  # noqa: E731
    params = draw(1.0)
    gradients = [draw(scale) for scale in (0.01, 30.0, 0.1, 5.0, 0.01)]
    optimizer = make_optimizer(
        learning_rate=RATE, warmup_steps=warmup_steps, b1=B1, b2=B2, weight_decay=DECAY, clip_norm=clip_norm
    )
    own = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(own)
    for gradient in gradients:
        gradient = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
        updates, state = optimizer.update(gradient, state, own)
        own = optax.apply_updates(own, updates)
    expected = written_out(gradients, params, warmup_steps=warmup_steps, clip_norm=clip_norm)
    for name in own:
        np.testing.assert_allclose(own[name], expected[name], rtol=1e-5, atol=1e-6)
