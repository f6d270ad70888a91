"""Laws of the engine: what it reports of its samples is true, sessions do not affect each other, nothing leaks."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SPARSE, TINY

from configs import tiny
from echo_jax.config import ConfigError
from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.models.transformer import abstract_params, bind
from echo_jax.rollout.engine import EngineSetup
from echo_jax.rollout.engine.paged import PagedEngine
from echo_jax.run.build import build
from echo_jax.system.sharding import make_mesh

SLOTS, STOP, CLOSE = 48, 0, 1e-4
SMALL = {"page": 4, "chunk": 8, "chunks_per_call": 3, "rows": 3, "steps_per_call": 4}
UNTIED = dataclasses.replace(TINY, tie_embeddings=False, remat="none")
SMALL_VOCABULARY = dataclasses.replace(TINY, vocab_size=8)


@functools.cache
def weights(config=TINY, shape=(1, 1, 1)):
    """Returns (graph definition, random parameters on a mesh) without compiling anything."""
    graphdef, abstract = abstract_params(config, make_mesh(*shape))
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(0.0, 0.25, x.shape).astype(x.dtype), x.sharding)  # noqa: E731
    return graphdef, jax.tree.map(draw, abstract)


def scaled(factor):
    return jax.tree.map(lambda x: x * factor, weights()[1])


def new_engine(config=TINY, *, sessions=6, temperature=0.8, seed=0, shape=(1, 1, 1), stops=(STOP,), **options):
    graphdef, params = weights(config, shape)
    setup = EngineSetup(
        graphdef=graphdef, model_config=config, mesh=make_mesh(*shape), sessions=sessions, max_tokens=SLOTS,
        temperature=temperature, stop_ids=stops, seed=seed,
    )  # fmt: skip
    engine = PagedEngine(setup, **SMALL | options)
    engine.set_params(params, 0)
    return engine


@pytest.fixture(scope="module")
def shared():
    return new_engine()


@pytest.fixture
def engine(shared):
    """One engine for many tests, which also tests that sessions leave nothing behind."""
    return emptied(shared)


@pytest.fixture(scope="module")
def gamblers():
    """Many rows over a vocabulary of eight."""
    return new_engine(SMALL_VOCABULARY, sessions=128, rows=64, chunks_per_call=64, temperature=0.5)


ENOUGH = 2000  # steps for any test


def emptied(engine):
    """Returns an engine without sessions and counts, with the first weights."""
    close_all(engine)
    engine.set_params(weights()[1], 0)
    engine.stats()
    engine.total = collections.Counter()  # of `count`
    return engine


def close_all(engine):
    for session in list(engine._open):
        engine.close(session)


def one_turn(engine, asks):
    """Runs one turn of a new session for each {rollout: (ids, max_new)}; returns {rollout: turn}."""
    talks = talk(engine, {rollout: [ask] for rollout, ask in asks.items()})
    return {rollout: turns[0] for rollout, (_, turns) in talks.items()}


def finish(engine):
    finished = {}
    for _ in range(ENOUGH):
        if not engine.busy:
            return finished
        finished |= engine.step()
    raise AssertionError("the engine does not finish")


def talk(engine, sessions, delay=lambda rollout, turn: 0, options=lambda rollout: {}):
    """Runs whole sessions, as many at once as the engine has, with tools that take `delay` steps to answer.

    `sessions`: {rollout: [(new ids, max_new) of each turn]}. `options`: for a rollout's session. Returns {rollout: (all
    ids, its turns)}.
    """
    waiting, todo, due, handles = list(sessions), {}, {}, {}
    ids, said = dict.fromkeys(sessions, ()), collections.defaultdict(list)
    for step in range(ENOUGH):
        if not waiting and not handles:
            break
        while waiting and len(handles) < engine.sessions:
            rollout = waiting.pop(0)
            handles[rollout] = engine.open(rollout, 0, **options(rollout))
            todo[rollout] = list(sessions[rollout])
            due[rollout] = step + delay(rollout, 0)
        for rollout in [r for r, when in due.items() if when <= step]:
            del due[rollout]
            if not todo[rollout]:
                engine.close(handles.pop(rollout))
                continue
            new, max_new = todo[rollout].pop(0)
            engine.extend(handles[rollout], new, max_new)
            ids[rollout] += new
        rollout_of = {handle: rollout for rollout, handle in handles.items()}
        for handle, turn in (engine.step() if engine.busy else {}).items():
            rollout = rollout_of[handle]
            ids[rollout] += turn.ids
            said[rollout].append(turn)
            due[rollout] = step + 1 + delay(rollout, len(said[rollout]))
    assert (waiting, handles) == ([], {}), "the engine does not finish"
    return {rollout: (ids[rollout], said[rollout]) for rollout in sessions}


def draw_ids(rng, low, high):
    return tuple(rng.integers(1, TINY.vocab_size, rng.integers(low, high)).tolist())


def groups(seed=0, count=3, size=3):
    """Returns the asks of groups whose rollouts share their prompt."""
    rng = np.random.default_rng(seed)
    prompts = [draw_ids(rng, 1, 16) for _ in range(count)]
    return {
        g * size + i: [(prompts[g], 6), (draw_ids(rng, 1, 9), 5), (draw_ids(rng, 1, 5), 4)]
        for g in range(count)
        for i in range(size)
    }


@functools.cache
def scorer(config, temperature):
    """Returns a function of (params, ids [SLOTS]) -> log-prob of each id after the first, and entropy there, by the
    trainer's forward."""
    graphdef, _ = weights(config)

    def score(params, ids):
        model = bind(graphdef, params)
        hidden = model(ids[None], jnp.arange(SLOTS)[None], jnp.ones((1, SLOTS), jnp.int32))[0]
        found = fused_logprobs(hidden[:-1], model.head(), ids[1:], temperature=temperature, entropy=True)
        return found.logprob, found.entropy

    return jax.jit(score)


