"""Laws of collecting rollouts, with real sandboxes and a tiny model that knows how to call tools."""

import collections
import dataclasses
import functools
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import TINY, make_trajectory

from echo_jax.kernels.fused_logprobs import fused_logprobs
from echo_jax.models.transformer import abstract_params, bind
from echo_jax.render import BuiltinRenderer
from echo_jax.render.calls import MALFORMED
from echo_jax.roles import Role
from echo_jax.rollout import collector as collector_lib
from echo_jax.rollout import world as environment
from echo_jax.rollout.collector import ATTEMPTS, Collector, Interrupted, Job, RolloutError
from echo_jax.rollout.engine import EngineSetup
from echo_jax.rollout.engine.paged import PagedEngine
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.summary import engine_metrics, rollout_metrics, summaries
from echo_jax.rollout.trajectory import DTYPES
from echo_jax.rollout.world import START_ATTEMPTS, EpisodeWorld, Machine
from echo_jax.system.peers import Peers
from echo_jax.system.sharding import make_mesh
from echo_jax.system.user_code import UserCodeError
from echo_jax.tasks.task import Script, Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools import cgroup
from echo_jax.tools.sandbox import CommandResult, Limits, Sandbox, SandboxBroken, SandboxUsedUp, Status

TOKENIZER = SentencePieces()
RENDERER = BuiltinRenderer(TOKENIZER)
RULES = Rules(max_turns=4, max_tokens=96, max_turn_tokens=12)
LIMITS = Limits(timeout_seconds=10.0, memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)
LANES, TEMPERATURE = 3, 0.9
CALLER = dataclasses.replace(TINY, vocab_size=TOKENIZER.vocab_size, embed_dim=32, tie_embeddings=False)
HABITS = {
    "bash ls": 1.8,
    "bash cat oak": 1.8,
    "bash wc -l oak": 1.8,
    "bash false": 1.8,
    "submit oak": 1.65,
    "submit ./elm": 1.65,
    "oak": 1.5,
}  # what the model writes, and how strongly it prefers that


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScriptedTask(Task):
    """A task whose script and score are given."""

    script: Callable[[], Script] = lambda: iter(())
    judge: Callable[[str | None], float] = lambda answer: float(answer == "oak")
    prompt: str = "value of oak"
    files: Mapping[str, bytes] = dataclasses.field(default_factory=lambda: {"oak": b"elm\nash\n", "elm": b"1\n"})

    def score(self, episode):
        return self.judge(episode.answer)

    def demonstrate(self, rng, *, solve):
        yield from self.script()


def says(*turns):
    """Returns a script that writes these turns, whatever the answers."""

    def script():
        for text in turns:
            assert isinstance((yield text), str)

    return script


def jobs_of(count, **fields):
    """Returns jobs with the same prompt and files; only names, groups and rollouts differ."""
    return [Job(ScriptedTask(name=f"task {i}", **fields), group=i // 2, rollout=100 + i) for i in range(count)]


def scripted_jobs(*scripts, **fields):
    return [
        Job(ScriptedTask(name=f"task {i}", script=script, **fields), group=i, rollout=i)
        for i, script in enumerate(scripts)
    ]


@functools.cache
def caller():
    """Returns (graph definition, parameters) of a model that mostly continues a token as one of `HABITS` does."""
    graphdef, abstract = abstract_params(CALLER, make_mesh(1, 1, 1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.1, x.shape).astype(x.dtype), abstract)
    params["final_norm"] += 1.0
    for name in ("attention_norm", "ffn_norm"):
        params["layers"][name] += 1.0
    codes: dict[int, int] = {}
    for text, strength in HABITS.items():
        turn = [TOKENIZER.assistant, *TOKENIZER.encode(text), TOKENIZER.end]
        for token, following in itertools.pairwise(turn):
            code = codes.setdefault(token, len(codes))
            params["embedding"][token] = 3.0 * np.eye(CALLER.embed_dim)[code]
            params["lm_head"][following, code] = max(strength, params["lm_head"][following, code])
    assert len(codes) <= CALLER.embed_dim
    return graphdef, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)


def engine_setup(**fields):
    plain = dict(
        graphdef=caller()[0], model_config=CALLER, mesh=make_mesh(1, 1, 1), sessions=LANES,
        max_tokens=RULES.max_tokens, temperature=TEMPERATURE, stop_ids=RENDERER.stop_ids, seed=0,
    )  # fmt: skip
    return EngineSetup(**plain | fields)


@pytest.fixture(scope="module")
def shared():
    engine = PagedEngine(engine_setup())
    engine.set_params(caller()[1], 5)
    return engine


@pytest.fixture
def engine(shared):
    yield shared
    assert not shared.busy
    shared.set_params(caller()[1], 5)  # possible only while no session is open


@pytest.fixture
def collector():
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=3) as collector:
        yield collector
    assert own_sandboxes() == 0


