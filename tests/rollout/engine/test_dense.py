"""Laws of the dense engine: what it reports of its samples is true, and sessions do not affect each other."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import SPARSE, TINY

from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.models.transformer import abstract_params, bind
from echo_jax.rollout.engine.dense import DenseEngine
from echo_jax.system.sharding import make_mesh

LANES, SLOTS, STOP = 3, 48, 0
CLOSE = 1e-4
UNTIED = dataclasses.replace(TINY, tie_embeddings=False, remat="none")
SMALL_VOCABULARY = dataclasses.replace(TINY, vocab_size=8)


@functools.cache
def weights(config, shape=(1, 1, 1)):
    """Returns (graph definition, random parameters on a mesh) without compiling anything."""
    graphdef, abstract = abstract_params(config, make_mesh(*shape))
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(0.0, 0.25, x.shape).astype(x.dtype), x.sharding)  # noqa: E731
    return graphdef, jax.tree.map(draw, abstract)


def new_engine(config=TINY, *, lanes=LANES, temperature=0.8, seed=0, steps_per_call=8, shape=(1, 1, 1), stops=(STOP,)):
    graphdef, params = weights(config, shape)
    engine = DenseEngine(
        graphdef, config, lanes=lanes, max_tokens=SLOTS, temperature=temperature, stop_ids=stops, seed=seed,
        steps_per_call=steps_per_call, mesh=make_mesh(*shape),
    )  # fmt: skip
    engine.set_params(params, 0)
    return engine


@pytest.fixture(scope="module")
def shared():
    return new_engine()


@pytest.fixture
def engine(shared):
    """One engine for all tests, which also tests that sessions leave nothing behind."""
    shared.cancel()
    shared.set_params(weights(TINY)[1], 0)
    return shared


@pytest.fixture
def unused(shared):
    """Returns a function that makes an unused engine with the shared one's compiled program."""

    def make(seed=0):
        engine = new_engine(seed=seed)
        engine.compiled = shared.compiled
        return engine

    return make


@pytest.fixture(scope="module")
def gamblers():
    """Many lanes over a vocabulary of eight."""
    return new_engine(SMALL_VOCABULARY, lanes=128, temperature=0.5)


def one_turn(engine, asks):
    """Opens a session for each {lane: (rollout, ids, max_new)} and returns {lane: turn}."""
    for lane, (rollout, ids, max_new) in asks.items():
        engine.open(lane, rollout)
        engine.generate(lane, ids, max_new)
    finished = {}
    while engine.busy:
        finished |= engine.step()
    assert finished.keys() == asks.keys()
    return finished


def talk(engine, sessions, delay=lambda lane, turn: 0):
    """Runs whole sessions in parallel, with tools that take `delay` steps to answer.

    Args:
      sessions: {lane: (rollout, [(new ids, max_new) of each turn])}.

    Returns:
      {lane: (all ids of the session, its turns)}.
    """
    todo, due, said = {}, {}, collections.defaultdict(list)
    ids = dict.fromkeys(sessions, ())
    for lane, (rollout, asks) in sessions.items():
        engine.open(lane, rollout)
        todo[lane], due[lane] = list(asks), delay(lane, 0)
    step = 0
    while any(todo.values()) or engine.busy:
        for lane in [lane for lane, when in due.items() if when <= step and todo[lane]]:
            new, max_new = todo[lane].pop(0)
            engine.generate(lane, new, max_new)
            ids[lane] += new
            del due[lane]
        finished = engine.step() if engine.busy else {}
        for lane, turn in finished.items():
            ids[lane] += turn.ids
            said[lane].append(turn)
            due[lane] = step + 1 + delay(lane, len(said[lane]))
        step += 1
    return {lane: (ids[lane], said[lane]) for lane in sessions}


@functools.cache
def scorer(config, temperature):
    """Returns a function of (params, ids [SLOTS]) -> log-prob of each id after the first, by the trainer's forward."""
    graphdef, _ = weights(config)

    def score(params, ids):
        model = bind(graphdef, params)
        hidden = model(ids[None], jnp.arange(SLOTS)[None], jnp.ones((1, SLOTS), jnp.int32))[0]
        return fused_logprobs(hidden[:-1], model.head(), ids[1:], temperature=temperature).logprob

    return jax.jit(score)


def fresh_logprobs(params, ids, *, config=TINY, temperature=0.8):
    padded = np.zeros(SLOTS, np.int32)
    padded[: len(ids)] = ids
    return [0.0, *np.asarray(scorer(config, temperature)(params, padded))[: len(ids) - 1].tolist()]


