"""Laws of the paged engine: what it reports of its samples is true, and sessions do not affect each other."""

import collections

import jax
import numpy as np
import pytest
from synthetic import SPARSE, TINY
from test_dense import STOP, UNTIED, check_against_a_fresh_forward, weights

from configs import qwen3_8b, tiny
from echo_jax.config import ConfigError
from echo_jax.learner.learner import build_learner
from echo_jax.models.transformer import abstract_params, init_pool, used_dtype
from echo_jax.rollout.engine import EngineSetup
from echo_jax.rollout.engine.paged import POOL_AXES, PagedEngine, make_programs
from echo_jax.run.ahead_of_time import GIB, tpu_devices
from echo_jax.run.build import build
from echo_jax.run.lifecycle import train
from echo_jax.system import hlo
from echo_jax.system.metrics import read_metrics
from echo_jax.system.sharding import make_mesh, replicated, sharding_of

SLOTS, CLOSE = 48, 1e-4
SMALL = {"page": 4, "chunk": 8, "chunks_per_call": 3, "rows": 3, "steps_per_call": 4}


def new_engine(config=TINY, *, sessions=6, temperature=0.8, seed=0, shape=(1, 1, 1), **options):
    graphdef, params = weights(config, shape)
    setup = EngineSetup(
        graphdef=graphdef, model_config=config, mesh=make_mesh(*shape), sessions=sessions, max_tokens=SLOTS,
        temperature=temperature, stop_ids=(STOP,), seed=seed,
    )  # fmt: skip
    engine = PagedEngine(setup, **SMALL | options)
    engine.set_params(params, 0)
    return engine


def talk(engine, sessions, delay=lambda rollout, turn: 0, close=True):
    """Runs whole sessions, as many at once as the engine has, with tools that take `delay` steps to answer.

    `sessions`: {rollout: [(new ids, max_new) of each turn]}. Returns {rollout: (all ids, its turns)}.
    """
    waiting, todo, due, handles = list(sessions), {}, {}, {}
    ids, said = dict.fromkeys(sessions, ()), collections.defaultdict(list)
    step = 0
    while waiting or handles:
        while waiting and len(handles) < engine.sessions:
            rollout = waiting.pop(0)
            handles[rollout], todo[rollout] = engine.open(rollout, 0), list(sessions[rollout])
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
        step += 1
    return {rollout: (ids[rollout], said[rollout]) for rollout in sessions}


def asks_of(rng, prompt=None):
    draw = lambda n: tuple(rng.integers(1, TINY.vocab_size, n).tolist())  # noqa: E731
    first = draw(rng.integers(1, 16)) if prompt is None else prompt
    return [(first, 6), (draw(rng.integers(1, 9)), 5), (draw(rng.integers(1, 5)), 4)]


