"""Laws of the book of pages: holders add up, and no page is lost or given out twice."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.rollout.engine.pages import Pages, prefix_keys


@given(st.lists(st.tuples(st.sampled_from(["take", "find", "publish", "release", "forget"]), st.integers(0, 7))))
@settings(deadline=None)
def test_holders_add_up_whatever_happens(events):
    book, holders, published = Pages(4), collections.Counter(), {}
    for event, number in events:
        held = sorted(page for page, count in holders.items() if count)
        key = bytes([number])
        if event == "take":
            if len(held) == 4:
                with pytest.raises(RuntimeError, match="all 4 pages"):
                    book.take()
                continue
            page = book.take()
            assert page not in held
            holders[page] += 1
            published = {k: p for k, p in published.items() if p != page}
        elif event == "find":
            page = book.find(key)
            assert page == published.get(key)
            holders.update([] if page is None else [page])
        elif event == "publish" and held:
            page = held[number % len(held)]
            book.publish(page, key)
            if key not in published and page not in published.values():
                published[key] = page
        elif event == "release" and held:
            book.release(held[number % len(held)])
            holders[held[number % len(held)]] -= 1
        elif event == "forget":
            book.forget_prefixes()
            published = {}
        assert book.held == sum(count > 0 for count in holders.values())
    for page, count in holders.items():
        for _ in range(count):
            book.release(page)
        with pytest.raises(ValueError, match="more often than it was taken"):
            book.release(page)
    assert book.held == 0
    assert sorted(book.take() for _ in range(4)) == [0, 1, 2, 3]


def test_the_prefix_given_back_first_goes_first():
    book = Pages(3)
    pages = [book.take() for _ in range(3)]
    for i, page in enumerate(pages):
        book.publish(page, bytes([i]))
    for page in (pages[1], pages[0]):
        book.release(page)
    assert book.take() == pages[1]
    assert (book.find(bytes([1])), book.find(bytes([0])), book.find(bytes([2]))) == (None, pages[0], pages[2])


def test_a_key_is_of_all_ids_up_to_its_page():
    ids = list(range(10))
    keys = prefix_keys(ids, 4)
    assert len(keys) == len(set(keys)) == 3
    assert prefix_keys(ids[:8], 4) == keys[:2]
    assert prefix_keys([9, *ids[1:]], 4)[1] != keys[1]
    assert prefix_keys(ids[:9], 4)[2] != keys[2]
    assert prefix_keys([], 4) == []