def check_against_a_fresh_forward(params, asks, ids, turns, **options):
    """Returns the largest difference between the reported values of sampled ids and those that the trainer computes."""
    expected, at, worst = fresh_logprobs(params, ids, **options), 0, 0.0
    for (new, max_new), turn in zip(asks, turns, strict=True):
        at += len(new)
        assert 1 <= len(turn.ids) == len(turn.logprobs) <= max_new
        assert turn.stopped == (turn.ids[-1] == STOP)
        assert turn.stopped or len(turn.ids) == max_new
        assert STOP not in turn.ids[:-1]
        worst = max([worst, *(abs(a - b) for a, b in zip(turn.logprobs, expected[at:], strict=False))])
        at += len(turn.ids)
    assert at == len(ids)
    return worst


def random_session(rng, rollout, turns=3):
    return rollout, [
        (tuple(rng.integers(1, TINY.vocab_size, int(rng.integers(1, 9))).tolist()), int(rng.integers(1, 8)))
        for _ in range(turns)
    ]


# -- truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "temperature"), [(TINY, 0.8), (UNTIED, 1.7)], ids=["tied", "untied"])
def test_the_trainer_agrees_on_every_sampled_token_of_every_turn(shared, config, temperature):
    engine = shared if config is TINY else new_engine(config, temperature=temperature)
    rng = np.random.default_rng(0)
    for _ in range(4):
        engine.cancel()
        sessions = {lane: random_session(rng, int(rng.integers(1 << 31))) for lane in range(LANES)}
        results = talk(engine, sessions, delay=lambda lane, turn: (lane * 2 + turn) % 3)
        for lane, (ids, turns) in results.items():
            worst = check_against_a_fresh_forward(
                weights(config)[1], sessions[lane][1], ids, turns, config=config, temperature=temperature
            )
            assert worst < CLOSE
            assert engine._host.fed[lane] == len(ids) - 1  # each token was computed once


def test_samples_follow_the_tempered_distribution(gamblers):
    """Pearson's test over 2,048 first tokens; 7 degrees of freedom exceed 29.9 once in ten thousand."""
    prompt = (1, 2, 3)
    counts = np.zeros(8)
    for first in range(0, 2048, 128):
        for turn in one_turn(gamblers, {lane: (first + lane, prompt, 1) for lane in range(128)}).values():
            counts[turn.ids[0]] += 1
    options = dict(config=SMALL_VOCABULARY, temperature=0.5)
    expected = np.exp([fresh_logprobs(weights(SMALL_VOCABULARY)[1], (*prompt, i), **options)[3] for i in range(8)])
    assert expected.max() > 1.3 * expected.min()  # otherwise uniform samples would pass
    assert np.sum((counts - 2048 * expected) ** 2 / (2048 * expected)) < 29.9


def test_every_position_and_rollout_gets_fresh_draws(engine):
    turns = [one_turn(engine, {0: (rollout, (1, 2, 3), 20)})[0].ids for rollout in range(12)]
    assert len({*turns}) == 12
    assert len({ids[0] for ids in turns}) > 4
    longest = max(turns, key=len)
    assert len({*longest}) > len(longest) / 2


def test_other_seed_gives_other_samples(engine, unused):
    asks = {0: (5, (1, 2, 3), 20)}
    assert one_turn(engine, asks)[0].ids != one_turn(unused(seed=1), asks)[0].ids


# -- independence --------------------------------------------------------------------------------------------------


def test_session_is_equal_bit_for_bit_whatever_its_neighbours_do(engine):
    rng = np.random.default_rng(1)
    session = random_session(rng, 77, turns=4)
    expected = talk(engine, {1: session})[1]
    for trial in range(6):
        engine.cancel()
        neighbours = {lane: random_session(rng, int(rng.integers(100)), turns=trial % 3 + 1) for lane in (0, 2)}
        waits = rng.integers(0, 6, (LANES, 9))
        assert talk(engine, {1: session} | neighbours, delay=lambda lane, turn, w=waits: w[lane, turn])[1] == expected


def test_order_of_tool_answers_changes_no_session(engine):
    rng = np.random.default_rng(2)
    sessions = {lane: random_session(rng, lane) for lane in range(LANES)}
    expected = talk(engine, sessions)
    for _ in range(5):
        waits = rng.integers(0, 9, (LANES, 9))
        assert talk(engine, sessions, delay=lambda lane, turn, w=waits: w[lane, turn]) == expected