def fresh_logprobs(params, ids, **options):
    return fresh_scores(params, ids, **options)[0].tolist()


def fresh_scores(params, ids, *, config=TINY, temperature=0.8):
    """Returns the log-prob of each id and the entropy where it was drawn, [2, ids]; zeros for the first."""
    padded = np.zeros(SLOTS, np.int32)
    padded[: len(ids)] = ids
    return np.pad(np.asarray(scorer(config, temperature)(params, padded))[:, : len(ids) - 1], ((0, 0), (1, 0)))


def check_against_a_fresh_forward(params, asks, ids, turns, stop=STOP, **options):
    """Checks the turns' form; returns the largest difference between the reported log-probs and entropies and the
    trainer's.

    `params`: {version: parameters}, or parameters of the only version.
    """
    by_version = params if 0 in params else collections.defaultdict(lambda: params)
    versions = {v for turn in turns for v in turn.versions}
    expected = {v: fresh_scores(by_version[v], ids, **options) for v in versions}
    at, worst = 0, 0.0
    for (new, max_new), turn in zip(asks, turns, strict=True):
        at += len(new)
        assert 1 <= len(turn.ids) == len(turn.logprobs) == len(turn.entropies) == len(turn.versions) <= max_new
        assert turn.stopped == (turn.ids[-1] == stop)
        assert turn.stopped or len(turn.ids) == max_new
        assert stop not in turn.ids[:-1]
        assert list(turn.versions) == sorted(turn.versions)
        assert ids[at : at + len(turn.ids)] == turn.ids
        for *found, version in zip(turn.logprobs, turn.entropies, turn.versions, strict=True):
            worst = max(worst, float(abs(found - expected[version][:, at]).max()))
            at += 1
    assert at == len(ids)
    return worst


# -- truth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "temperature"), [(TINY, 0.8), (UNTIED, 1.7), (SPARSE, 0.8)], ids=["tied", "untied", "experts"]
)
def test_the_trainer_agrees_on_every_sampled_token_of_every_turn(engine, config, temperature):
    engine = engine if config is TINY else new_engine(config, temperature=temperature)
    sessions, params = groups(), weights(config)[1]
    for rollout, (ids, turns) in talk(engine, sessions).items():
        assert (
            check_against_a_fresh_forward(params, sessions[rollout], ids, turns, config=config, temperature=temperature)
            < CLOSE
        )


