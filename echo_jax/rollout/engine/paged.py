"""A paged engine: sessions hold pages of one pool, and only those that sample take a row of the decoding batch.

In: the new ids of some sessions. Out: sampled ids and their log-probs. The ids and the book of pages are on the host,
the pool is on the device. Three programs of fixed shapes do everything: `prefill` feeds known ids in chunks, `decode`
samples a few tokens for each row, `copy` gives a session its own copy of a page that is complete only in part. No shape
depends on time, a token's place in its chunk depends on its position alone, and every session reserves pages for its
whole length when it opens: so results do not depend on when tools answer or on what other sessions do, bit for bit.
Rollouts of a group share the pages of their prompt. Use an engine from one thread.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from echo_jax.kernels.paged_attention import IMPLEMENTATIONS, implementation_for
from echo_jax.models.transformer import ModelConfig, bind, init_pool
from echo_jax.rollout.engine.dense import Placement
from echo_jax.rollout.engine.interface import EngineSetup
from echo_jax.rollout.engine.pages import Pages, prefix_keys
from echo_jax.rollout.trajectory import Sampled
from echo_jax.system.sharding import replicated, sharding_of

POOL_AXES = ("time", "time", "kv_heads", "head_dim")


@dataclasses.dataclass
class Session:
    """The host's view of one session."""

    rollout: int  # global index: the root of its sampling keys
    ids: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of the pages of its prompt
    prompt: int = 0  # how many of its first ids others can have too
    fed: int = 0  # ids whose keys and values are in the pool
    budget: int = 0  # tokens still to sample in this turn; 0: it samples none
    turn: int = 0  # where the turn begins
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of the turn
    entropies: list[float] = dataclasses.field(default_factory=list)


