"""A paged engine: sessions hold pages of a pool, and only those that sample take a row of the decoding batch.

In: the new ids of some sessions. Out: sampled ids and their log-probs. The ids, the book of pages and the schedule are
on the host, the pool is on the device. No shape depends on time, a token's place in its chunk depends on its position
alone, and a session reserves pages for its whole length when it opens: so results do not depend on when tools answer or
on what other sessions do, bit for bit. Sessions that begin with the same ids share the pages of these. Use an engine
from one thread.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from echo_jax.rollout.engine.interface import EngineSetup
from echo_jax.rollout.engine.layout import plan_layout
from echo_jax.rollout.engine.pages import Pages, prefix_keys
from echo_jax.rollout.engine.placement import Placement
from echo_jax.rollout.engine.programs import make_programs
from echo_jax.rollout.engine.scheduler import Replica, View, feed_until, next_call
from echo_jax.rollout.trajectory import Sampled

COUNTS = (
    *("prefill", "again", "shared", "decode", "evictions"),
    *("idle_ended", "idle_prefill", "idle_tools", "idle_unopened"),
)
FEWEST_ROWS = 0.75  # of a call's rows: when fewer go on, and others are ready, it ends to take them in


@dataclasses.dataclass
class Session:
    """The host's view of one session."""

    rollout: int  # global index: the root of its sampling keys
    replica: int  # that holds its pages
    temperature: float  # of its samples
    ids: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of the pages of its prompt
    prompt: int = 0  # how many of its first ids others can have too
    fed: int = 0  # ids whose keys and values are in its pages
    reached: int = 0  # the largest `fed` so far
    budget: int = 0  # tokens still to sample in this turn; 0: it samples none
    turn: int = 0  # where the turn begins
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of the turn
    entropies: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)

    def advance(self, end: int) -> None:
        """Notes that its pages hold the keys and values of its ids up to `end`."""
        self.fed, self.reached = end, max(self.reached, end)

    def said(self, stopped: bool) -> Sampled:
        """The turn so far."""
        ids, columns = self.ids[self.turn :], (self.logprobs, self.entropies, self.versions)
        return Sampled(tuple(ids), *map(tuple, columns), stopped)