def test_each_session_samples_at_its_own_temperature(engine):
    """As in an engine of that temperature, bit for bit; and the trainer agrees there."""
    asks, params = groups(), weights()[1]
    at = {0: 0.8, 1: 1.7, 2: 0.3}  # the first is that of the setup
    open_at = lambda rollout: {} if rollout % 3 == 0 else {"temperature": at[rollout % 3]}  # noqa: E731
    found = talk(engine, asks, options=open_at)
    for which, temperature in at.items():
        alike = talk(new_engine(temperature=temperature), asks)
        for rollout in (rollout for rollout in asks if rollout % 3 == which):
            assert found[rollout] == alike[rollout]
            ids, turns = found[rollout]
            worst = check_against_a_fresh_forward(params, asks[rollout], ids, turns, temperature=temperature)
            assert worst < CLOSE


def test_samples_follow_the_tempered_distribution(gamblers):
    """Pearson's test over 2,048 first tokens; 7 degrees of freedom exceed 29.9 once in ten thousand."""
    prompt = (1, 2, 3)
    counts = np.zeros(8)
    for first in range(0, 2048, 128):
        for turn in one_turn(gamblers, {first + i: (prompt, 1) for i in range(128)}).values():
            counts[turn.ids[0]] += 1
    options = dict(config=SMALL_VOCABULARY, temperature=0.5)
    expected = np.exp([fresh_logprobs(weights(SMALL_VOCABULARY)[1], (*prompt, i), **options)[3] for i in range(8)])
    assert expected.max() > 1.3 * expected.min()  # otherwise uniform samples would pass
    assert np.sum((counts - 2048 * expected) ** 2 / (2048 * expected)) < 29.9


def test_every_position_and_rollout_gets_fresh_draws(engine):
    turns = [turn.ids for turn in one_turn(engine, {rollout: ((1, 2, 3), 20) for rollout in range(12)}).values()]
    assert len({*turns}) == 12
    assert len({ids[0] for ids in turns}) > 4
    longest = max(turns, key=len)
    assert len({*longest}) > len(longest) / 2


def test_another_seed_gives_other_samples(engine):
    asks = {5: ((1, 2, 3), 20)}
    assert one_turn(engine, asks)[5].ids != one_turn(new_engine(seed=1), asks)[5].ids


# -- independence: nothing that depends on time changes a bit ----------------------------------------------------------


def test_delays_and_company_change_no_bit(engine):
    sessions = groups()
    expected = talk(engine, sessions)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        waits = collections.defaultdict(lambda rng=rng: int(rng.integers(0, 9)))
        assert talk(engine, sessions, lambda rollout, turn, waits=waits: waits[rollout, turn]) == expected
    for rollout, asks in sessions.items():  # the prefixes of other groups and of the same are warm by now
        assert talk(engine, {rollout: asks})[rollout] == expected[rollout]
    for rollout, asks in sessions.items():
        engine.set_params(weights()[1], 0)  # cold
        assert talk(engine, {rollout: asks})[rollout] == expected[rollout]


def test_a_smaller_pool_changes_no_bit(engine):
    sessions = groups()
    expected = talk(engine, sessions)
    small = new_engine(pool_tokens=2 * SLOTS)
    assert small.sessions == 2
    assert talk(small, sessions) == expected
    assert count(small, "evictions") == 0


def test_the_length_of_calls_changes_no_sample(engine):
    asks = {1: ((1, 2, 3, 4, 5), 11), 2: ((6,), 20)}
    expected = one_turn(engine, asks)
    assert one_turn(new_engine(steps_per_call=3), asks) == expected


def test_a_pool_without_a_page_to_spare_computes_what_it_cannot_copy(engine):
    prompt = tuple(np.random.default_rng(4).integers(1, TINY.vocab_size, SLOTS - 2).tolist())  # ends within a page
    sessions = {0: [(prompt, 2)], 1: [(prompt, 2)]}
    expected = talk(engine, sessions)
    tight = new_engine(pool_tokens=SLOTS)
    assert tight.sessions == 1
    assert talk(tight, sessions) == expected