def own_sandboxes():
    """Counts the sandboxes of this process: each has a PID 1 below bwrap, or below the fork server in bwrap."""
    children = collections.defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            serves = b"fork_server" in (status.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        spaces = fields["NSpid"].split()
        children[int(fields["PPid"])].append(
            (int(spaces[0]), fields["Name"], spaces[-1] == "1", serves and len(spaces))
        )
    count = 0
    for bwrap in (pid for pid, name, *_ in children[os.getpid()] if name == "bwrap"):
        for pid, _, first, server in children[bwrap]:
            count += sum(other[2] for other in children[pid]) if server else first
    return count


def same(a, b):
    """Returns whether two trajectories are equal bit for bit."""
    arrays = DTYPES
    return all(
        x.tobytes() == y.tobytes() if name in arrays else x == y
        for name, x, y in ((name, getattr(a, name), getattr(b, name)) for name in vars(a))
    )


@functools.cache
def scorer():
    def score(params, ids):
        model = bind(caller()[0], params)
        hidden = model(ids[None], jnp.arange(RULES.max_tokens)[None], jnp.ones((1, RULES.max_tokens), jnp.int32))[0]
        return fused_logprobs(hidden[:-1], model.head(), ids[1:], temperature=TEMPERATURE).logprob

    return jax.jit(score)


def with_task(jobs, i, **fields):
    """Returns the jobs with a different task for job i."""
    changed = dataclasses.replace(jobs[i], task=dataclasses.replace(jobs[i].task, **fields))
    return [*jobs[:i], changed, *jobs[i + 1 :]]


def begins_like(part, whole):
    """Returns whether `part` is a prefix of `whole`, bit for bit."""
    arrays = DTYPES
    return all(getattr(whole, name).tobytes().startswith(getattr(part, name).tobytes()) for name in arrays)


def unreliable(times, which=lambda files: True):
    """Returns a Sandbox class whose first `times` starts for each set of files (of `which`) fail, and its starts."""
    starts = []

    class Unreliable(Sandbox):
        def __init__(self, *, files, **options):
            starts.append(tuple(files))
            if which(files) and starts.count(tuple(files)) <= times:
                raise SandboxBroken("injected")
            super().__init__(files=files, **options)

    return Unreliable, starts


class Dying(Sandbox):
    """A sandbox that dies at its second command."""

    calls = 0

    def run(self, command, **options):
        self.calls += 1
        if self.calls == 2:
            self.close()
        return super().run(command, **options)


# -- sampled rollouts ----------------------------------------------------------------------------------------------


def test_every_job_gives_one_trajectory_in_order(collector, engine):
    for count in (0, 1, LANES, 4 * LANES + 1):
        jobs = jobs_of(count)
        trajectories = collector.rollouts(jobs, engine)
        assert [(t.task, t.group) for t in trajectories] == [(job.task.name, job.group) for job in jobs]
        assert all(t.policy_version == 5 for t in trajectories)
    # The model must show all behaviour of a policy, or these tests prove little.
    assert {t.outcome for t in trajectories} >= {"submitted", "max_turns"}
    assert {status for t in trajectories for status in t.calls} >= {"ok", "nonzero", "submit", "unknown_tool"}
    assert {t.reward for t in trajectories} == {0.0, 1.0}


def test_the_trainer_agrees_on_every_sampled_token(collector, engine):
    """Over prompt, turns, observations and their roles, the stored values are the computed ones."""
    for trajectory in collector.rollouts(jobs_of(9), engine):
        action = trajectory.role == Role.ACTION
        assert ((trajectory.entropy > 0) == action).all()
        assert ((trajectory.logprob != 0) == action).all()
        ids = np.zeros(RULES.max_tokens, np.int32)
        ids[: len(trajectory.ids)] = trajectory.ids
        expected = np.asarray(scorer()(caller()[1], ids))[: len(trajectory.ids) - 1]
        np.testing.assert_allclose(trajectory.logprob[1:][action[1:]], expected[action[1:]], atol=1e-4)


def test_rollouts_do_not_depend_on_how_long_tools_take(collector, engine, monkeypatch):
    jobs = jobs_of(10)
    expected = collector.rollouts(jobs, engine)
    clock = random.Random(0)

    def slowed(method):
        def slow(environment, *arguments, **options):
            time.sleep(clock.random() ** 4 * 0.15)
            return method(environment, *arguments, **options)

        return slow

    for name in ("open", "run", "finish"):
        monkeypatch.setattr(EpisodeWorld, name, slowed(getattr(EpisodeWorld, name)))
    for _ in range(3):
        assert all(map(same, collector.rollouts(jobs, engine), expected))


def test_a_rollout_does_not_depend_on_its_neighbours(collector, engine):
    jobs = jobs_of(9)
    expected = collector.rollouts(jobs, engine)
    for i in (0, 4, 8):  # with fewer jobs, but each still in its lane
        alone = collector.rollouts([*jobs_of(i % LANES), jobs[i]], engine)[-1]
        assert same(alone, expected[i])


def test_one_thread_is_enough_for_all_tools(engine):
    jobs = jobs_of(7)
    with (
        Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=1) as one,
        Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=16) as many,
    ):
        assert all(map(same, one.rollouts(jobs, engine), many.rollouts(jobs, engine)))


def test_a_slow_start_holds_up_no_other_rollout(engine, monkeypatch):
    """Each of two threads is one rollout's: none of them waits for another."""
    others_end, first = threading.Event(), jobs_of(1)[0].task.name

    class Waiting(EpisodeWorld):
        def open(self):
            assert self.task.name != first or others_end.wait(5)
            return super().open()

        def finish(self, *arguments, **options):
            others_end.set()
            return super().finish(*arguments, **options)

    monkeypatch.setattr(collector_lib, "EpisodeWorld", Waiting)
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=2) as collector:
        assert all(t.scored for t in collector.rollouts(jobs_of(2), engine))