def test_rollout_is_the_same_in_another_lane(engine):
    ids = tuple(range(1, 12))
    turns = [one_turn(engine, {lane: (9, ids, 20)})[lane] for lane in range(LANES)]
    assert turns[0].ids == turns[1].ids == turns[2].ids
    np.testing.assert_allclose(turns[1].logprobs, turns[0].logprobs, atol=CLOSE)
    np.testing.assert_allclose(turns[2].logprobs, turns[0].logprobs, atol=CLOSE)


def test_steps_per_call_do_not_change_samples(engine):
    asks = {0: (1, (1, 2, 3, 4, 5), 11), 2: (2, (6,), 20)}
    expected = one_turn(engine, asks)
    other = one_turn(new_engine(steps_per_call=3), asks)
    assert {lane: turn.ids for lane, turn in other.items()} == {lane: turn.ids for lane, turn in expected.items()}


def test_lane_keeps_nothing_of_its_previous_session(engine, unused):
    asks = {1: (3, (4, 5, 6), 12)}
    expected = one_turn(unused(), asks)
    one_turn(engine, {lane: (lane, tuple(range(1, 31)), SLOTS - 30) for lane in range(LANES)})
    assert one_turn(engine, asks) == expected
    # Nor of one that was cancelled in the middle of its turn.
    for drop in (engine.cancel, lambda: engine.open(1, 8)):
        engine.cancel()
        engine.open(1, 8)
        engine.generate(1, (9, 8, 7, 6, 5), 30)
        engine.step()
        drop()
        assert (engine.known(1), engine.busy) == (0, False)
        assert engine.step() == {}
        assert one_turn(engine, asks) == expected


# -- turns ---------------------------------------------------------------------------------------------------------


def test_a_turn_may_stop_at_its_first_token(gamblers):
    turns = one_turn(gamblers, {lane: (lane, (lane % 8, lane % 5), 9) for lane in range(128)})
    at_once = {lane: turn for lane, turn in turns.items() if turn.ids == (STOP,)}
    assert at_once
    for lane, turn in at_once.items():
        assert (turn.stopped, len(turn.logprobs), gamblers.known(lane)) == (True, 1, 3)
        gamblers.generate(lane, (4, 5), 3)  # the session continues after the stop token
    again = {}
    while gamblers.busy:
        again |= gamblers.step()
    assert again.keys() == at_once.keys()
    for lane, turn in again.items():
        ids = (lane % 8, lane % 5, STOP, 4, 5, *turn.ids)
        expected = fresh_logprobs(weights(SMALL_VOCABULARY)[1], ids, config=SMALL_VOCABULARY, temperature=0.5)
        np.testing.assert_allclose(turn.logprobs, expected[5:], atol=CLOSE)


def test_each_of_several_stop_tokens_ends_a_turn():
    stops = (STOP, 5)
    engine = new_engine(SMALL_VOCABULARY, lanes=32, temperature=2.0, stops=stops)
    turns = one_turn(engine, {lane: (lane, (4, lane % 8), 12) for lane in range(32)})
    last = {turn.ids[-1] for turn in turns.values() if turn.stopped}
    assert last == set(stops)
    for turn in turns.values():
        assert turn.stopped == (turn.ids[-1] in stops)
        assert not set(stops) & set(turn.ids[:-1])


def test_a_turn_of_one_token_has_one_token(engine):
    for turn in one_turn(engine, {lane: (lane, (1,) * (lane + 1), 1) for lane in range(LANES)}).values():
        assert len(turn.ids) == len(turn.logprobs) == 1
        assert turn.stopped == (turn.ids == (STOP,))


def test_a_session_may_fill_its_lane_to_the_last_slot(engine):
    ids = tuple(range(1, SLOTS))
    turn = one_turn(engine, {2: (0, ids, 1)})[2]
    assert engine.known(2) == SLOTS
    np.testing.assert_allclose(turn.logprobs, fresh_logprobs(weights(TINY)[1], ids + turn.ids)[SLOTS - 1 :], atol=CLOSE)


def test_a_turn_is_reported_once_and_carries_its_version(engine):
    engine.set_params(weights(TINY)[1], 12)
    assert one_turn(engine, {0: (0, (1,), 3)})[0].versions == (12,) * 3
    assert engine.step() == {}