def test_one_program_of_each_kind_serves_all_uses(engine):
    for version in range(3):
        engine.set_params(scaled(1 + 0.01 * version), version)
        talk(engine, groups(seed=version, count=version + 1))
    programs = engine._programs
    assert [program._cache_size() for program in (programs.prefill, programs.decode, programs.copy)] == [1, 1, 1]


# -- several devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (TINY, (2, 2, 2)),
        *(pytest.param(TINY, shape, marks=pytest.mark.variant) for shape in ((1, 1, 2), (1, 8, 1), (8, 1, 1))),
        pytest.param(SPARSE, (2, 2, 2), marks=pytest.mark.variant),  # kernels/test_experts.py compares every mesh
    ],
)
def test_more_devices_sample_the_same(config, shape):
    """Of eight devices two share the heads, so there are four replicas of the model, whatever the training mesh is."""
    sessions = groups(count=2)
    spread = new_engine(config, shape=shape, sessions=8)
    replicas, tensor = int(np.prod(shape)) // 2, 2
    assert (spread._layout.replicas, spread._placement.local.shape["tensor"]) == (replicas, tensor)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(spread._params)} == {replicas * tensor}
    shards = {shard.data.shape for shard in spread._pool.addressable_shards}
    assert shards == {(config.num_layers * spread._layout.pages, 4, 2, config.head_dim)}  # one of two KV heads
    talks = talk(spread, sessions)
    for rollout, (ids, turns) in talk(new_engine(config, sessions=8), sessions).items():
        assert talks[rollout][0] == ids
        for turn, own in zip(turns, talks[rollout][1], strict=True):
            np.testing.assert_allclose(own.logprobs, turn.logprobs, atol=1e-5)


def test_sessions_go_to_the_emptiest_replica():
    spread = new_engine(shape=(2, 1, 2), sessions=5)
    assert (spread._layout.replicas, spread.sessions) == (2, 6)
    assert [spread._open[spread.open(i, 0)].replica for i in range(4)] == [0, 1, 0, 1]
    spread.close(1)
    assert spread._open[spread.open(9, 0)].replica == 1


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_turn_may_stop_at_its_first_token(gamblers):
    close_all(gamblers)
    handles = {gamblers.open(i, 0): i for i in range(128)}
    for handle, i in handles.items():
        gamblers.extend(handle, (i % 8, i % 5), 9)
    at_once = {handle: turn for handle, turn in finish(gamblers).items() if turn.ids == (STOP,)}
    assert at_once
    for handle, turn in at_once.items():
        assert (turn.stopped, len(turn.logprobs)) == (True, 1)
        gamblers.extend(handle, (4, 5), 3)  # the session continues after the stop token
    again = finish(gamblers)
    assert again.keys() == at_once.keys()
    for handle, turn in again.items():
        ids = (handles[handle] % 8, handles[handle] % 5, STOP, 4, 5, *turn.ids)
        expected = fresh_logprobs(weights(SMALL_VOCABULARY)[1], ids, config=SMALL_VOCABULARY, temperature=0.5)
        np.testing.assert_allclose(turn.logprobs, expected[5:], atol=CLOSE)
    close_all(gamblers)


def test_each_of_several_stop_tokens_ends_a_turn():
    stops = (STOP, 5)
    engine = new_engine(SMALL_VOCABULARY, sessions=32, temperature=2.0, stops=stops)
    turns = one_turn(engine, {i: ((4, i % 8), 12) for i in range(32)})
    assert {turn.ids[-1] for turn in turns.values() if turn.stopped} == set(stops)
    for turn in turns.values():
        assert turn.stopped == (turn.ids[-1] in stops)
        assert not set(stops) & set(turn.ids[:-1])