def counted(monkeypatch):
    """Counts sandboxes: in "most", how many were open at once; in "starts", how many there were."""
    counts, lock = {"most": 0, "starts": 0}, threading.Lock()
    is_open = set()

    class Counted(Sandbox):
        def __init__(self, **options):
            with lock:
                is_open.add(self)
                counts.update(most=max(counts["most"], len(is_open)), starts=counts["starts"] + 1)
            super().__init__(**options)

        def close(self):
            super().close()
            with lock:
                is_open.discard(self)

    monkeypatch.setattr(environment, "Sandbox", Counted)
    return counts


def test_a_cap_on_sandboxes_holds_and_changes_no_rollout(collector, engine, monkeypatch):
    jobs = jobs_of(5)
    expected = collector.rollouts(jobs, engine)
    counts = counted(monkeypatch)
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=16, max_sandboxes=2) as capped:
        for prepared in (jobs, jobs[2:]):
            capped.prepare(prepared, engine)
            assert all(map(same, capped.rollouts(jobs, engine), expected))
        capped.prepare(jobs, engine)
        capped.scripted(scripted_jobs(*[says("submit oak")] * 4), [True] * 4, 0)
    assert counts["most"] == 2


def test_the_seconds_of_a_collection_say_what_it_waited_for(collector, engine, monkeypatch):
    inside, step, finish = [], engine.step, EpisodeWorld.finish

    def slow_step():
        start = time.perf_counter()
        time.sleep(0.02)
        try:
            return step()
        finally:
            inside.append(time.perf_counter() - start)

    monkeypatch.setattr(engine, "step", slow_step)
    monkeypatch.setattr(EpisodeWorld, "finish", lambda *a, **k: time.sleep(0.1) or finish(*a, **k))
    start = time.perf_counter()
    collector.rollouts(jobs_of(1), engine, lambda done: time.sleep(0.05 * done))
    passed, seconds = time.perf_counter() - start, collector.seconds
    assert sum(inside) <= seconds.engine <= sum(inside) + 0.01
    assert seconds.tools >= 0.1
    assert seconds.host >= 0.05
    assert passed - 0.1 <= sum(seconds) <= passed


# -- sandboxes opened ahead ----------------------------------------------------------------------------------------


def open_ahead(collector, jobs, engine):
    """Prepares for jobs, and waits until the sandboxes are there."""
    collector.prepare(jobs, engine)
    deadline = time.monotonic() + 10
    while own_sandboxes() < min(LANES, len(jobs)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sandboxes_opened_ahead_are_used_and_change_no_rollout(collector, engine, monkeypatch):
    jobs = jobs_of(5)
    expected = collector.rollouts(jobs, engine)
    counts = counted(monkeypatch)
    open_ahead(collector, jobs, engine)
    assert counts["starts"] == LANES
    assert all(map(same, collector.rollouts(jobs, engine), expected))
    assert counts["starts"] == len(jobs)


@pytest.mark.parametrize("way", ["exit", "others", "other tasks", "finished", "prepared anew", "stop"])
def test_sandboxes_opened_ahead_in_vain_are_closed(engine, monkeypatch, way):
    jobs = jobs_of(LANES)
    counts = counted(monkeypatch)
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=3) as collector:
        made = collector.rollouts(jobs, engine)
        open_ahead(collector, jobs, engine)
        match way:
            case "others":
                collector.rollouts(jobs_of(2 * LANES)[LANES:], engine)
            case "other tasks":
                collector.rollouts(jobs_of(LANES), engine)
                assert counts["starts"] == 3 * LANES
            case "finished":
                assert all(map(same, collector.rollouts(jobs, engine, finished=made), made))
            case "prepared anew":
                collector.prepare([], engine)
            case "stop":
                collector.stop.set()
                with pytest.raises(Interrupted):
                    collector.rollouts(jobs, engine)
                collector.prepare(jobs, engine)
        assert own_sandboxes() == (LANES if way == "exit" else 0)
        assert counts["most"] == LANES
    assert own_sandboxes() == 0


def test_no_sandbox_opened_ahead_outlives_an_error(engine):
    def fail():
        with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=1) as collector:  # so that some starts still wait
            collector.prepare(jobs_of(LANES), engine)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert own_sandboxes() == 0


def test_a_fault_while_opening_ahead_counts_as_one_in_the_collection(collector, engine, monkeypatch):
    jobs = with_task(jobs_of(5), 0, files={"bad": b""})  # for a machine that fails
    jobs = with_task(jobs, 2, files={"../oak": b""})  # an exception of the user's
    results, starts_of = [], []
    for prepares in (False, True):
        sandbox, starts = unreliable(99, lambda files: "bad" in files)
        monkeypatch.setattr(environment, "Sandbox", sandbox)
        if prepares:
            collector.prepare(jobs, engine)
        results.append(collector.rollouts(jobs, engine))
        starts_of.append((sorted(starts), collector.retried, collector.fault, collector.raised.keys()))
    assert all(map(same, *results))
    assert [t.scored for t in results[0]] == [False, True, False, True, True]
    assert starts_of[0] == starts_of[1]
    assert starts_of[0][1] == 2
    assert list(starts_of[0][3]) == [jobs[2].rollout]