@pytest.mark.parametrize(
    ("ids", "max_new"), [((), 3), ((1, 2), 0), ((1, 2), -1), ((1,) * SLOTS, 1), ((1,) * (SLOTS - 3), 4)]
)
def test_request_that_does_not_fit_is_refused_with_the_numbers(engine, ids, max_new):
    engine.open(0, 0)
    with pytest.raises(
        ValueError, match=rf"lane 0 .* 0 \+ {len(ids)} known and {max_new} new tokens do not fit {SLOTS}"
    ):
        engine.generate(0, ids, max_new)
    assert (engine.known(0), engine.busy) == (0, False)


def test_a_busy_lane_is_refused(engine):
    engine.open(0, 0)
    engine.generate(0, (1, 2), 3)
    with pytest.raises(ValueError, match="busy"):
        engine.generate(0, (1, 2), 3)


# -- weights -------------------------------------------------------------------------------------------------------


def test_weights_do_not_change_under_an_open_session(engine):
    engine.open(1, 0)
    engine.generate(1, (1, 2, 3), 2)
    with pytest.raises(RuntimeError, match="no session is open"):
        engine.set_params(weights(TINY)[1], 1)
    while engine.busy:
        engine.step()
    with pytest.raises(
        RuntimeError, match=r"lanes \[1\]"
    ):  # between two turns, its cache holds the old weights' keys and values
        engine.set_params(weights(TINY)[1], 1)
    engine.cancel()
    engine.set_params(weights(TINY)[1], 1)


def test_new_weights_are_used_for_sampling(engine):
    asks = {0: (4, (1, 2, 3), 20)}
    old = one_turn(engine, asks)[0]
    engine.cancel()
    params = jax.tree.map(lambda x: x + 0.1, weights(TINY)[1])
    engine.set_params(params, 1)
    new = one_turn(engine, asks)[0]
    assert new.ids != old.ids
    np.testing.assert_allclose(new.logprobs, fresh_logprobs(params, (1, 2, 3, *new.ids))[3:], atol=CLOSE)


def test_one_program_serves_all_uses(engine):
    rng = np.random.default_rng(3)
    for version in range(3):
        engine.cancel()
        engine.set_params(jax.tree.map(lambda x, v=version: x + 0.01 * v, weights(TINY)[1]), version)
        talk(engine, {lane: random_session(rng, lane) for lane in range(version + 1)})
        engine.open(0, 1)
        engine.generate(0, (1,) * 20, 20)
        engine.step()
    assert engine.compiled._cache_size() == 1


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.variant) for s in ((1, 8, 1), (8, 1, 1)))]
)
def test_eight_devices_sample_like_one_for_any_training_mesh(engine, shape):
    """Two devices share the heads and four the lanes, so the number of lanes is a multiple of four."""
    spread = new_engine(shape=shape, lanes=LANES - 1)
    assert spread.lanes % 4 == 0
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(spread._params)} == {8}
    assert spread._params["layers"]["gate"].sharding.shard_shape((2, 16, 32)) == (2, 16, 16)
    asks = {lane: (lane, (1, 2, 3 + lane), 20) for lane in range(LANES - 1)}
    for lane, turn in one_turn(engine, asks).items():
        own = one_turn(spread, asks)[lane]
        assert own.ids == turn.ids
        np.testing.assert_allclose(own.logprobs, turn.logprobs, atol=1e-5)
        spread.cancel()


@pytest.mark.variant  # kernels/test_experts.py compares every mesh
def test_eight_devices_sample_from_experts_like_one():
    one, spread = (new_engine(SPARSE, shape=shape, lanes=4) for shape in ((1, 1, 1), (2, 2, 2)))
    asks = {lane: (lane, (1, 2, 3 + lane), 12) for lane in range(4)}
    turns, own = one_turn(one, asks), one_turn(spread, asks)
    for lane, turn in turns.items():
        assert own[lane].ids == turn.ids
        np.testing.assert_allclose(own[lane].logprobs, turn.logprobs, atol=1e-5)
        expected = fresh_logprobs(weights(SPARSE)[1], (*asks[lane][1], *turn.ids), config=SPARSE)
        np.testing.assert_allclose(turn.logprobs, expected[3:], atol=CLOSE)


def test_weights_are_held_in_the_dtype_that_the_model_uses():
    """So an engine holds bf16 matrices; its results equal those of f32 matrices cast when used."""
    half = dataclasses.replace(TINY, compute_dtype="bfloat16")
    dtypes = {str(x.dtype) for x in jax.tree.leaves(new_engine(half)._params)}
    assert dtypes == {"bfloat16", "float32"}
    assert new_engine(half)._params["final_norm"].dtype == "float32"