def test_a_session_may_fill_its_length(engine):
    ids = tuple(range(1, SLOTS))
    turn = one_turn(engine, {0: (ids, 1)})[0]
    np.testing.assert_allclose(turn.logprobs, fresh_logprobs(weights()[1], ids + turn.ids)[SLOTS - 1 :], atol=CLOSE)


def test_bad_requests_are_refused(engine):
    handles = [engine.open(0, 0) for _ in range(engine.sessions)]
    assert handles == list(range(engine.sessions))
    with pytest.raises(RuntimeError, match="all 6 sessions are open"):
        engine.open(1, 0)
    for ids, max_new in (((), 3), ((1, 2), 0), ((1, 2), -1), ((1,) * SLOTS, 1), ((1,) * (SLOTS - 3), 4)):
        numbers = rf"session 0 .* 0 \+ {len(ids)} known and {max_new} new tokens do not fit {SLOTS}"
        with pytest.raises(ValueError, match=numbers):
            engine.extend(0, ids, max_new)
    assert not engine.busy
    engine.extend(0, (1, 2), 3)
    with pytest.raises(ValueError, match="is busy"):
        engine.extend(0, (1,), 1)
    with pytest.raises(ValueError, match="session 0 is sampling"):
        engine.fork(0, 1)
    close_all(engine)
    with pytest.raises(ValueError, match="session 0 is not open"):
        engine.close(0)


# -- forks and cancelled turns -----------------------------------------------------------------------------------------


def test_a_fork_samples_at_the_temperature_of_its_parent(engine):
    ask = ((5, 6, 7), 5)
    parent = engine.open(1, 0, temperature=1.7)
    engine.extend(parent, *ask)
    first = finish(engine)[parent]
    fork = engine.fork(parent, 2)
    engine.extend(fork, (9, 8), 6)
    then = finish(engine)[fork]
    ids, asks = ask[0] + first.ids + (9, 8) + then.ids, [ask, ((9, 8), 6)]
    assert check_against_a_fresh_forward(weights()[1], asks, ids, [first, then], temperature=1.7) < CLOSE


@pytest.mark.parametrize("length", [3, 8, 9, 14])  # before, at and after the end of a page, with a chunk that ends
def test_a_fork_goes_on_from_what_its_parent_holds(engine, length):
    rng = np.random.default_rng(length)
    first_ask, then = (draw_ids(rng, length, length + 1), 5), [(9, 8, 7), (6, 5, 4), (3, 2, 1)]  # each goes its own way
    parent = engine.open(1, 0)
    engine.extend(parent, *first_ask)
    first = finish(engine)[parent]
    fed = count(engine, "prefill")
    forks = [engine.fork(parent, rollout) for rollout in (2, 3)]
    asks = {handle: [first_ask, (ids, 6)] for handle, ids in zip((parent, *forks), then, strict=True)}
    for handle, (_, ask) in asks.items():
        engine.extend(handle, *ask)
    turns = finish(engine)
    assert len({turn.ids for turn in turns.values()}) == 3  # each samples with its own key
    assert count(engine, "prefill") - fed == 3 * 3  # the last id of the first turn, and two of the new ones
    for handle, own in asks.items():
        ids = own[0][0] + first.ids + own[1][0] + turns[handle].ids
        assert check_against_a_fresh_forward(weights()[1], own, ids, [first, turns[handle]]) < CLOSE


def test_a_cancelled_turn_returns_what_it_sampled_and_the_session_goes_on(engine):
    prompt = tuple(range(1, 15))
    session = engine.open(0, 0)
    assert engine.cancel(session).ids == ()
    engine.extend(session, prompt, 20)
    engine.step()  # feeds a chunk: the turn has not begun
    assert engine.cancel(session).ids == ()
    engine.extend(session, (5,), 20)
    while not engine._open[session].logprobs:
        engine.step()
    turn = engine.cancel(session)
    assert not engine.busy
    assert 0 < len(turn.ids) == len(turn.logprobs) == len(turn.versions) < 20
    engine.extend(session, (6, 7), 4)
    last = finish(engine)[session]
    ids = (*prompt, 5, *turn.ids, 6, 7, *last.ids)
    expected = fresh_logprobs(weights()[1], ids)
    np.testing.assert_allclose(turn.logprobs, expected[15 : 15 + len(turn.ids)], atol=CLOSE)
    np.testing.assert_allclose(last.logprobs, expected[-len(last.ids) :], atol=CLOSE)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_swapped_weights_leave_nothing_behind(engine):
    sessions = groups()
    first = talk(engine, sessions)
    engine.set_params(scaled(1.1), 7)
    second = talk(engine, sessions)
    assert second != first
    for rollout, (ids, turns) in second.items():
        assert {v for turn in turns for v in turn.versions} == {7}
        assert check_against_a_fresh_forward(scaled(1.1), sessions[rollout], ids, turns) < CLOSE
    engine.set_params(weights()[1], 0)
    assert talk(engine, sessions) == first


