"""The schedule, without an engine: who is served next, and who gives pages up."""

import dataclasses

import numpy as np
import pytest
from synthetic import TINY

from echo_jax.rollout.engine.layout import plan_layout
from echo_jax.rollout.engine.scheduler import Plan, Replica, View, feed_until, next_call, plan_call
from echo_jax.system.sharding import make_mesh

LAYOUT = plan_layout(
    TINY, make_mesh(1, 1, 1), sessions=8, max_tokens=32, page=4, chunk=8, rows=3, chunks_per_call=2, steps_per_call=4
)
POOL = 16  # pages, fewer than eight sessions need


def hungry(i, known=9, fed=0, **fields):
    return View(i, i, known=known, fed=fed, budget=4, **fields)


def ready(i, known=9, **fields):
    return hungry(i, known, known - 1, **fields)


def waiting(i, **fields):
    return dataclasses.replace(ready(i, **fields), budget=0)


def replica(views):
    held = [page for view in views for page in view.pages]
    holders = [held.count(page) for page in range(POOL)]
    return Replica(views, holders, holders.count(0))


def plan(views, feeds):
    return plan_call(replica(views), feeds, LAYOUT)


def feeds_next(views, layout):
    return next_call([replica(own) for own in views], layout)[0]


def test_a_call_feeds_if_it_is_full_or_if_rows_are_free():
    assert not feeds_next([[]], LAYOUT)
    assert feeds_next([[hungry(0)]], LAYOUT)
    assert feeds_next([[hungry(0), ready(1), ready(2)]], LAYOUT)
    assert not feeds_next([[hungry(0), *(ready(i) for i in (1, 2, 3))]], LAYOUT)
    assert feeds_next([[hungry(0), hungry(4), *(ready(i) for i in (1, 2, 3))]], LAYOUT)
    alike = [hungry(i, next_key=b"a") for i in (0, 4)]  # one of them waits for the other
    assert not feeds_next([[*alike, *(ready(i) for i in (1, 2, 3))]], LAYOUT)
    two = dataclasses.replace(LAYOUT, replicas=2)
    assert not feeds_next([[*(ready(i) for i in range(9))]], two)
    assert feeds_next([[*(ready(i) for i in range(9))], [hungry(9)]], two)  # the other replica's rows are free


def test_when_no_page_is_left_to_feed_with_the_ready_go_on():
    full = ready(0, pages=tuple(range(POOL)))
    assert next_call([replica([full, hungry(1)])], LAYOUT) == (False, [Plan([0], [])])
    full = hungry(0, known=99, fed=POOL * 4 - 4, pages=tuple(range(POOL)))
    news = [ready(i, known=1) for i in (1, 2, 3)]
    assert next_call([replica([full, *news])], LAYOUT) == (True, [Plan([0], [])])


def test_older_rollouts_come_first_as_many_as_there_are_rows():
    views = [ready(i, pages=(i, i + 8)) for i in (5, 1, 4, 2)]
    assert plan(views, feeds=False) == Plan([1, 2, 4], [])
    assert plan([hungry(i) for i in (3, 1, 2)], feeds=True) == Plan([1, 2], [])


def test_of_equal_prompts_one_is_computed():
    views = [hungry(0, next_key=b"a"), hungry(1, next_key=b"a"), hungry(2, next_key=b"b"), hungry(3)]
    assert plan(views, feeds=True).sessions == [0, 2]


def test_chunks_end_at_multiples_of_their_size():
    assert [feed_until(hungry(0, known=20, fed=fed), LAYOUT) for fed in (0, 3, 8, 18)] == [8, 8, 16, 19]


def test_pages_that_lack_come_from_sessions_that_wait_then_from_the_youngest():
    pages = lambda i: tuple(range(4 * i, 4 * i + 4))  # noqa: E731
    views = [
        ready(0, 17, pages=pages(0)),
        waiting(1, pages=pages(1)),
        ready(2, 17, pages=pages(2)),
        waiting(3, pages=pages(3)),
    ]
    # Each row needs a fifth page; one that waits gives four, the youngest first.
    assert plan(views, feeds=False) == Plan([0, 2], [3])
    all_ready = [dataclasses.replace(view, budget=4, known=17, fed=16) for view in views]
    assert plan(all_ready, feeds=False) == Plan([0, 1, 2], [3])
    # Shared pages are free only when all their holders gave them up.
    shared = [dataclasses.replace(view, pages=pages(0)) for view in all_ready[:2]]
    full = [*shared, waiting(7, pages=tuple(range(4, 16)))]
    assert plan(full, feeds=False) == Plan([0, 1], [7])


def test_nobody_gives_up_pages_that_do_not_suffice():
    shared = tuple(range(4))
    views = [ready(0, 5, pages=tuple(range(4, 16))), ready(1, 17, pages=shared), waiting(2, pages=shared)]
    assert plan(views, feeds=False) == Plan([0], [])
    assert plan([*views, waiting(3, pages=(4,))], feeds=False) == Plan([0], [])


def test_the_oldest_rollout_always_goes_on_and_nobody_takes_from_an_older_one():
    rng = np.random.default_rng(0)
    for _ in range(300):
        free, views = list(rng.permutation(POOL)), []
        for i in rng.permutation(8):
            fed = int(rng.integers(0, 28))
            need = -(-fed // 4)
            if need <= len(free):
                taken, free = free[:need], free[need:]
                known = fed + 1 + int(rng.integers(0, 2)) * int(rng.integers(0, 29 - fed))
                views.append(View(int(i), int(i), known, fed, int(rng.integers(0, 4)), tuple(map(int, taken))))
        busy = sorted(view.session for view in views if view.budget)
        for feeds in (True, False):
            wanted = sorted(view.session for view in views if (view.hungry if feeds else view.ready))
            found = plan(views, feeds)
            assert set(found.sessions) <= set(wanted)
            assert found.sessions[:1] == busy[:1] or wanted[:1] != busy[:1]
            assert not set(found.sessions) & set(found.evict)
            assert all(victim > found.sessions[0] for victim in set(found.evict) & set(busy))
        assert bool(next_call([replica(views)], LAYOUT)[1][0].sessions) == bool(busy)


@pytest.mark.parametrize("budget", [0, 3])
def test_a_session_that_waits_is_neither_hungry_nor_ready(budget):
    for fed in (3, 8):
        view = View(0, 0, known=9, fed=fed, budget=budget)
        assert (view.hungry, view.ready) == (budget > 0 and fed == 3, budget > 0 and fed == 8)
