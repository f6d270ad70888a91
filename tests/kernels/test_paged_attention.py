"""Attention over pages equals attention over the same keys and values in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from echo_jax.kernels import paged_attention as module
from echo_jax.kernels.paged_attention import paged_attention, pool_heads, write_pages

PAGE, PAGES, BATCH, HEADS, GROUPS, SIZE = 4, 40, 3, 4, 2, 16


@pytest.fixture(autouse=True)
def steps_of_one_page_and_of_two(monkeypatch):
    """Makes the loop leave its steps of a single page within these short sequences."""
    monkeypatch.setattr(module, "LOOP_SINGLY", 2 * PAGE)
    monkeypatch.setattr(module, "LOOP_TOKENS", 2 * PAGE)


def example(seed, lengths, tokens, *, pages=6):
    """Returns (q, pool, table, positions, k, v): sequences of these lengths whose last `tokens` ask; -1: no sequence.
    k and v [B, S, G, K] hold in one piece what lies in the pages."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    table = rng.permutation(PAGES)[: BATCH * pages].reshape(BATCH, pages).astype(np.int32)
    k, v = draw(BATCH, pages * PAGE, GROUPS, SIZE), draw(BATCH, pages * PAGE, GROUPS, SIZE)
    slots = np.broadcast_to(np.arange(pages * PAGE), (BATCH, pages * PAGE))
    pool = write_pages(jnp.full((PAGES, PAGE, 2 * GROUPS, SIZE), 1e4), k, v, table, slots)
    positions = np.asarray(lengths)[:, None] - tokens + np.arange(tokens)
    positions = np.where(np.asarray(lengths)[:, None] < 0, -1, positions).astype(np.int32)
    return draw(BATCH, tokens, HEADS, SIZE), pool, jnp.asarray(table), positions, k, v


def attention_over_one_piece(q, k, v, positions):
    mask = np.arange(k.shape[1]) <= positions[:, None]
    return jax.nn.dot_product_attention(q[:, None], k, v, mask=mask[:, None, None], implementation="xla")[:, 0]


@pytest.mark.parametrize("tokens", [1, 3])
def test_it_equals_attention_over_one_piece(tokens):
    q, pool, table, positions, k, v = example(0, (5, 24, 9), tokens)
    found = paged_attention(q, pool, table, positions)
    for column in range(tokens):
        expected = attention_over_one_piece(q[:, column], k, v, positions[:, column])
        np.testing.assert_allclose(found[:, column], expected, atol=1e-5)


def test_the_kernels_reference_agrees():
    """Through jax's reference of its TPU kernel, which runs anywhere."""
    q, pool, table, positions, _, _ = example(1, (5, 24, 9), 3)
    starts = jnp.arange(BATCH + 1) * 3
    lengths, count = positions[:, -1] + 1, jnp.full(1, BATCH)
    expected = ref_ragged_paged_attention(
        q.reshape(-1, HEADS, SIZE), pool, lengths, table, starts, count, sm_scale=SIZE**-0.5
    )
    np.testing.assert_allclose(paged_attention(q, pool, table, positions).reshape(expected.shape), expected, atol=1e-5)


def test_the_kernel_is_called_with_what_it_expects(monkeypatch):
    """Padding before, after and instead of a sequence's tokens: their results are those of the page loop."""
    q, pool, table, positions, _, _ = example(2, (6, 24, 9), 4)
    positions[0, :2], positions[1, 3:], positions[2] = -1, -1, -1
    kernel = lambda *arguments, num_kv_pages_per_block, num_queries_per_block, **rest: (  # noqa: E731
        ref_ragged_paged_attention(*arguments, **rest)
    )
    monkeypatch.setattr(module, "ragged_paged_attention", kernel)
    ours = paged_attention(q, pool, table, positions)
    theirs = paged_attention(q, pool, table, positions, implementation="ragged")
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(theirs[positions >= 0], ours[positions >= 0], atol=1e-5)
    assert (ours[positions < 0] == 0).all()


@pytest.mark.parametrize(("heads", "groups", "shards"), [(9, 3, 1), (3, 3, 1), (12, 6, 2)])
def test_a_pool_padded_for_the_kernel_gives_what_one_without_padding_gives(monkeypatch, heads, groups, shards):
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, BATCH, PAGE, groups, SIZE)).astype(np.float32)
    q = rng.normal(size=(BATCH, PAGE, heads, SIZE)).astype(np.float32)
    table, positions = jnp.arange(BATCH)[:, None], jnp.tile(jnp.arange(PAGE), (BATCH, 1))
    kernel = lambda *arguments, num_kv_pages_per_block, num_queries_per_block, **rest: (  # noqa: E731
        ref_ragged_paged_attention(*arguments, **rest)
    )
    monkeypatch.setattr(module, "ragged_paged_attention", kernel)
    plain = write_pages(jnp.zeros((BATCH, PAGE, 2 * groups, SIZE)), k, v, table, positions)
    expected = paged_attention(q, plain, table, positions)
    wide, size = pool_heads(groups, SIZE, "float32", "ragged", shards)
    assert (wide, size) == (groups + shards, 128)
    padded = write_pages(jnp.zeros((BATCH, PAGE, 2 * wide, size)), k, v, table, positions, shards=shards)
    found = [  # as each device sees it
        paged_attention(*arrays, table, positions, implementation="ragged", kv_heads=groups // shards)
        for arrays in zip(jnp.split(q, shards, axis=2), jnp.split(padded, shards, axis=2), strict=True)
    ]
    np.testing.assert_allclose(jnp.concatenate(found, axis=2), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "size", "dtype", "shards", "padded"),
    [
        (8, 128, "bfloat16", 8, (8, 128)),
        (8, 128, "bfloat16", 4, (8, 128)),
        (3, 64, "bfloat16", 1, (4, 128)),
        (5, 64, "bfloat16", 1, (8, 128)),
        (10, 80, "bfloat16", 2, (16, 128)),
        (3, 128, "float32", 1, (4, 128)),
    ],
)
def test_the_pool_has_the_next_heads_that_the_kernel_takes(heads, size, dtype, shards, padded):
    assert pool_heads(heads, size, dtype, "ragged", shards) == padded
    assert pool_heads(heads, size, dtype, "xla", shards) == (heads, size)


def test_the_length_of_the_table_and_the_company_change_no_bit():
    q, pool, table, positions, _, _ = example(3, (5, 13, 9), 2)
    attend = jax.jit(paged_attention)
    expected = attend(q, pool, table, positions)
    longer = jnp.concatenate([table, jnp.full((BATCH, 5), 7)], axis=1)
    np.testing.assert_array_equal(attend(q, pool, longer, positions), expected)
    order = np.asarray([2, 0, 1])
    np.testing.assert_array_equal(attend(q[order], pool, table[order], positions[order]), expected[order])
    others = positions.copy()
    others[1] = -1
    np.testing.assert_array_equal(attend(q, pool, table, others)[jnp.asarray([0, 2])], expected[jnp.asarray([0, 2])])


def test_padding_is_not_written():
    _, pool, table, positions, k, v = example(4, (5, 24, 9), 2)
    positions[1] = -1
    new = write_pages(jnp.zeros_like(pool), k[:, :2], v[:, :2], table, positions)
    written = {(int(n), int(s)) for n, s in zip(*np.nonzero(np.asarray(new).any((2, 3))), strict=True)}
    places = [(row, p) for row in (0, 2) for p in positions[row]]
    assert written == {(int(table[row, p // PAGE]), int(p % PAGE)) for row, p in places}
