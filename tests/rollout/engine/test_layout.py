"""The size of an engine's pool, from its options and from what the devices have left."""

import dataclasses
import inspect

import pytest
from synthetic import TINY

from echo_jax.rollout.engine.layout import GIB, page_bytes, plan_layout
from echo_jax.rollout.engine.paged import PagedEngine
from echo_jax.system.sharding import make_mesh

ONE, SPREAD = make_mesh(1, 1, 1), make_mesh(2, 1, 2)


def layout(mesh=ONE, **options):
    return plan_layout(TINY, mesh, **{"sessions": 16, "max_tokens": 100} | options)


def test_by_default_all_sessions_fit_at_their_full_length():
    plan = layout()
    assert (plan.page, plan.chunk, plan.pages_a_session) == (16, 32, 7)
    assert (plan.sessions, plan.pages, plan.rows) == (16, 16 * 7, 8)
    assert plan.table == 8  # whole chunks


def test_each_replica_has_its_part_of_sessions_rows_and_pages():
    plan = layout(SPREAD, sessions=15, rows=6, pool_tokens=10 * 112)
    assert (plan.replicas, plan.sessions, plan.rows, plan.chunks) == (2, 5, 3, 4)
    assert plan.pages == 5 * 7


def test_the_pool_takes_what_the_devices_have_left():
    size = page_bytes(TINY, 16, 1)
    assert size == 2 * 16 * 2 * 2 * 8 * 4  # layers, tokens, keys and values, KV heads, numbers of a head, bytes
    assert page_bytes(dataclasses.replace(TINY, compute_dtype="bfloat16"), 16, 2) == size // 4
    plan = layout(free_bytes=50 * size)
    assert (plan.pages, plan.sessions) == (45, 6)
    assert layout(free_bytes=50 * size, admission="optimistic").sessions == 16
    assert layout(free_bytes=GIB) == layout()
    assert (plan.rows, plan.chunks, plan.chunk) == (
        layout().rows,
        layout().chunks,
        layout().chunk,
    )  # shapes that matter
    assert layout(pool_gib=30 * size / GIB).pages == 30


def test_the_engine_and_a_plan_without_it_have_the_same_options_and_defaults():
    engine, plan = (inspect.signature(function).parameters for function in (PagedEngine, plan_layout))
    given = ("config", "mesh", "sessions", "max_tokens", "free_bytes")
    assert {name: p.default for name, p in plan.items() if name not in given} == {
        name: p.default for name, p in engine.items() if name != "setup"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_tokens": 100, "page": 10, "chunk": 10, "max_tokens": 101}, "pool_tokens = 100 holds 100 tokens .* 101"),
        ({"pool_gib": 0.00001}, "pool_gib = 1e-05 holds 32 tokens .* one session may need max_tokens = 100"),
        ({"free_bytes": 20_000}, "0.9 of the 0.00 GiB that a device has left holds 64 tokens .*max_tokens = 100"),
        ({"free_bytes": -5}, "holds 0 tokens"),
        ({"pool_gib": 1.0, "pool_tokens": 100}, "pool_tokens = 100 and pool_gib = 1 say the same"),
    ],
)
def test_a_pool_too_small_for_one_session_is_an_error_with_both_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        layout(**options)