def groups(seed=0, count=3, size=3):
    """Returns the asks of groups whose rollouts share their prompt."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(1, TINY.vocab_size, rng.integers(1, 16)).tolist()) for _ in range(count)]
    return {g * size + i: asks_of(rng, prompts[g]) for g in range(count) for i in range(size)}


@pytest.mark.parametrize("config", [TINY, UNTIED, SPARSE], ids=["tied", "untied", "experts"])
def test_the_trainer_agrees_on_every_sampled_token_of_every_turn(config):
    sessions = groups()
    talks = talk(new_engine(config), sessions)
    params = weights(config)[1]
    for rollout, (ids, turns) in talks.items():
        worst = check_against_a_fresh_forward(params, sessions[rollout], ids, turns, config=config)
        assert worst < CLOSE


def test_delays_and_company_change_no_bit():
    sessions = groups()
    expected = talk(new_engine(), sessions)
    rng = np.random.default_rng(1)
    waits = collections.defaultdict(lambda: int(rng.integers(0, 9)))
    assert talk(new_engine(), sessions, lambda rollout, turn: waits[rollout, turn]) == expected
    alone = new_engine()
    for rollout, asks in sessions.items():  # the prefixes of other groups and of the same are warm by now
        assert talk(alone, {rollout: asks})[rollout] == expected[rollout]
    for rollout, asks in list(sessions.items())[:3]:  # cold
        assert talk(new_engine(), {rollout: asks})[rollout] == expected[rollout]


@pytest.mark.parametrize("shape", [(1, 1, 2), pytest.param((2, 2, 2), marks=pytest.mark.variant)])
def test_more_devices_sample_the_same(shape):
    sessions = groups(count=2)
    one, several = talk(new_engine(), sessions), talk(new_engine(shape=shape), sessions)
    for rollout, (ids, turns) in several.items():
        assert ids == one[rollout][0]
        for turn, expected in zip(turns, one[rollout][1], strict=True):
            np.testing.assert_allclose(turn.logprobs, expected.logprobs, atol=CLOSE)


def test_a_group_computes_its_prompt_once_and_later_groups_find_it():
    rng = np.random.default_rng(0)
    prompt = tuple(rng.integers(1, TINY.vocab_size, 15).tolist())  # 14 are fed by prefill: three pages and a half
    engine = new_engine(sessions=6)
    talk(engine, {rollout: [(prompt, 3)] for rollout in range(6)})
    assert engine.computed["prefill"] == 14
    assert engine.computed["shared"] == 5 * 14
    talk(engine, {9: [((*prompt[:12], 1, 2, 3), 3)]})  # the prompt differs in its last page
    assert engine.computed["prefill"] == 14 + 2
    engine.set_params(weights(TINY)[1], 1)
    talk(engine, {10: [(prompt, 3)]})  # no prefix is found across weights
    assert engine.computed["prefill"] == 14 + 2 + 14


def test_swapped_weights_leave_nothing_behind():
    sessions = groups()
    params = weights(TINY)[1]
    other = jax.tree.map(lambda x: x * 1.1, params)
    engine = new_engine()
    first = talk(engine, sessions)
    engine.set_params(other, 7)
    second = talk(engine, sessions)
    assert second != first
    assert {v for _, turns in second.values() for turn in turns for v in turn.versions} == {7}
    engine.set_params(params, 0)
    assert talk(engine, sessions) == first
    session = engine.open(0, 0)
    with pytest.raises(RuntimeError, match="only change while no session is open"):
        engine.set_params(params, 1)
    engine.close(session)


def test_a_smaller_pool_or_fewer_rows_changes_no_bit():
    sessions = groups()
    expected = talk(new_engine(), sessions)
    small = new_engine(pool_tokens=2 * SLOTS)
    assert small.sessions == 2
    assert talk(small, sessions) == expected
    with pytest.raises(ValueError, match="pool_tokens = 40 is less than one session may need, max_tokens = 48"):
        new_engine(pool_tokens=40)


def test_a_pool_without_a_page_to_spare_computes_what_it_cannot_copy():
    prompt = tuple(np.random.default_rng(4).integers(1, TINY.vocab_size, SLOTS - 2).tolist())  # ends within a page
    expected = talk(new_engine(), {0: [(prompt, 2)], 1: [(prompt, 2)]})
    tight = new_engine(pool_tokens=SLOTS)
    assert tight.sessions == 1
    assert talk(tight, {0: [(prompt, 2)], 1: [(prompt, 2)]}) == expected


def test_sessions_closed_in_any_state_give_everything_back_once():
    rng = np.random.default_rng(3)
    engine = new_engine()
    for _ in range(60):
        free = engine.sessions - len(engine._open)
        choice = rng.integers(0, 4)
        if choice == 0 and free:
            engine.open(int(rng.integers(0, 9)), 0)
        elif choice == 1:
            idle = [h for h, s in engine._open.items() if not s.budget and len(s.ids) < 20]
            if idle:
                engine.extend(idle[0], asks_of(rng)[0][0], 6)
        elif choice == 2 and engine.busy:
            engine.step()
        elif choice == 3 and engine._open:
            engine.close(int(rng.choice(list(engine._open))))
        assert engine._book.held == len({page for s in engine._open.values() for page in s.pages})
    engine.cancel()
    assert engine._book.held == 0
    with pytest.raises(ValueError, match="session 0 is not open"):
        engine.close(0)


def test_bad_requests_are_refused():
    engine = new_engine(sessions=1)
    session = engine.open(0, 0)
    with pytest.raises(RuntimeError, match="all 1 sessions are open"):
        engine.open(1, 0)
    for ids, max_new in (((), 3), ((1,), 0), ((1,) * 40, 9)):
        with pytest.raises(ValueError, match="do not fit 48"):
            engine.extend(session, ids, max_new)
    engine.extend(session, (1, 2), 3)
    with pytest.raises(ValueError, match="is busy"):
        engine.extend(session, (1,), 1)


@pytest.mark.variant
def test_a_run_samples_with_it_and_bad_options_are_refused(tmp_path):
    config = tiny.get_config()
    config.rollout.engine = "paged"
    with config.rollout.unlocked():
        config.rollout.engine_options = {"page": 8, "chunk": 16}
    config.warm_start.num_steps, config.num_steps, config.loss.kl_weight = 2, 2, 0.0
    assert train(config, tmp_path / "w") == 0
    for record in read_metrics(tmp_path / "w" / "metrics.jsonl")[-2:]:
        assert record["policy/sampler_gap_max"] < CLOSE
    config.rollout.engine_options = {"page": 8, "chunk": 12}
    with pytest.raises(ConfigError, match="config.rollout.engine_options: chunk = 12 is not a multiple of page = 8"):
        build(config).make_engine()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "chips", "most_gib"),
    # On v5p the compiler lays out the matrices of keys and values anew: with two heads a chip they are padded.
    [("v5e:2x4", 8, 0.25), ("v6e:2x4", 8, 0.25), ("v5p:2x2x1", 4, 0.45)],
)
def test_programs_for_a_host_of_tpus_work_in_place(topology, chips, most_gib):
    """Qwen3-8B with contexts of 16k tokens: the pool is updated where it is, and nothing of its size is moved."""
    devices = tpu_devices(topology)[:chips]
    learner = build_learner(qwen3_8b.get_config(), 151_936, devices)
    config, mesh = learner.model_config, make_mesh(1, 1, chips, devices)
    graphdef, abstract = abstract_params(config, mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, used_dtype(path, x.dtype, config), sharding=x.sharding), abstract
    )
    programs = make_programs(graphdef, config, mesh, temperature=1.0, stop_ids=(0,), steps=8, attention="auto")
    shape = jax.eval_shape(lambda: init_pool(config, 1024, 64))
    pool = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding_of(mesh, POOL_AXES))
    everywhere = replicated(mesh)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=everywhere)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    rows, chunks, chunk, pages = 64, 4, 512, 16_384 // 64
    for lowered in (
        programs.decode.lower(params, pool, *(ints(rows) for _ in range(4)), ints(rows, pages), key),
        programs.prefill.lower(params, pool, ints(chunks, chunk), ints(chunks, chunk), ints(chunks, pages)),
        programs.copy.lower(pool, ints(8), ints(8)),
    ):
        compiled = lowered.compile()
        memory, bytes_a_chip = compiled.memory_analysis(), pool.size * pool.dtype.itemsize // chips
        assert memory.alias_size_in_bytes >= bytes_a_chip
        assert memory.temp_size_in_bytes <= most_gib * GIB
        assert all(c.bytes < bytes_a_chip // 8 for c in hlo.collectives(compiled.as_text()))