class PagedEngine:
    """An `Engine`. The sampling key of a token is fold_in(fold_in(seed, rollout), position)."""

    def __init__(
        self,
        setup: EngineSetup,
        *,
        rows: int = 0,
        page: int = 0,
        chunk: int = 0,
        chunks_per_call: int = 8,
        steps_per_call: int = 8,
        pool_tokens: int = 0,
        attention: str = "auto",
    ):
        """
        Args:
          rows: sessions that decode at once; 0: half of the sessions, at least 8.
          page: tokens in a page; 0: 64 for the TPU kernel, whose tables must fit its scalar memory, else 16.
          chunk: ids of one session that a prefill call feeds at most, a multiple of `page`; 0: eight pages on TPU, else
            two.
          chunks_per_call: sessions that a prefill call feeds at once.
          steps_per_call: maximum number of tokens that a row decodes in one call.
          pool_tokens: size of the pool; 0: as many as all sessions could need.
          attention: implementation of `paged_attention`.
        """
        self._placement = Placement(setup.mesh, setup.model_config)
        local = self._placement.local
        if attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention = {attention!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
        kernel = implementation_for(attention, local) == "ragged"
        page = page or (64 if kernel else 16)
        chunk = chunk or page * (8 if kernel else 2)
        if chunk % page:
            raise ValueError(f"chunk = {chunk} is not a multiple of page = {page}")
        self.max_tokens = setup.max_tokens
        self._page, self._chunk = page, chunk
        self._per_session = -(-setup.max_tokens // page)
        count = -(-pool_tokens // page) or setup.sessions * self._per_session
        if count < self._per_session:
            raise ValueError(
                f"pool_tokens = {pool_tokens} is less than one session may need, max_tokens = {setup.max_tokens}"
            )
        self.sessions = min(setup.sessions, count // self._per_session)
        self.rows = min(self.sessions, rows or max(8, -(-self.sessions // 2)))
        self._pool = jax.jit(init_pool, static_argnums=(0, 1, 2), out_shardings=sharding_of(local, POOL_AXES))(
            setup.model_config, count, page
        )
        self._book = Pages(count)
        self._open: dict[int, Session] = {}
        self._handles = list(reversed(range(self.sessions)))
        self._stop_ids = setup.stop_ids
        self._steps, self._chunks = steps_per_call, chunks_per_call
        self._copies: list[tuple[int, int]] = []
        self._key = jax.random.key(setup.seed)
        self._params, self._version = None, 0
        self._programs = make_programs(
            setup.graphdef,
            setup.model_config,
            local,
            temperature=setup.temperature,
            stop_ids=setup.stop_ids,
            steps=steps_per_call,
            attention=attention,
        )
        self.computed = {"prefill": 0, "decode": 0, "idle": 0, "shared": 0}  # tokens fed, rows that decoded nothing

    def set_params(self, params, version: int) -> None:
        if self._open:
            raise RuntimeError(f"weights may only change while no session is open, but {sorted(self._open)} are")
        self._params, self._version = self._placement(params), version
        self._book.forget_prefixes()

    def open(self, rollout: int, group: int) -> int:
        del group  # equal prompts are found by their ids
        if not self._handles:
            raise RuntimeError(f"all {self.sessions} sessions are open")
        handle = self._handles.pop()
        self._open[handle] = Session(rollout)
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
            own.keys = prefix_keys(ids[:-1], self._page)
        own.turn, own.budget = len(own.ids), max_new
        own.logprobs, own.entropies = [], []

    @property
    def busy(self) -> bool:
        return any(own.budget for own in self._open.values())

    def step(self) -> dict[int, Sampled]:
        """Feeds a chunk of known ids to some sessions or, if none has any, decodes a few tokens for as many as have a
        row."""
        sampling = sorted((own.rollout, handle, own) for handle, own in self._open.items() if own.budget)
        if waiting := self._to_prefill([own for _, _, own in sampling]):
            self._feed(waiting)
            return {}
        return self._sample([(handle, own) for _, handle, own in sampling[: self.rows]])

    def close(self, session: int) -> None:
        if session not in self._open:
            raise ValueError(f"session {session} is not open")
        for page in self._open.pop(session).pages:
            self._book.release(page)
        self._handles.append(session)
        self._handles.sort(reverse=True)

    def cancel(self) -> None:
        """Ends all sessions."""
        for session in list(self._open):
            self.close(session)

    # Known ids.

    def _to_prefill(self, sampling: list[Session]) -> list[Session]:
        """Takes pages that hold a session's next ids already; returns the sessions that have ids left to feed, at most
        one of those with the same next ids."""
        waiting, computing = [], set()
        for own in sampling:
            self._share(own)
            if own.fed >= len(own.ids) - 1:
                continue
            at = own.fed // self._page
            key = own.keys[at] if at < len(own.keys) and own.fed < own.prompt else None
            if key is None or key not in computing:
                waiting.append(own)
                computing.add(key)
            if len(waiting) == self._chunks:
                break
        if self._copies:
            self._run_copies()
        return waiting

    def _share(self, own: Session) -> None:
        """Advances a session over the pages of its prompt that the pool has."""
        while own.fed < own.prompt and own.fed % self._page == 0:
            at = own.fed // self._page
            found = self._book.find(own.keys[at])
            if found is None:
                return
            end = min(own.fed + self._page, own.prompt)
            if end % self._page:  # its owner goes on writing there
                if not self._book.available:  # for the copy, while the original is held too
                    self._book.release(found)
                    return
                own.pages.append(self._book.take())
                self._copies.append((found, own.pages[-1]))
            else:
                own.pages.append(found)
            self.computed["shared"] += end - own.fed
            own.fed = end

    def _run_copies(self) -> None:
        """Copies pages, some at a time; a copied page was held until now."""
        for start in range(0, len(self._copies), self._chunks):
            some = self._copies[start : start + self._chunks]
            pairs = np.full((2, self._chunks), -1, np.int32)
            pairs[:, : len(some)] = np.asarray(some).T
            self._pool = self._programs.copy(self._pool, *pairs)
            for page, _ in some:
                self._book.release(page)
        self._copies = []

    def _feed(self, waiting: list[Session]) -> None:
        tokens = np.zeros((self._chunks, self._chunk), np.int32)
        positions = np.full((self._chunks, self._chunk), -1, np.int32)
        ends = []
        for row, own in enumerate(waiting):
            # A token's column follows from its position, so that it does not matter where a chunk starts.
            start = own.fed // self._chunk * self._chunk
            end = min(start + self._chunk, len(own.ids) - 1)
            columns = slice(own.fed - start, end - start)
            tokens[row, columns] = own.ids[own.fed : end]
            positions[row, columns] = np.arange(own.fed, end)
            self._make_room(own, end)
            ends.append(end)
        self._pool = self._programs.prefill(
            self._params, self._pool, tokens, positions, self._table(waiting, self._chunks)
        )
        for own, end in zip(waiting, ends, strict=True):
            self.computed["prefill"] += end - own.fed
            for at in range(own.fed // self._page, -(-min(end, own.prompt) // self._page)):
                if min((at + 1) * self._page, own.prompt) <= end:
                    self._book.publish(own.pages[at], own.keys[at])
            own.fed = end

    # Sampling.

    def _sample(self, chosen: list[tuple[int, Session]]) -> dict[int, Sampled]:
        tokens, positions, rollouts, budgets = np.zeros((4, self.rows), np.int32)
        for row, (_, own) in enumerate(chosen):
            tokens[row], positions[row] = own.ids[own.fed], own.fed
            rollouts[row], budgets[row] = own.rollout, own.budget
            self._make_room(own, own.fed + min(own.budget, self._steps))
        table = self._table([own for _, own in chosen], self.rows)
        results, self._pool = self._programs.decode(
            self._params, self._pool, tokens, positions, budgets, rollouts, table, self._key
        )
        ids, logprobs, entropies, counts, stopped = map(np.asarray, results)
        finished = {}
        for row, (handle, own) in enumerate(chosen):
            count = counts[row]
            own.ids += ids[row, :count].tolist()
            own.logprobs += logprobs[row, :count].tolist()
            own.entropies += entropies[row, :count].tolist()
            own.fed += int(count)
            own.budget = 0 if stopped[row] else own.budget - int(count)
            if not own.budget:
                said = tuple(own.ids[own.turn :])
                versions = (self._version,) * len(said)
                finished[handle] = Sampled(
                    said, tuple(own.logprobs), tuple(own.entropies), versions, bool(stopped[row])
                )
        self.computed["decode"] += int(counts.sum())
        self.computed["idle"] += int(counts.max(initial=0)) * self.rows - int(counts.sum())
        return finished

    def _make_room(self, own: Session, end: int) -> None:
        while len(own.pages) * self._page < end:
            own.pages.append(self._book.take())

    def _table(self, chosen: list[Session], rows: int) -> np.ndarray:
        # As long as whole chunks may be: a kernel may look at the pages of a chunk's padding.
        table = np.zeros((rows, -(-self.max_tokens // self._chunk) * self._chunk // self._page), np.int32)
        for row, own in enumerate(chosen):
            table[row, : len(own.pages)] = own.pages
        return table


class Programs(NamedTuple):
    """The jitted programs of an engine; each donates the pool and returns it in place."""

    prefill: Callable  # (params, pool, tokens [R, C], positions [R, C], table [R, M]) -> pool
    decode: Callable  # see `_decode`
    copy: Callable  # (pool, source pages [R], target pages [R]; -1: none) -> pool


def make_programs(
    graphdef, config: ModelConfig, mesh: Mesh, *, temperature: float, stop_ids: tuple[int, ...], steps: int, attention
) -> Programs:
    """`mesh`: of the engine, whose devices need not be this machine's; the others as in `PagedEngine`."""
    pool, everywhere = sharding_of(mesh, POOL_AXES), replicated(mesh)
    shared = {
        "graphdef": graphdef,
        "mesh": mesh if mesh.size > 1 else None,
        "attention": implementation_for(attention, mesh),
    }
    decode = functools.partial(_decode, **shared, temperature=temperature, stop_ids=stop_ids, steps=steps)
    copy = functools.partial(_copy, layers=config.num_layers)
    return Programs(
        prefill=jax.jit(functools.partial(_prefill, **shared), donate_argnums=1, out_shardings=pool),
        decode=jax.jit(decode, donate_argnums=1, out_shardings=(everywhere, pool)),
        copy=jax.jit(copy, donate_argnums=0, out_shardings=pool),
    )


def _prefill(params, pool, tokens, positions, table, *, graphdef, mesh, attention):
    return bind(graphdef, params).paged(tokens, positions, pool, table, attention=attention, mesh=mesh)[1]


def _copy(pool, sources, targets, *, layers):
    """Copies pages in all layers; -1: none."""
    pages = pool.shape[0] // layers
    offsets = jnp.arange(layers)[:, None] * pages
    targets = jnp.where(targets < 0, pool.shape[0], targets + offsets)  # past the end: dropped
    return pool.at[targets].set(pool[jnp.maximum(sources, 0) + offsets], mode="drop")


def _decode(
    params,
    pool,
    tokens,
    positions,
    budgets,
    rollouts,
    table,
    key,
    *,
    graphdef,
    mesh,
    attention,
    temperature,
    stop_ids,
    steps,
):
    """Samples up to `steps` tokens for every row with a budget.

    Args:
      tokens, positions, budgets, rollouts: int32 [B]. The first token to feed, its position, how many to sample.
      table: int32 [B, M].

    Returns:
      (ids, log-probs, entropies, each [B, steps]; number of ids sampled [B]; whether the last stops [B]), and the pool.
    """
    rollout_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rollouts)
    rows = tokens.shape[0]

    def unfinished(carry):
        return (carry[0] < steps) & jnp.any(carry[2] > 0)

    def one_token(carry):
        i, tokens, left, pool, ids, logprobs, entropies, counts, stopped = carry
        running = left > 0
        position = positions + counts
        model = bind(graphdef, params)
        fed = jnp.where(running, position, -1)
        hidden, pool = model.paged(tokens[:, None], fed[:, None], pool, table, attention=attention, mesh=mesh)
        head = model.head().astype(hidden.dtype)
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32) / temperature
        keys = jax.vmap(jax.random.fold_in)(rollout_keys, position + 1)
        sampled = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        every = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(every, sampled[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        stops = running & jnp.isin(sampled, jnp.asarray(stop_ids))
        return (
            i + 1,
            jnp.where(running, sampled, tokens),
            jnp.where(stops, 0, left - running),
            pool,
            ids.at[:, i].set(sampled),
            logprobs.at[:, i].set(logprob),
            entropies.at[:, i].set(entropy),
            counts + running,
            stopped | stops,
        )

    start = (
        *(0, tokens, budgets, pool),
        jnp.zeros((rows, steps), jnp.int32),
        *(jnp.zeros((rows, steps)) for _ in range(2)),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    _, _, _, pool, *results = jax.lax.while_loop(unfinished, one_token, start)
    return tuple(results), pool
