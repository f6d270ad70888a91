"""Packing loses nothing, repeats nothing, and keeps trajectories apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ECHO, GRAPHDEF, MESH, TINY, columns, initial, trajectories, trajectory

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
    layout = first_fit([[size] for size in sizes], length, rows)
    assert sorted(i for row in layout for i, _ in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i, _ in row) <= length for row in layout)
    assert len(layout) <= rows * capacity(len(sizes), 50, rows=rows, length=length)


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), min_size=1, max_size=30),
    st.integers(50, 120),
    st.integers(4, 6),
)
def test_the_branches_of_a_rollout_share_a_micro_batch(units, length, rows):
    layout = first_fit(units, length, rows)
    placed = {entry: row for row, entries in enumerate(layout) for entry in entries}
    assert sorted(placed) == [(unit, member) for unit, sizes in enumerate(units) for member in range(len(sizes))]
    assert sum(map(len, layout)) == len(placed)
    assert all(sum(units[unit][member] for unit, member in entries) <= length for entries in layout)
    for unit in range(len(units)):
        assert len({row // rows for (of, _), row in placed.items() if of == unit}) == 1


def test_a_rollout_that_needs_more_than_a_micro_batch_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match=r"3 branches of 90 tokens.*2 rows of 40.*pack\.rows"):
        first_fit([[10], [30, 30, 30]], 40, 2)


def test_number_of_a_rollout_is_its_own_in_a_micro_batch_of_several_processes():
    """Branches share it, also across rows; another process's numbers are others."""
    chosen = [dataclasses.replace(t, group=0, rollout=i // 2) for i, t in enumerate(trajectories(5, 8))]
    weights = weigh(chosen, np.ones(8), ECHO)
    packs = [pack(chosen, weights, length=40, rows=3, micro_batches=4, first_row=first).batch for first in (0, 3)]
    numbers = []
    for batch in packs:
        for micro in range(4):
            found = {}
            for t in chosen:
                at = [
                    (row, segment)
                    for row in range(3)
                    for segment in range(1, batch.segment_ids[micro, row].max() + 1)
                    if np.array_equal(batch.targets[micro, row][batch.segment_ids[micro, row] == segment], t.ids[1:])
                ]
                for row, segment in at:
                    of_segment = batch.rollout[micro, row][batch.segment_ids[micro, row] == segment]
                    found.setdefault(t.rollout, set()).update(of_segment.tolist())
            assert all(len(own) == 1 for own in found.values())
            assert len(set.union(set(), *found.values())) == len(found)
            numbers.append(set.union(set(), *found.values()))
    for one, other in zip(numbers[:4], numbers[4:], strict=True):
        assert not one & other
        assert all(1 <= number <= 6 * 40 for number in one | other)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_every_predicted_token_is_packed_once_with_all_its_fields(seed, count):
    chosen = trajectories(seed, count)
    packed, weights = packed_of(chosen)
    flat = {name: value.reshape(-1, 40) for name, value in columns(packed.batch).items()}
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
        expected |= {name: value[1:] for name, value in columns(w).items()}
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
    terms = ("denominators.policy", "denominators.observation")
    for name in ("policy_weight", "observation_weight", *terms, "rollout", "role", "targets"):
        assert not columns(packed.batch)[name][padding].any()


def test_trajectories_that_do_not_fit_are_an_error_with_the_numbers():
    long = trajectory(np.random.default_rng(0), 42)
    with pytest.raises(ValueError, match=r"42 tokens.*pack\.length = 40"):
        packed_of([long])
    lone = dataclasses.replace(long, **{name: getattr(long, name)[:1] for name in DTYPES})
    with pytest.raises(ValueError, match="1 tokens"):
        pack([lone], weigh([long], [0.0], ECHO), length=40, rows=2, micro_batches=1)
    three = [dataclasses.replace(long, rollout=i) for i in range(3)]
    weights = weigh(three, [0.0] * 3, ECHO)
    with pytest.raises(ValueError, match="3 rows"):
        pack(three, weights, length=41, rows=2, micro_batches=1)


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