def test_progress_counts_up_to_the_number_of_jobs(collector, engine):
    seen = []
    collector.rollouts(jobs_of(5), engine, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 5
    seen.clear()
    collector.scripted(scripted_jobs(*[says("submit oak")] * 4), [True] * 4, 0, seen.append)
    assert seen == [1, 2, 3, 4]


# -- faults of the machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, START_ATTEMPTS - 1])
def test_sandbox_that_starts_after_retries_leaves_no_trace(collector, engine, monkeypatch, times):
    jobs = jobs_of(5)
    for i in range(5):
        jobs = with_task(jobs, i, files={f"f{i}": b""})
    expected = collector.rollouts(jobs, engine)
    replacement, starts = unreliable(times)
    monkeypatch.setattr(environment, "Sandbox", replacement)
    assert all(map(same, collector.rollouts(jobs, engine), expected))
    assert len(starts) == 5 * (times + 1)


def test_sandbox_that_never_starts_gives_one_unscored_trajectory(collector, engine, monkeypatch):
    expected = collector.rollouts(jobs_of(7), engine)
    replacement, starts = unreliable(99, lambda files: "bad" in files)
    monkeypatch.setattr(environment, "Sandbox", replacement)
    trajectories = collector.rollouts(with_task(jobs_of(7), 2, files={"bad": b""}), engine)
    assert starts.count(("bad",)) == START_ATTEMPTS * ATTEMPTS
    assert collector.retried == 1
    lost, other = trajectories.pop(2), expected.pop(2)
    assert (lost.outcome, lost.scored, lost.reward) == ("infra", False, 0.0)
    assert lost.turns >= 1
    assert begins_like(lost, other)  # tokens sampled before the fault are kept
    assert all(map(same, trajectories, expected))


def test_failing_setup_is_a_fault_of_the_machine(collector, engine):
    trajectories = collector.rollouts(with_task(jobs_of(3), 1, setup="exit 3"), engine)
    assert [t.scored for t in trajectories] == [True, False, True]
    assert trajectories[1].outcome == "infra"
    with pytest.raises(RolloutError, match="script of task task 0 failed .* setup 'exit 3': nonzero"):
        collector.scripted(scripted_jobs(says("submit oak"), setup="exit 3"), [True], 0)


def test_setup_runs_in_the_agents_directory(collector):
    job = scripted_jobs(says("bash pwd", "submit oak"), setup="mkdir d; cd d")
    trajectory = collector.scripted(job, [True], 0)[0]
    assert TOKENIZER.decode(trajectory.ids[trajectory.role == Role.OBSERVATION]) == "/work/d\n"


def test_sandbox_that_dies_ends_only_its_episode_and_costs_the_reward(collector, engine, monkeypatch):
    """It died at a call, so the agent may have killed it."""
    everyone = jobs_of(12, judge=lambda answer: 1.0)
    expected = collector.rollouts(everyone, engine)
    monkeypatch.setattr(environment, "Sandbox", Dying)
    trajectories = collector.rollouts(everyone, engine)
    lost = [i for i, t in enumerate(trajectories) if t.outcome == "broken"]
    assert 0 < len(lost) < 12
    assert collector.retried == len(lost)
    assert "closed" in collector.fault
    for i, trajectory in enumerate(trajectories):
        assert trajectory.scored
        if i in lost:
            assert begins_like(trajectory, expected[i])
            assert (trajectory.calls["infra"], trajectory.reward) == (1, 0.0)
        else:
            assert same(trajectory, expected[i])
    metrics = metrics_of(trajectories)
    assert (metrics["rollout/broken"], metrics["rollout/rejected"]) == (len(lost), 0)
    assert metrics["rollout/solve_rate"] == (12 - len(lost)) / 12
    with pytest.raises(RolloutError, match="task 0 failed on this machine: .*closed"):
        collector.scripted(scripted_jobs(says("bash ls", "bash ls", "submit oak")), [True], 0)


def test_rollout_repeated_after_a_machine_fault_is_equal_bit_for_bit(collector, engine, monkeypatch):
    died = set()

    class DiesOnce(Sandbox):
        def __init__(self, *, files, **options):
            super().__init__(files=files, **options)
            self.dies = next(name for name in files if name.startswith("task"))

        def run(self, command, **options):
            if self.dies not in died:
                died.add(self.dies)
                self.close()
            return super().run(command, **options)

    jobs = jobs_of(8)
    for i in range(8):
        jobs = with_task(jobs, i, files={"oak": b"elm\n", f"task{i}": b""})
    expected = collector.rollouts(jobs, engine)
    assert collector.retried == 0
    monkeypatch.setattr(environment, "Sandbox", DiesOnce)
    assert all(map(same, collector.rollouts(jobs, engine), expected))
    assert collector.retried == len(died) > 0
    script = scripted_jobs(says("bash ls", "submit oak"), files={"task99": b""})
    assert collector.scripted(script, [True], 0)[0].reward == 1.0


class Breaks:
    """The world of an agent that answers every call, and breaks at a given place: "call 1", "call 2", …, "tool" (which
    says so), "kill" or "score"."""

    timeout, cwd = 1.0, "/work"

    def __init__(self, place):
        self.place, self.calls = place, 0

    def run(self, command, **options):
        self.calls += 1
        self.reach(f"call {self.calls}")
        status, exit_code = (Status.INFRA, None) if self.place == "tool" else (Status.OK, 0)
        return CommandResult(status, exit_code, b"oak\n", b"", 0, 0.0, "/work")

    def kill_processes(self):
        self.reach("kill")

    def close(self):
        self.reach("close")

    def reach(self, place):
        if place == self.place:
            raise SandboxBroken("injected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakingTask(ScriptedTask):
    place: str
    range_from: float = 0.0
    made: list = dataclasses.field(default_factory=list)  # its worlds

    @property
    def reward_range(self):
        return self.range_from, 1.0

    def world(self):
        self.made.append(Breaks(self.place))
        return self.made[-1]

    def score(self, episode):
        episode.world.reach("score")
        return 1.0


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_a_rollout_leaves_the_account_only_if_its_agent_never_acted(collector, engine, lowest):
    places = ["nowhere", "call 1", "call 2", "call 3", "tool", "kill", "score", "close"] * 2 + ["kill", "score"] * 6
    tasks = [BreakingTask(name=f"task {i}", place=place, range_from=lowest) for i, place in enumerate(places)]
    trajectories = collector.rollouts([Job(task, group=i, rollout=i) for i, task in enumerate(tasks)], engine)
    seen = set()
    for task, t in zip(tasks, trajectories, strict=True):
        calls = task.made[-1].calls
        broke = task.place in ("kill", "score") or (task.place == "tool" and calls) or f"call {calls}" == task.place
        assert len(task.made) == (2 if broke else 1)  # repeated once
        if broke and calls:
            assert (t.scored, t.outcome, t.reward) == (True, "broken", lowest)
        elif broke:
            assert (t.scored, t.outcome) == (False, "infra")
        else:
            assert (t.scored, t.reward) == (True, 1.0)
        seen.add((t.outcome, calls > 0))
    assert {("broken", True), ("infra", False), ("submitted", True)} <= seen


def test_rollout_that_fails_to_start_when_it_is_repeated_is_not_scored(collector, engine, monkeypatch):
    """Its agent never acted the second time, so the machine is at fault, perhaps the first time too."""
    starts = collections.Counter()

    class Fragile(Dying):
        def __init__(self, *, files, **options):
            name = next(name for name in files if name.startswith("task"))
            starts[name] += 1
            if starts[name] > 1:
                raise SandboxBroken("injected")
            super().__init__(files=files, **options)

    jobs = jobs_of(6)
    for i in range(6):
        jobs = with_task(jobs, i, files={"oak": b"elm\n", f"task{i}": b""})
    monkeypatch.setattr(environment, "Sandbox", Fragile)
    trajectories = collector.rollouts(jobs, engine)
    lost = [i for i, t in enumerate(trajectories) if not t.scored]
    assert lost == [i for i in range(6) if starts[f"task{i}"] == 1 + START_ATTEMPTS]
    assert len(lost) > 0
    assert all(trajectories[i].outcome == "infra" for i in lost)


def test_script_whose_sandbox_dies_before_scoring_is_an_error(collector, monkeypatch):
    def kill_processes(self):
        raise SandboxBroken("injected")

    monkeypatch.setattr(Sandbox, "kill_processes", kill_processes)
    for script in (says("submit oak"), says("bash ls", "submit oak")):
        with pytest.raises(RolloutError, match="task 0 failed on this machine: injected"):
            collector.scripted(scripted_jobs(script), [True], 0)


def test_agent_that_uses_up_its_sandbox_is_scored(collector, monkeypatch):
    """Otherwise an agent could leave the baseline of its group at will."""

    class UsedUp(Sandbox):
        def run(self, command, **options):
            self._jail._broken = SandboxUsedUp("injected")
            return super().run(command, **options)

    monkeypatch.setattr(environment, "Sandbox", UsedUp)
    trajectory = collector.scripted(scripted_jobs(says("bash :", "submit oak")), [True], 0)[0]
    assert (trajectory.outcome, trajectory.scored, trajectory.reward) == ("submitted", True, 0.0)
    assert trajectory.calls == {"oom": 1, "submit": 1}


# -- results of the policy's actions are scored ------------------------------------------------------------------------


def test_crashes_and_time_outs_of_tools_are_observations(collector):
    script = says("bash kill -9 $$", "bash sleep 9", "submit oak")
    limits = dataclasses.replace(LIMITS, timeout_seconds=0.2)
    with Collector(RENDERER, RULES, Machine(limits), tool_threads=1) as hasty:
        trajectory = hasty.scripted(scripted_jobs(script), [True], 0)[0]
    assert (trajectory.scored, trajectory.reward, trajectory.outcome) == (True, 1.0, "submitted")
    assert trajectory.calls == {"signal": 1, "timeout": 1, "submit": 1}
    statuses = TOKENIZER.decode(trajectory.ids[trajectory.role == Role.BOILERPLATE])
    assert statuses == "exit 137timeout"


@pytest.mark.parametrize("size", [100, 128, 129, 255, 256, 257])
def test_output_up_to_the_cap_is_observed_whole(size):
    """The sandbox returns output longer than half the cap in two pieces."""
    jobs = scripted_jobs(says(f"bash printf %{size}s | tr ' ' x", "submit oak"))
    with Collector(RENDERER, Rules(4, 900, 40), Machine(LIMITS), tool_threads=1) as roomy:
        trajectory = roomy.scripted(jobs, [True], 0)[0]
    assert TOKENIZER.decode(trajectory.ids[trajectory.role == Role.OBSERVATION]) == "x" * min(size, LIMITS.output_bytes)
    notice = TOKENIZER.decode(trajectory.ids[trajectory.role == Role.TRUNCATION])
    assert notice == ("1 bytes dropped" if size > LIMITS.output_bytes else "")


def test_missing_answer_is_scored_as_none(collector):
    answers = []
    jobs = scripted_jobs(says(*["bash ls"] * 9), judge=lambda answer: answers.append(answer) or 0.5)
    trajectory = collector.scripted(jobs, [True], 0)[0]
    assert (answers, trajectory.reward, trajectory.scored, trajectory.outcome) == ([None], 0.5, True, "max_turns")


# -- scripts -------------------------------------------------------------------------------------------------------


def test_script_receives_the_output_of_its_call(collector):
    heard = []

    def script():
        heard.append((yield "bash ls; exit 1"))
        heard.append((yield "nonsense"))
        yield "submit oak"

    trajectory = collector.scripted(scripted_jobs(script), [True], 0)[0]
    assert heard == ["elm\noak\n", ""]
    assert trajectory.reward == 1.0


def test_script_continues_after_a_turn_was_cut_off(collector):
    trajectory = collector.scripted(scripted_jobs(says("bash " + "oak " * 50, "submit oak")), [True], 0)[0]
    assert (trajectory.calls, trajectory.reward) == ({"unclosed": 1, "submit": 1}, 1.0)
    assert trajectory.count(Role.ACTION) == RULES.max_turn_tokens + len(RENDERER.action("submit oak").ids)


def test_script_that_does_not_submit_is_an_error_naming_the_task(collector):
    with pytest.raises(RolloutError, match=r"script of task task 0 ended without submitting.*12 tokens"):
        collector.scripted(scripted_jobs(says("bash ls")), [True], 0)


def test_error_in_one_task_costs_its_reward_or_ends_the_script_and_leaves_nothing(collector, engine):
    def crash(answer):
        raise ZeroDivisionError

    made = collector.rollouts(with_task(jobs_of(4), 1, judge=crash), engine)
    assert (made[1].reward, made[1].scored) == (0.0, True)
    assert len(collector.raised) == 1
    assert "test_collector.py" in collector.raised[made[1].rollout]
    assert own_sandboxes() == 0
    with pytest.raises(UserCodeError, match="the score of task .* raised ZeroDivisionError"):
        collector.scripted(scripted_jobs(says("submit oak"), judge=crash), [True], 0)

    def broken_script():
        yield "bash ls"
        raise KeyError("oak")

    with pytest.raises(UserCodeError, match="the script of task .* raised KeyError .*test_collector.py:[0-9]+.: 'oak'"):
        collector.scripted(scripted_jobs(broken_script), [True], 0)
    with pytest.raises(ValueError, match="leaves no room in rollout.max_tokens = 96"):
        collector.rollouts(jobs_of(1, prompt="oak " * 99), engine)
    assert len(collector.rollouts(jobs_of(4), engine)) == 4


# -- stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sampled", "scripted"])
def test_stop_from_another_thread_acts_soon_and_leaves_no_sandbox(engine, monkeypatch, way):
    """Soon: after the running calls have ended, which takes at most their time-out."""
    limits = dataclasses.replace(LIMITS, timeout_seconds=1.0)
    under_way = threading.Event()

    class Waiting(Sandbox):
        def run(self, command, **options):
            under_way.set()
            return super().run("sleep 60", **options)

    def stop():
        assert under_way.wait(30)
        stopped.append(time.monotonic())
        collector.stop.set()

    monkeypatch.setattr(environment, "Sandbox", Waiting)
    stopped = []
    thread = threading.Thread(target=stop)
    with Collector(RENDERER, RULES, Machine(limits), tool_threads=3) as collector:
        collect = {
            "sampled": lambda: collector.rollouts(jobs_of(20), engine),
            "scripted": lambda: collector.scripted(scripted_jobs(*[says(*["bash ls"] * 4)] * 20), [True] * 20, 0),
        }
        thread.start()
        with pytest.raises(Interrupted):
            collect[way]()
        assert time.monotonic() - stopped[0] < limits.timeout_seconds + 2
        thread.join()
        assert own_sandboxes() == 0
        with pytest.raises(Interrupted):  # it stays stopped
            collect["sampled"]()
    assert own_sandboxes() == 0


def test_rollouts_in_which_a_score_raised_are_repeated_after_a_stop(engine):
    def crash(answer):
        raise ZeroDivisionError

    jobs = jobs_of(11)
    for i in (0, 2):
        jobs = with_task(jobs, i, judge=crash)
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=3) as collector:
        with pytest.raises(Interrupted) as stopped:
            collector.rollouts(jobs, engine, lambda done: collector.stop.set() if done >= 4 else None)
        assert not {t.rollout for t in stopped.value.finished} & {jobs[0].rollout, jobs[2].rollout}
        assert len(stopped.value.finished) >= 1
        collector.stop.clear()
        collector.rollouts(jobs, engine, finished=stopped.value.finished)
        assert set(collector.raised) == {jobs[0].rollout, jobs[2].rollout}


def test_rollouts_finished_before_a_stop_are_not_repeated(engine, monkeypatch):
    jobs = jobs_of(11)
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=3) as collector:
        expected = collector.rollouts(jobs, engine)
        stop_after = lambda done: collector.stop.set() if done >= 4 else None  # noqa: E731
        with pytest.raises(Interrupted) as stopped:
            collector.rollouts(jobs, engine, stop_after)
    finished = stopped.value.finished
    assert 4 <= len(finished) < 11
    by_rollout = {t.rollout: t for t in expected}
    assert all(same(t, by_rollout[t.rollout]) for t in finished)
    opened = []
    original = EpisodeWorld.open
    monkeypatch.setattr(EpisodeWorld, "open", lambda self: opened.append(self) or original(self))
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=3) as collector:
        assert all(map(same, collector.rollouts(jobs, engine, finished=finished), expected))
        assert len(opened) == 11 - len(finished)
        assert all(map(same, collector.rollouts(jobs, engine, finished=expected), expected))
        assert len(opened) == 11 - len(finished)


