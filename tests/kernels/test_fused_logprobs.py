"""The chunked LM head equals float64, value and gradients, ragged on every axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.kernels.fused_logprobs import fused_logprobs


def float64(hidden, head, targets, temperature):
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T / np.asarray(temperature)[:, None]
    top = logits.max(-1, keepdims=True)
    logsumexp = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    logprob = logits[np.arange(len(targets)), targets] - logsumexp
    p = np.exp(logits - logsumexp[:, None])
    entropy = logsumexp - (p * logits).sum(-1)
    onehot = np.eye(head.shape[0])[targets]
    return (logprob, logsumexp, entropy), p, onehot, logits


def problem(tokens, vocab, dim=24, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = (scale * rng.normal(size=(tokens, dim))).astype(np.float32)
    head = (rng.normal(size=(vocab, dim)) / np.sqrt(dim) * 4).astype(np.float32)
    return hidden, head, rng.integers(0, vocab, tokens), rng.uniform(0.5, 1.5, tokens).astype(np.float32), rng


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("tokens", "vocab", "block"), [(1, 130, 16), (37, 130, 16), (64, 200, 16), (50, 1187, 1000)])
def test_values_and_gradients_equal_float64(implementation, tokens, vocab, block):
    hidden, head, targets, temperature, rng = problem(tokens, vocab)
    g_logprob, g_logsumexp, g_entropy = rng.normal(size=(3, tokens)).astype(np.float32)

    def scalar(hidden, head):
        scores = fused_logprobs(
            hidden,
            head,
            jnp.asarray(targets),
            temperature=temperature,
            token_block=block,
            implementation=implementation,
        )
        mixed = scores.logprob * g_logprob + scores.logsumexp * g_logsumexp + scores.entropy * g_entropy
        return jnp.sum(mixed), scores

    (_, scores), grads = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(hidden, head)
    expected, p, onehot, logits = float64(hidden, head, targets, temperature)
    assert (np.asarray(scores.correct) == (logits.argmax(-1) == targets)).all()
    for own, value in zip(scores[:3], expected, strict=True):
        np.testing.assert_allclose(own, value, rtol=1e-5, atol=2e-5)
    spread = logits - (p * logits).sum(-1, keepdims=True)
    delta = p * ((g_logsumexp - g_logprob)[:, None] - g_entropy[:, None] * spread) + onehot * g_logprob[:, None]
    delta /= temperature[:, None]
    for own, value in zip(grads, (delta @ head.astype(np.float64), delta.T @ hidden.astype(np.float64)), strict=True):
        assert np.linalg.norm(own - value) <= 1e-5 * np.linalg.norm(value)


def test_no_array_of_all_logits_or_of_many_heads_exists_in_the_chunked_program():
    tokens, vocab = 512, 300
    hidden, head, targets, temperature, _ = problem(tokens, vocab)

    def loss(hidden, head, implementation):
        scores = fused_logprobs(
            hidden, head, jnp.asarray(targets), temperature=temperature, token_block=64, implementation=implementation
        )
        return jnp.sum(scores.logprob)

    def compiled(implementation):
        step = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        return step.lower(hidden, head, implementation).compile().as_text()

    assert f"[{tokens},{vocab}]" in compiled("reference")
    assert f"[{tokens},{vocab}]" not in compiled("xla")
    assert f"[64,{vocab}]" in compiled("xla")
    assert f"[{tokens // 64},{vocab},{hidden.shape[1]}]" not in compiled("xla")  # nor a copy of the head a block


def test_bad_input_is_an_error_that_names_it():
    hidden, head, targets, _, _ = problem(4, 10)
    with pytest.raises(ValueError, match=r"\[V, D\] \(10, 20\)"):
        fused_logprobs(hidden, head[:, :20], targets)
    with pytest.raises(ValueError, match="'mosaic'.*reference, xla"):
        fused_logprobs(hidden, head, targets, implementation="mosaic")