def test_weights_do_not_change_under_an_open_session_unless_asked(engine):
    session = engine.open(0, 0)
    for _ in range(2):  # empty, and with keys and values of old weights
        with pytest.raises(RuntimeError, match=r"only change while no session is open, but \[0\] are"):
            engine.set_params(weights()[1], 1)
        engine.extend(session, (1, 2, 3), 2)
        finish(engine)
    with pytest.raises(ValueError, match="'drop': choose one of refuse, recompute, keep"):
        engine.set_params(weights()[1], 1, open_sessions="drop")
    engine.set_params(weights()[1], 1, open_sessions="keep")
    with pytest.raises(ValueError, match="version 0 is older than 1"):
        engine.set_params(weights()[1], 0, open_sessions="keep")


@pytest.fixture(scope="module")
def unstoppable():
    return new_engine(stops=(TINY.vocab_size,))


@pytest.fixture
def talkative(unstoppable):
    """Its turns end with their budget."""
    return emptied(unstoppable)


def swap_mid_turn(engine, sessions, open_sessions):
    """Samples one turn of each session; the weights change up to four times. Returns {rollout: turn}, the weights."""
    handles = {engine.open(rollout, 0): rollout for rollout in sessions}
    for handle, rollout in handles.items():
        engine.extend(handle, *sessions[rollout])
    params, turns, calls = {0: weights()[1]}, {}, 0
    while engine.busy:
        turns |= {handles[handle]: turn for handle, turn in engine.step().items()}
        calls += 1
        if calls in (1, 6, 12, 20):  # the first within the prompt
            params[calls] = scaled(1 + calls / 100)
            engine.set_params(params[calls], calls, open_sessions=open_sessions)
    return turns, params


def test_recomputed_sessions_sample_from_the_new_weights_alone(talkative):
    rng = np.random.default_rng(2)
    sessions = {rollout: (draw_ids(rng, 4, 20), 24) for rollout in range(4)}
    turns, params = swap_mid_turn(talkative, sessions, "recompute")
    assert max(len(set(turn.versions)) for turn in turns.values()) > 1
    for rollout, turn in turns.items():
        asked = [sessions[rollout]]
        assert check_against_a_fresh_forward(params, asked, asked[0][0] + turn.ids, [turn], stop=None) < CLOSE
    assert count(talkative, "again") > 0


def test_kept_sessions_go_on_from_keys_and_values_of_older_weights_that_nobody_else_gets(talkative):
    prompt = tuple(range(1, 15))
    sessions = {0: (prompt, 30)}
    turns, params = swap_mid_turn(talkative, sessions, "keep")
    assert len(set(turns[0].versions)) > 1
    assert list(turns[0].versions) == sorted(turns[0].versions)
    assert count(talkative, "again") == 0
    worst = check_against_a_fresh_forward(params, [sessions[0]], prompt + turns[0].ids, [turns[0]], None)
    assert worst > CLOSE  # the choice says so
    newest = max(params)
    other = talkative.open(1, 0)
    talkative.extend(other, prompt, 4)
    turn = finish(talkative)[other]
    assert check_against_a_fresh_forward(params[newest], [(prompt, 4)], prompt + turn.ids, [turn], stop=None) < CLOSE