class PagedEngine:
    """An `Engine`. The sampling key of a token is fold_in(fold_in(seed, rollout), position)."""

    def __init__(
        self,
        setup: EngineSetup,
        *,
        rows: int = 0,
        page: int = 0,
        chunk: int = 0,
        chunks_per_call: int = 0,
        steps_per_call: int = 8,
        pool_tokens: int = 0,
        pool_gib: float = 0.0,
        admission: str = "reserved",
        attention: str = "auto",
    ):
        """
        Args:
          rows: sessions that decode at once. 0, as for the next three: by the kind of device, see `DEFAULTS`; here
            half of the sessions, or on a CPU an eighth, at least 8 a replica.
          page: tokens in a page.
          chunk: ids of one session that a prefill call feeds at most, a multiple of `page`.
          chunks_per_call: sessions that a prefill call feeds at once.
          steps_per_call: maximum number of tokens that a row decodes in one call.
          pool_tokens: tokens in the pool of a process.
          pool_gib: size of the pool on each device, instead. Without both: as many tokens as all sessions could need,
            or as fit into nine tenths of the memory that the devices have left.
          admission: of sessions. "reserved": as many as the pool can hold at their full length. "optimistic": all;
            when no page is free, a session loses its own and computes them again later. That changes rounding, and
            which session it is depends on time: so runs are no longer equal bit for bit.
          attention: implementation of `paged_attention`.
        """
        self._placement = Placement(setup.mesh, setup.model_config)
        local = self._placement.local
        self._layout = layout = plan_layout(
            setup.model_config,
            local,
            sessions=setup.sessions,
            max_tokens=setup.max_tokens,
            free_bytes=_free_bytes(local.devices.flat, self._placement.bytes_a_device + setup.reserved_bytes),
            attention=attention,
            admission=admission,
            rows=rows,
            page=page,
            chunk=chunk,
            chunks_per_call=chunks_per_call,
            steps_per_call=steps_per_call,
            pool_tokens=pool_tokens,
            pool_gib=pool_gib,
        )
        self.max_tokens = setup.max_tokens
        self.sessions = layout.replicas * layout.sessions
        self._programs = make_programs(
            setup.graphdef,
            setup.model_config,
            local,
            layout,
            stop_ids=setup.stop_ids,
            attention=attention,
        )
        self._temperature = setup.temperature
        self._key = jax.random.key(setup.seed)
        self._books = [Pages(layout.pages) for _ in range(layout.replicas)]
        self._open: dict[int, Session] = {}
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self._books]
        self._params, self._pool, self._version = None, None, 0
        self._counts = collections.Counter()
        self._peak = 0.0

    # Weights.

    def set_params(self, params, version: int, open_sessions: str = "refuse") -> None:
        """Like `Engine.set_params`. Between two calls of `step` it may also change the weights of open sessions, whose
        later tokens then have the new version.

        Args:
          open_sessions: "refuse": an error. "recompute": what they hold is fed again, so that they go on as if the new
            weights had read it. "keep": they go on from keys and values of older weights, and the log-probs of what
            they sample are not what the trainer's forward gives.

        Raises:
          RuntimeError: a session is open, and they are refused.
          ValueError: `version` is older than that of an open session.
        """
        if self._open and open_sessions == "refuse":
            raise RuntimeError(f"weights may only change while no session is open, but {sorted(self._open)} are")
        if open_sessions not in ("refuse", "recompute", "keep"):
            raise ValueError(f"open_sessions = {open_sessions!r}: choose one of refuse, recompute, keep")
        if self._open and version < self._version:
            raise ValueError(f"version {version} is older than {self._version}, from which open sessions have sampled")
        placed = self._placement(params)  # an error leaves the engine as it was
        for own in self._open.values():
            if open_sessions == "recompute":
                self._release(own)
            else:  # nobody may share what it computes from now on with keys and values of older weights before it
                own.prompt, own.keys = 0, []
        for book in self._books:
            book.forget_prefixes()
        self._params, self._version = placed, version
        if self._pool is None:
            self._pool = self._programs.new_pool()

    def sleep(self) -> None:
        """Gives the memory of the weights and of the pool back, until the next `set_params`.

        Raises:
          RuntimeError: a session is open.
        """
        if self._open:
            raise RuntimeError(f"sessions {sorted(self._open)} are open")
        self._params = self._pool = None
        self._placement.forget()

    # Sessions.

    def open(self, rollout: int, group: int, temperature: float | None = None) -> int:
        del group  # equal prompts are found by their ids
        return self._add(rollout, self._emptiest(), self._temperature if temperature is None else temperature)

    def fork(self, session: int, rollout: int) -> int:
        """Starts a session that holds what another holds, and shares its pages; returns its handle. It samples at the
        same temperature. If the other's replica has no room, it is opened elsewhere, and what it holds is computed
        again.

        Raises:
          ValueError: the other is sampling.
          RuntimeError: `sessions` are open already.
        """
        parent = self._open[session]
        if parent.budget:
            raise ValueError(f"session {session} is sampling; fork it between two turns")
        shares = self._room(parent.replica) > 0
        handle = self._add(rollout, parent.replica if shares else self._emptiest(), parent.temperature)
        own = self._open[handle]
        own.ids, own.keys, own.prompt = list(parent.ids), parent.keys, parent.prompt
        if shares:
            book = self._books[parent.replica]
            whole, part = divmod(parent.fed, self._layout.page)
            own.pages = [book.hold(page) for page in parent.pages[:whole]]
            copied = part > 0 and self._copy(own, parent.pages[whole])
            own.advance(parent.fed if copied else whole * self._layout.page)
            self._run_copies()
        return handle

    def extend(self, session: int, ids: tuple[int, ...], max_new: int) -> None:
        own = self._open[session]
        known = len(own.ids)
        if own.budget or not ids or max_new < 1 or known + len(ids) + max_new > self.max_tokens:
            raise ValueError(
                f"session {session} is busy, or {known} + {len(ids)} known and {max_new} new tokens do not fit "
                f"{self.max_tokens}"
            )
        own.ids += ids
        if not known:
            own.prompt = len(ids) - 1  # the last id is fed by the decoder, which samples after it
            own.keys = prefix_keys(ids[:-1], self._layout.page)
        own.turn, own.budget = len(own.ids), max_new
        own.logprobs, own.entropies, own.versions = [], [], []

    def cancel(self, session: int) -> Sampled:
        """Ends the turn of a session, which stays open; returns what it sampled so far, perhaps no token."""
        own = self._open[session]
        said = own.said(stopped=False) if own.budget else Sampled((), (), (), (), False)
        own.budget = 0
        return said

    def close(self, session: int) -> None:
        if session not in self._open:
            raise ValueError(f"session {session} is not open")
        self._release(self._open.pop(session))

    @property
    def busy(self) -> bool:
        return any(own.budget for own in self._open.values())

    def step(self) -> dict[int, Sampled]:
        """Makes one call: feeds some sessions a chunk of known ids, or decodes a few tokens.

        Raises:
          RuntimeError: the engine has no weights.
        """
        if self._params is None:
            raise RuntimeError("the engine has no weights: call set_params first, also after sleep")
        self._share_prompts()
        views = [[] for _ in self._books]
        for handle, own in self._open.items():
            views[own.replica].append(self._view(handle, own))
        replicas = [Replica(own, book.holders, book.available) for own, book in zip(views, self._books, strict=True)]
        feeds, plans = next_call(replicas, self._layout)
        for plan in plans:
            for handle in plan.evict:
                self._release(self._open[handle])
                self._counts["evictions"] += 1
        chosen = [plan.sessions for plan in plans]
        finished = {}
        if feeds:
            self._feed(chosen)
        else:
            finished = self._sample(chosen)
        self._peak = max(self._peak, *(book.held / self._layout.pages for book in self._books))
        return finished

    def stats(self) -> Mapping[str, float]:
        """Returns what was counted since the last call of this; all add up, but for the peak.

        prefill: known ids fed; again: those of them that had been fed before; shared: known ids found in the pool
        instead; decode: ids sampled, one a row and step; idle_*: rows that sampled none in a step, because their turn
        ended within the call (ended), or no session took the row: there were some that had ids to feed (prefill), or
        waited for tools (tools), or no more were open (unopened); evictions; peak_pages: the largest share of a pool
        that was held.
        """
        counts = {name: self._counts[name] for name in COUNTS} | {"peak_pages": self._peak}
        self._counts.clear()
        self._peak = 0.0
        return counts

    def _room(self, replica: int) -> int:
        """How many more sessions a replica can open."""
        return self._layout.sessions - sum(own.replica == replica for own in self._open.values())

    def _emptiest(self) -> int:
        return max(range(self._layout.replicas), key=lambda replica: (self._room(replica), -replica))

    def _add(self, rollout: int, replica: int, temperature: float) -> int:
        if not self._room(replica):
            raise RuntimeError(f"all {self.sessions} sessions are open")
        handle = next(handle for handle in range(self.sessions) if handle not in self._open)
        self._open[handle] = Session(rollout, replica, temperature)
        return handle

    def _release(self, own: Session) -> None:
        """Takes a session's pages away. If it goes on, what they held is computed again."""
        for page in own.pages:
            self._books[own.replica].release(page)
        own.pages, own.fed = [], 0

    def _view(self, handle: int, own: Session) -> View:
        at = own.fed // self._layout.page
        key = own.keys[at] if own.fed < own.prompt else None
        return View(handle, own.rollout, len(own.ids), own.fed, own.budget, own.pages, key)

    # Known ids.

    def _share_prompts(self) -> None:
        """Advances the sessions that are about to feed their prompt over the pages of it that the pool has."""
        hungry = [own for own in self._open.values() if own.budget and own.fed < own.prompt]
        for own in sorted(hungry, key=lambda own: own.rollout):
            self._share(own)
        self._run_copies()

    def _share(self, own: Session) -> None:
        page, book = self._layout.page, self._books[own.replica]
        while own.fed < own.prompt and own.fed % page == 0:
            found = book.find(own.keys[own.fed // page])
            if found is None:
                return
            end = min(own.fed + page, own.prompt)
            if end % page:  # its owner goes on writing there
                copied = self._copy(own, found)
                book.release(found)
                if not copied:
                    return
            else:
                own.pages.append(found)
            self._counts["shared"] += end - own.fed
            own.advance(end)

    def _copy(self, own: Session, source: int) -> bool:
        """Plans a copy of a page as the next of a session's pages; returns False if no page is free for it."""
        book = self._books[own.replica]
        if not book.available:
            return False
        own.pages.append(book.take())
        self._copies[own.replica].append((book.hold(source), own.pages[-1]))
        return True

    def _run_copies(self) -> None:
        """Makes the planned copies, some in a call."""
        width = self._layout.chunks
        while any(self._copies):
            pairs = np.full((2, self._layout.replicas * width), -1, np.int32)
            for replica, copies in enumerate(self._copies):
                for row, (source, target) in enumerate(copies[:width], start=replica * width):
                    pairs[:, row] = source, target
                    self._books[replica].release(source)
                del copies[:width]
            self._pool = self._programs.copy(self._pool, *pairs)

    def _feed(self, chosen: list[list[int]]) -> None:
        rows, size = self._layout.replicas * self._layout.chunks, self._layout.chunk
        placed = self._placed(chosen, self._layout.chunks)
        tokens = np.zeros((rows, size), np.int32)
        positions = np.full((rows, size), -1, np.int32)
        ends = {}
        for row, handle, own in placed:
            ends[row] = end = feed_until(self._view(handle, own), self._layout)
            # A token's column follows from its position, so that it does not matter where a chunk starts.
            first = own.fed % size
            columns = slice(first, first + end - own.fed)
            tokens[row, columns] = own.ids[own.fed : end]
            positions[row, columns] = np.arange(own.fed, end)
            self._make_room(own, end)
        self._pool = self._programs.prefill(self._params, self._pool, tokens, positions, self._table(placed, rows))
        for row, _, own in placed:
            end = ends[row]
            self._counts["prefill"] += end - own.fed
            self._counts["again"] += max(0, min(end, own.reached) - own.fed)
            self._publish(own, end)
            own.advance(end)

    def _publish(self, own: Session, end: int) -> None:
        """Lets others share the pages of its prompt that a session has filled once it is fed up to `end`."""
        page = self._layout.page
        for at in range(own.fed // page, -(-min(end, own.prompt) // page)):
            self._books[own.replica].publish(own.pages[at], own.keys[at])

    # Sampling.

    def _sample(self, chosen: list[list[int]]) -> dict[int, Sampled]:
        layout = self._layout
        rows = layout.replicas * layout.rows
        placed = self._placed(chosen, layout.rows)
        tokens, positions, budgets, rollouts = np.zeros((4, rows), np.int32)
        temperatures = np.ones(rows, np.float32)
        for row, _, own in placed:
            tokens[row], positions[row] = own.ids[own.fed], own.fed
            budgets[row], rollouts[row], temperatures[row] = own.budget, own.rollout, own.temperature
            self._make_room(own, own.fed + min(own.budget, layout.steps))
        least = np.asarray([self._least(replica, len(handles)) for replica, handles in enumerate(chosen)], np.int32)
        results, self._pool = self._programs.decode(
            *(self._params, self._pool, tokens, positions, budgets, rollouts, temperatures),
            *(self._table(placed, rows), least, self._key),
        )
        ids, logprobs, entropies, counts, stopped = map(np.asarray, results)
        self._count_rows(chosen, counts)
        finished = {}
        for row, handle, own in placed:
            count = int(counts[row])
            own.ids += ids[row, :count].tolist()
            own.logprobs += logprobs[row, :count].tolist()
            own.entropies += entropies[row, :count].tolist()
            own.versions += [self._version] * count
            own.advance(own.fed + count)
            own.budget = 0 if stopped[row] else own.budget - count
            if not own.budget:
                finished[handle] = own.said(stopped=bool(stopped[row]))
        return finished

    def _least(self, replica: int, chosen: int) -> int:
        """How many rows must go on for a call not to end early."""
        busy = sum(own.budget > 0 for own in self._open.values() if own.replica == replica)
        return max(1, math.ceil(FEWEST_ROWS * chosen)) if busy > chosen else 1

    def _count_rows(self, chosen: list[list[int]], counts: np.ndarray) -> None:
        """Adds to the statistics what the rows of a decode call did, and why some did nothing."""
        steps = int(counts.max())  # of the busiest replica, for which the others wait
        for replica, handles in enumerate(chosen):
            rows = counts[replica * self._layout.rows :][: self._layout.rows]
            sampled = int(rows.sum())
            sessions = [own for own in self._open.values() if own.replica == replica]
            empty = self._layout.rows - len(handles)
            feeding = min(empty, sum(own.budget > 0 for own in sessions) - len(handles))
            waiting = min(empty - feeding, sum(not own.budget for own in sessions))
            self._counts.update(
                decode=sampled,
                idle_ended=steps * len(handles) - sampled,
                idle_prefill=steps * feeding,
                idle_tools=steps * waiting,
                idle_unopened=steps * (empty - feeding - waiting),
            )

    # Arrays for the programs.

    def _placed(self, chosen: list[list[int]], rows: int) -> list[tuple[int, int, Session]]:
        """Returns the row, the handle and the session of all that a call serves."""
        return [
            (replica * rows + i, handle, self._open[handle])
            for replica, handles in enumerate(chosen)
            for i, handle in enumerate(handles)
        ]

    def _make_room(self, own: Session, end: int) -> None:
        while len(own.pages) * self._layout.page < end:
            own.pages.append(self._books[own.replica].take())

    def _table(self, placed: list[tuple[int, int, Session]], rows: int) -> np.ndarray:
        table = np.zeros((rows, self._layout.table), np.int32)
        for row, _, own in placed:
            table[row, : len(own.pages)] = own.pages
        return table


def _free_bytes(devices: Iterable[jax.Device], taken: int) -> int | None:
    """Returns what the fullest device has left once it holds `taken` more bytes; None if a device does not tell."""
    found = [device.memory_stats() for device in devices]
    if not all(stats and "bytes_limit" in stats for stats in found):
        return None
    return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in found) - taken
