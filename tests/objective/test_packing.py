"""Packing loses nothing, repeats nothing, and keeps trajectories apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ECHO, GRAPHDEF, MESH, TINY, initial, trajectories, trajectory

from echo_jax.models.transformer import bind
from echo_jax.objective.packing import capacity, first_fit, pack
from echo_jax.objective.weights import weigh
from echo_jax.rollout.trajectory import DTYPES


def packed_of(chosen, length=40, rows=2):
    weights = weigh(chosen, 1.0 + np.arange(len(chosen)), ECHO)
    micro_batches = capacity(len(chosen), 31, rows=rows, length=length)
    return pack(chosen, weights, length=length, rows=rows, micro_batches=micro_batches, tools=chosen[0].tools), weights


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 5))
def test_any_batch_fits_its_capacity_and_no_row_overflows(sizes, length, rows):
    layout = first_fit(sizes, length)
    assert sorted(i for row in layout for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= length for row in layout)
    assert len(layout) <= rows * capacity(len(sizes), 50, rows=rows, length=length)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_every_predicted_token_is_packed_once_with_all_its_fields(seed, count):
    chosen = trajectories(seed, count)
    packed, weights = packed_of(chosen)
    flat = {name: value.reshape(-1, 40) for name, value in vars(packed.batch).items()}
    found = []
    for row in range(len(flat["tokens"])):
        for segment in range(1, flat["segment_ids"][row].max() + 1):
            at = flat["segment_ids"][row] == segment
            found.append({name: value[row][at] for name, value in flat.items()})
    assert len(found) == count
    assert (flat["segment_ids"] > 0).sum() == sum(len(t.ids) - 1 for t in chosen)
    for t, w in zip(chosen, weights, strict=True):
        expected = {"tokens": t.ids[:-1], "targets": t.ids[1:], "role": t.role[1:], "tool": t.tool[1:]}
        expected |= {"sampler_logprob": t.logprob[1:], "old_logprob": t.logprob[1:]}
        expected |= {name: value[1:] for name, value in vars(w).items()}
        expected["positions"] = np.arange(len(t.ids) - 1)
        assert any(
            len(f["tokens"]) == len(t.ids) - 1
            and all(np.array_equal(f[name], value) for name, value in expected.items())
            for f in found
        )


def test_padding_has_no_weight():
    packed, _ = packed_of(trajectories(3))
    padding = packed.batch.segment_ids == 0
    assert padding.any()
    names = ("policy_weight", "observation_weight", "policy_denominator", "observation_denominator", "role", "targets")
    for name in names:
        assert not getattr(packed.batch, name)[padding].any()


def test_trajectories_that_do_not_fit_are_an_error_with_the_numbers():
    long = trajectory(np.random.default_rng(0), 42)
    with pytest.raises(ValueError, match=r"42 tokens.*pack\.length = 40"):
        packed_of([long])
    lone = dataclasses.replace(long, **{name: getattr(long, name)[:1] for name in DTYPES})
    with pytest.raises(ValueError, match="1 tokens"):
        pack([lone], weigh([long], [0.0], ECHO), length=40, rows=2, micro_batches=1)
    with pytest.raises(ValueError, match="3 rows"):
        pack([long] * 3, weigh([long], [0.0], ECHO) * 3, length=41, rows=2, micro_batches=1)


def test_no_gradient_crosses_a_segment_through_the_real_attention():
    """The gradient of one segment's hidden states by the embedding at each position is zero outside the segment."""
    chosen = trajectories(4, 9)
    packed, _ = packed_of(chosen)
    row = jax.tree.map(lambda x: x[0], packed.batch)
    assert (row.segment_ids.max(axis=1) >= 2).all()
    _, params = initial(TINY, MESH)
    table = np.asarray(params["embedding"])
    # One vocabulary entry per position, so that the embedding's gradient separates the positions.
    places = jnp.arange(row.tokens.size).reshape(row.tokens.shape)
    own = params | {"embedding": jnp.asarray(table[row.tokens.reshape(-1)])}

    def segment_sum(params, b, segment):
        hidden = bind(GRAPHDEF, params)(places, jnp.asarray(row.positions), jnp.asarray(row.segment_ids))
        mine = (jnp.asarray(row.segment_ids[b]) == segment)[:, None]
        return jnp.sum(jnp.where(mine, hidden[b], 0.0) ** 3)

    grads = jax.jit(jax.grad(segment_sum), static_argnums=1)
    for b in range(len(row.tokens)):
        for segment in range(1, row.segment_ids[b].max() + 1):
            reach = np.abs(np.asarray(grads(own, b, segment)["embedding"])).sum(-1).reshape(row.tokens.shape)
            inside = np.zeros_like(reach, bool)
            inside[b] = row.segment_ids[b] == segment
            assert (reach[~inside] == 0).all()
            assert (reach[inside] > 0).all()