def test_nobody_shares_a_prompt_that_older_weights_have_begun(talkative):
    prompt = tuple(range(1, 15))
    kept = talkative.open(0, 0)
    talkative.extend(kept, prompt, 4)
    talkative.step()  # feeds the first of two chunks
    talkative.set_params(scaled(1.5), 1, open_sessions="keep")
    finish(talkative)
    other = talkative.open(1, 0)
    talkative.extend(other, prompt, 4)
    turn = finish(talkative)[other]
    assert check_against_a_fresh_forward(scaled(1.5), [(prompt, 4)], prompt + turn.ids, [turn], None) < CLOSE


def test_weights_are_held_in_the_dtype_that_the_model_uses():
    """So an engine holds bf16 matrices; its results equal those of f32 matrices cast when used."""
    half = dataclasses.replace(TINY, compute_dtype="bfloat16")
    engine = new_engine(half)
    assert {str(x.dtype) for x in jax.tree.leaves(engine._params)} == {"bfloat16", "float32"}
    assert engine._params["final_norm"].dtype == "float32"
    own = sum(shard.data.nbytes for x in jax.tree.leaves(engine._params) for shard in x.addressable_shards)
    assert engine._placement.bytes_a_device == own


def test_a_sleeping_engine_holds_no_memory_and_goes_on_as_before():
    half = dataclasses.replace(TINY, compute_dtype="bfloat16")  # so that its weights are not those of the trainer
    weights(half)
    before = {id(x) for x in jax.live_arrays()}
    engine = new_engine(half)
    asks = {0: ((1, 2, 3), 9)}
    expected = one_turn(engine, asks)
    session = engine.open(0, 0)
    with pytest.raises(RuntimeError, match=r"sessions \[0\] are open"):
        engine.sleep()
    engine.close(session)
    engine.sleep()
    asleep = engine.open(0, 0)
    engine.extend(asleep, (1, 2, 3), 9)
    with pytest.raises(RuntimeError, match="no weights: call set_params first, also after sleep"):
        engine.step()
    engine.close(asleep)
    left = [x for x in jax.live_arrays() if id(x) not in before]
    assert sum(x.nbytes for x in left) < 100  # the key
    engine.set_params(weights(half)[1], 0)
    assert one_turn(engine, asks) == expected


# -- pages -------------------------------------------------------------------------------------------------------------


def count(engine, name):
    """Adds up what an engine counted since the test began."""
    engine.total = getattr(engine, "total", collections.Counter()) + collections.Counter(engine.stats())
    return engine.total[name]


def test_a_group_computes_its_prompt_once_and_later_groups_find_it():
    rng = np.random.default_rng(0)
    prompt = tuple(rng.integers(1, TINY.vocab_size, 15).tolist())  # 14 are fed by prefill: three pages and a half
    engine = new_engine(sessions=6)
    talk(engine, {rollout: [(prompt, 3)] for rollout in range(6)})
    assert (count(engine, "prefill"), count(engine, "shared")) == (14, 5 * 14)
    talk(engine, {9: [((*prompt[:12], 1, 2, 3), 3)]})  # the prompt differs in its last page
    assert count(engine, "prefill") == 14 + 2
    engine.set_params(weights(TINY)[1], 1)
    talk(engine, {10: [(prompt, 3)]})  # no prefix is found across weights
    assert count(engine, "prefill") == 14 + 2 + 14


def test_too_many_sessions_for_the_pool_take_each_others_pages_and_end_with_true_log_probs():
    sessions = groups(count=4)
    crowded = new_engine(pool_tokens=SLOTS + 16, sessions=12, admission="optimistic")
    assert crowded.sessions == 12
    talks = talk(crowded, sessions, lambda rollout, turn: (rollout + turn) % 3)
    assert count(crowded, "evictions") > 3
    assert 0 < count(crowded, "again") < count(crowded, "prefill")
    for rollout, (ids, turns) in talks.items():
        assert check_against_a_fresh_forward(weights()[1], sessions[rollout], ids, turns) < CLOSE
    assert crowded._books[0].held == 0