def test_rollouts_failed_before_a_stop_are_repeated(collector, engine):
    jobs = jobs_of(4)
    expected = collector.rollouts(jobs, engine)
    failed = [dataclasses.replace(t, scored=False, outcome="infra") for t in expected[:2]]
    assert all(map(same, collector.rollouts(jobs, engine, finished=[*failed, *expected[2:]]), expected))


def test_scripts_of_different_rollouts_draw_different_random_numbers(collector):
    class Drawing(ScriptedTask):
        def demonstrate(self, rng, *, solve):
            yield f"submit {rng.integers(10**9)}"

    jobs = [Job(Drawing(name="task"), group=0, rollout=i) for i in range(4)]
    made = [collector.scripted(jobs, [True] * 4, seed) for seed in (0, 0, 1)]
    assert all(map(same, made[0], made[1]))
    assert len({t.ids.tobytes() for t in (*made[0], *made[2])}) == 8


def leftovers():
    """Child processes, descriptors, mounts, threads of tools, control groups and temporary files of this process."""
    groups = [
        folder for _, parents in cgroup.choices() for p in parents for folder in p.glob(f"*sandbox-{os.getpid()}-*")
    ]
    return {
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "threads": sum(thread.name.startswith("tool") for thread in threading.enumerate()),
        "groups": len(groups),
        "files": len([name for name in os.listdir("/tmp") if "sandbox" in name or "bwrap" in name]),
    }


