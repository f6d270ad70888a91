"""What an engine does next: whom it feeds, who decodes, and whose pages it takes. Pure: states of sessions -> plan.

Older rollouts come first. A plan decides only when something is computed, never its bits, as long as no pages are
taken away.
"""

import collections
import dataclasses
from collections.abc import Sequence

from echo_jax.rollout.engine.layout import Layout


@dataclasses.dataclass(frozen=True)
class View:
    """What the scheduler sees of an open session."""

    session: int
    rollout: int  # the smaller, the sooner
    known: int  # ids that it holds; the last one is fed by the decoder, which samples after it
    fed: int  # ids whose keys and values are in its pages
    budget: int  # tokens left to sample in its turn; 0: it waits for a tool
    pages: Sequence[int] = ()
    next_key: bytes | None = None  # prefix that it would compute next; others with the same can wait for that

    @property
    def hungry(self) -> bool:
        """Whether it has ids to feed before it can decode."""
        return self.budget > 0 and self.fed < self.known - 1

    @property
    def ready(self) -> bool:
        """Whether it can decode."""
        return self.budget > 0 and self.fed == self.known - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The next call of one replica."""

    sessions: list[int]  # that the call serves, the oldest rollout first
    evict: list[int]  # whose pages are taken away before


@dataclasses.dataclass(frozen=True)
class Replica:
    """What the scheduler sees of a replica of the model."""

    views: Sequence[View]
    holders: Sequence[int]  # of each page of its pool
    available: int  # pages that nobody holds


def next_call(replicas: Sequence[Replica], layout: Layout) -> tuple[bool, list[Plan]]:
    """Returns whether the next call of all replicas is a prefill, and whom it serves in each.

    It is if it would be full, or if there are rows that no ready session fills; unless only the other kind can serve
    anybody.
    """
    hungry = sum(min(layout.chunks, len({_feeds_with(view) for view in r.views if view.hungry})) for r in replicas)
    ready = sum(min(layout.rows, sum(view.ready for view in replica.views)) for replica in replicas)
    feeds = hungry == layout.replicas * layout.chunks or ready < layout.replicas * layout.rows
    plans = [plan_call(replica, feeds, layout) for replica in replicas]
    if not any(plan.sessions for plan in plans):
        feeds = not feeds
        plans = [plan_call(replica, feeds, layout) for replica in replicas]
    return feeds, plans


def plan_call(replica: Replica, feeds: bool, layout: Layout) -> Plan:
    """Returns whom a prefill (`feeds`) or else a decode call of a replica serves.

    Pages that lack are taken from sessions that wait for a tool, then from younger rollouts, the youngest first. So the
    oldest of those that do not wait can always go on, and all of them end.
    """
    views, available = sorted(replica.views, key=_age), replica.available
    wanted = [view for view in views if (view.hungry if feeds else view.ready)]
    victims = sorted((view for view in views if view.pages), key=lambda view: (view.budget == 0, *_age(view)))
    given = collections.Counter()  # page -> holds of it that victims gave up
    chosen, evicted, computing = [], set(), set()
    for view in wanted:
        if len(chosen) == (layout.chunks if feeds else layout.rows):
            break
        if view.session in evicted or (feeds and view.next_key in computing):
            continue
        lacking = max(0, _pages_after(view, feeds, layout) - len(view.pages))
        free, counts, taken = available, given.copy(), 0
        for victim in reversed(victims):
            if lacking <= free or not (victim.budget == 0 or _age(victim) > _age(view)):
                break
            taken += 1
            counts.update(victim.pages)
            free += sum(counts[page] == replica.holders[page] for page in victim.pages)
        if lacking > free:
            break  # nobody loses pages in vain
        evicted.update(victims.pop().session for _ in range(taken))
        available, given = free - lacking, counts
        chosen.append(view.session)
        if view.next_key is not None:
            computing.add(view.next_key)
    return Plan(chosen, sorted(evicted))


def feed_until(view: View, layout: Layout) -> int:
    """Returns up to which of its ids a prefill call feeds a session: chunks are cut at multiples of their size, so that
    it does not matter where one starts."""
    return min(view.fed // layout.chunk * layout.chunk + layout.chunk, view.known - 1)


def _feeds_with(view: View) -> bytes | int:
    """Equal for sessions of which a call feeds only one."""
    return view.session if view.next_key is None else view.next_key


def _pages_after(view: View, feeds: bool, layout: Layout) -> int:
    end = feed_until(view, layout) if feeds else view.fed + min(view.budget, layout.steps)
    return -(-end // layout.page)


def _age(view: View) -> tuple[int, int]:
    return view.rollout, view.session