def test_the_counts_of_rows_add_up_and_name_why_a_row_is_idle(engine):
    session = engine.open(0, 0)
    engine.extend(session, (1, 2), 4)
    waiting = engine.open(1, 0)
    while engine.busy:
        engine.step()
    counts = engine.stats()
    assert counts["prefill"] == 1
    assert counts["decode"] + counts["idle_ended"] == counts["decode"]  # alone in its call
    assert counts["idle_tools"] == counts["idle_unopened"] == counts["decode"]  # of three rows
    assert counts["peak_pages"] == 2 / engine._layout.pages
    assert set(engine.stats().values()) == {0}
    engine.close(waiting)


def test_a_call_lasts_as_long_as_its_busiest_replica():
    engine = new_engine(shape=(2, 1, 1), sessions=2, rows=2, stops=())
    for rollout, tokens in ((0, 1), (1, 4)):
        session = engine.open(rollout, 0)
        engine.extend(session, (1, 2), tokens)
    finish(engine)
    counts = engine.stats()
    assert (counts["decode"], counts["idle_ended"]) == (5, 3)
    assert sum(value for name, value in counts.items() if name.startswith("idle_")) == 3


def test_weights_that_cannot_be_placed_leave_the_engine_as_it_was(engine):
    asks = {3: ((1, 2, 3), 5)}
    expected = one_turn(engine, asks)
    session = engine.open(3, 0)
    engine.extend(session, (1, 2, 3), 5)
    with pytest.raises(ValueError, match="."):
        engine.set_params({"embedding": np.zeros(3)}, 7, open_sessions="recompute")
    assert finish(engine)[session] == expected[3]


EVENTS = ("open", "extend", "step", "fork", "cancel", "close", "swap")


@settings(deadline=None, max_examples=25, derandomize=True)
@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 99))))
@pytest.mark.parametrize("options", [{}, {"admission": "optimistic", "pool_tokens": SLOTS}], ids=["", "optimistic"])
def test_whatever_happens_holders_add_up_and_every_page_comes_back(shared, crowded, options, events):
    engine = emptied(crowded if options else shared)
    version = 0
    for event, number in events:
        handles = sorted(engine._open)
        pick = handles[number % len(handles)] if handles else None
        own = engine._open.get(pick)
        room = len(engine._open) < engine.sessions
        if event == "open" and room:
            engine.open(number, 0)
        elif event == "extend" and own and not own.budget and len(own.ids) < SLOTS - 20:
            engine.extend(pick, tuple(range(1, 2 + number % 11)), 1 + number % 7)
        elif event == "step" and engine.busy:
            engine.step()
        elif event == "fork" and own and not own.budget and room:
            engine.fork(pick, number)
        elif event == "cancel" and own:
            engine.cancel(pick)
        elif event == "close" and own:
            engine.close(pick)
        elif event == "swap":
            version += 1
            engine.set_params(weights()[1], version, open_sessions=("recompute", "keep")[number % 2])
        book = engine._books[0]
        holds = collections.Counter(page for own in engine._open.values() for page in own.pages)
        assert [holds[page] for page in range(book.count)] == book.holders
    close_all(engine)
    assert engine._books[0].held == 0


@pytest.fixture(scope="module")
def crowded():
    return new_engine(pool_tokens=SLOTS, admission="optimistic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 8, "chunk": 12}, "chunk = 12 is not a multiple of page = 8"),
        ({"attention": "flash"}, "attention = 'flash': choose one of auto, xla, ragged"),
        ({"admission": "greedy"}, "admission = 'greedy': choose one of reserved, optimistic"),
        ({"rows": -1}, "rows = -1 is negative"),
        ({"steps_per_call": 0}, "steps_per_call = 0 must be at least 1"),
        ({"pool_tokens": 32}, "pool_tokens = 32 holds 32 tokens .* one session may need max_tokens = 64"),
    ],
)
def test_bad_options_are_errors_of_the_config(options, message):
    config = tiny.get_config()
    config.rollout.engine_options = options
    with pytest.raises(ConfigError, match=f"config.rollout.engine_options: {message}"):
        build(config)  # so before a run claims its workdir