@pytest.mark.parametrize("count", [128, pytest.param(1000, marks=pytest.mark.variant)])
def test_many_episodes_64_at_a_time_leave_nothing(count):
    messes = [
        "bash sleep 60 & setsid sleep 60 & echo 1",
        "bash (trap '' TERM; sleep 60) & mkfifo p; ln -s /proc/1 q; echo 2",
        "python import os, time\nif not os.fork(): time.sleep(60)",
        "bash kill -9 $$",
        "bash exec 1>&-; cat",
        "write a/b/c\ntext",
    ]
    limits = dataclasses.replace(LIMITS, memory_bytes=64 << 20, disk_bytes=4 << 20)
    rules = Rules(max_turns=4, max_tokens=900, max_turn_tokens=200)
    with Collector(
        RENDERER, rules, Machine(limits), tool_threads=2
    ) as collector:  # to make everything that is made once
        collector.scripted(scripted_jobs(says("bash :", "submit oak")), [True], 0)
    before = leftovers()
    scripts = [says(messes[i % len(messes)], messes[(i * 5 + 1) % len(messes)], "submit oak") for i in range(count)]
    jobs = scripted_jobs(*scripts, tools=("bash", "python", "write"))
    with Collector(RENDERER, rules, Machine(limits), tool_threads=64) as collector:
        trajectories = collector.scripted(jobs, [True] * count, 0)
    assert sum(t.reward for t in trajectories) == count
    assert {a.status for t in trajectories for a in t.attempts} == {"ok", "nonzero", "signal", "submit"}
    assert leftovers() == before


# -- metrics -------------------------------------------------------------------------------------------------------


HEADER = (TOKENIZER.tool,)


def trajectory(*, tokens=10, **fields):
    return make_trajectory(np.zeros(tokens), **fields)


def metrics_of(trajectories, prefix="rollout", header=HEADER):
    return rollout_metrics(summaries(trajectories, header, Peers()), prefix)


def test_metrics_by_hand():
    metrics = metrics_of(
        [
            trajectory(group=0, reward=1.0, turns=2, calls={"ok": 1, "submit": 1}),
            trajectory(group=0, reward=0.0, turns=3, tokens=20, calls={"ok": 2, "oom": 1}),
            trajectory(group=1, reward=0.5, turns=1, calls={"submit": 1}),
            trajectory(group=1, reward=0.9, turns=1, scored=False, calls={"infra": 1}),
        ],
        "x",
    )
    calls = {"ok": 3, "submit": 2, "oom": 1, "infra": 1}
    for status in (*Status, *MALFORMED, "submit"):
        assert metrics.pop(f"x/calls_{status}") == calls.get(status, 0)
    assert metrics == {
        "x/turns": 1.75, "x/tokens": 12.5,
        "x/submitted": 4, "x/accepted": 3, "x/rejected": 1, "x/broken": 0,
        "x/solve_rate": 1 / 3, "x/reward": 0.5, "x/mixed_groups": 0.5,
        "x/imagined_observations": 0.0,
    }  # fmt: skip


def test_each_environment_of_a_mixture_has_its_metrics():
    ids, role = np.zeros(10), np.repeat([Role.PROMPT, Role.ACTION], 5)
    ids[5:7] = HEADER
    imagining = make_trajectory(ids, role)
    chosen = [
        trajectory(group=0, environment="maze", reward=1.0, turns=2),
        dataclasses.replace(imagining, group=0, environment="maze", reward=0.0, turns=4),
        trajectory(group=1, environment="rooms", scored=False, turns=1),
    ]
    everyone = summaries(chosen, HEADER, Peers())
    whole, apart = rollout_metrics(everyone, "x"), rollout_metrics(everyone, "x", ["lookup", "maze", "rooms"])
    assert whole.items() <= apart.items()
    assert {name: value for name, value in apart.items() if name not in whole} == {
        "x/submitted_env_maze": 2, "x/rejected_env_maze": 0, "x/turns_env_maze": 3.0, "x/tokens_env_maze": 10.0,
        "x/solve_rate_env_maze": 0.5, "x/reward_env_maze": 0.5, "x/mixed_groups_env_maze": 1.0,
        "x/submitted_env_rooms": 1, "x/rejected_env_rooms": 1, "x/turns_env_rooms": 1.0, "x/tokens_env_rooms": 10.0,
        "x/imagined_observations_env_maze": 2 / 5, "x/imagined_observations_env_rooms": 0.0,
    }  # fmt: skip
    assert rollout_metrics(everyone, "x", ["maze"]) == whole


def test_pass_at_k_of_the_rollouts_of_a_step_by_hand():
    """Groups of four, of which one lost two rollouts; K doubles up to the size of a group."""
    rewards = {0: [1.0, 0.0, 0.0, 1.0], 1: [0.0] * 4, 2: [1.0, 0.0]}
    chosen = [
        trajectory(group=group, reward=reward, environment="maze" if group else "rooms")
        for group, members in rewards.items()
        for reward in members
    ]
    chosen += [trajectory(group=2, scored=False, environment="maze")] * 2
    everyone = summaries(chosen, HEADER, Peers())
    metrics = rollout_metrics(everyone, "x", ["maze", "rooms"], samples=5)
    assert {name: value for name, value in metrics.items() if "pass" in name} == pytest.approx(
        {
            "x/pass_at_1": (0.5 + 0 + 0.5) / 3,
            "x/pass_at_2": (5 / 6 + 0 + 1) / 3,
            "x/pass_at_4": (1 + 0) / 2,
            **{"x/pass_at_1_env_maze": 0.25, "x/pass_at_2_env_maze": 0.5, "x/pass_at_4_env_maze": 0.0},
            **{"x/pass_at_1_env_rooms": 0.5, "x/pass_at_2_env_rooms": 5 / 6, "x/pass_at_4_env_rooms": 1.0},
        }
    )
    assert not [name for name in rollout_metrics(everyone, "x") if "pass" in name]


def test_counts_include_every_attempt(collector, engine, monkeypatch):
    monkeypatch.setattr(environment, "Sandbox", Dying)
    trajectories = collector.rollouts(jobs_of(12), engine)
    metrics = metrics_of(trajectories)
    assert metrics["rollout/calls_infra"] > 0
    counted = sum(value for name, value in metrics.items() if name.startswith("rollout/calls_"))
    assert counted == sum(sum(t.calls.values()) for t in trajectories) == sum(t.turns for t in trajectories)


def test_unscored_rollouts_have_no_rates():
    metrics = metrics_of([trajectory(scored=False), trajectory(scored=False)])
    assert (metrics["rollout/submitted"], metrics["rollout/rejected"]) == (2, 2)
    assert not {"rollout/solve_rate", "rollout/reward", "rollout/mixed_groups"} & metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())


def test_one_rollout_per_task_gives_no_mixed_groups_metric():
    assert "rollout/mixed_groups" not in metrics_of([trajectory(group=0), trajectory(group=1)])


def test_imagined_observations_are_headers_that_the_policy_wrote():
    a, o = Role.ACTION, Role.OBSERVATION
    t = make_trajectory([7, 8, 7, 8, 7, 7, 8, 9], [o, o, a, a, a, a, o, a])
    assert metrics_of([t], header=(7,))["rollout/imagined_observations"] == 3 / 5
    assert (
        metrics_of([t], header=(7, 8))["rollout/imagined_observations"] == 2 / 5
    )  # the pair that ends in an observation does not count
    assert metrics_of([t], header=(1,) * 9)["rollout/imagined_observations"] == 0.0


def test_machine_that_fails_every_rollout_leaves_its_cause(collector, engine, monkeypatch):
    monkeypatch.setattr(environment, "Sandbox", unreliable(99)[0])
    assert not any(t.scored for t in collector.rollouts(jobs_of(5), engine))
    assert "injected" in collector.fault


def test_an_engine_that_loses_a_turn_is_an_error_and_leaves_no_sandbox(collector):
    class Losing(PagedEngine):
        busy = False

    with pytest.raises(RolloutError, match="the engine lost the turns of 2 open sessions"):
        collector.rollouts(jobs_of(2), Losing(engine_setup()))
    assert own_sandboxes() == 0


def test_a_task_that_scores_sees_the_whole_transcript_without_markup(collector):
    seen = []

    class Reading(ScriptedTask):
        def score(self, episode):
            seen.append(episode)
            return 1.0

    job = Job(Reading(name="task 0", script=says("bash cat oak", "submit elm")), group=0, rollout=0)
    collector.scripted([job], [True], 0)
    (episode,) = seen
    assert (episode.answer, episode.outcome, episode.turns) == ("elm", "submitted", 2)
    assert [(m.role, m.text) for m in episode.transcript] == [
        (Role.PROMPT, "value of oak"),
        (Role.ACTION, "bash cat oak"),
        (Role.OBSERVATION, "elm\nash\n"),
        (Role.ACTION, "submit elm"),
    ]


def test_counts_of_another_engine_are_added_up_by_their_names():
    assert engine_metrics([{"drafts": 3}, {"drafts": 4}]) == {"engine/drafts": 7}
    assert engine_metrics([{"drafts": 3}, {}]) == {}
