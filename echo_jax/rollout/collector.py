"""Runs episodes: one thread drives the engine, a pool of threads runs tools in sandboxes.

In: tasks. Out: one `Trajectory` per task, in order, none lost. A crash or a time-out of a tool becomes an observation.
After a fault the rollout is repeated, with the same sampling keys; if it fails again, that is its outcome. A fault
before the agent's first call is the machine's, and its rollout is not scored (`infra`). A sandbox that breaks later may
have been broken by the agent: that costs it the lowest reward (`broken`), or else it could leave its group's baseline
at will.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from echo_jax.render import Renderer
from echo_jax.render.calls import GRAMMARS, Call
from echo_jax.roles import Role
from echo_jax.rollout import episode as episode_lib
from echo_jax.rollout.engine.interface import Engine
from echo_jax.rollout.episode import FAULTS, Episode, Outcome, Phase, Rules
from echo_jax.rollout.trajectory import Sampled, Trajectory
from echo_jax.rollout.world import EpisodeWorld, Machine
from echo_jax.system import user_code
from echo_jax.system.errors import UserError
from echo_jax.tasks.task import Message, Task
from echo_jax.tools.sandbox import CommandResult, Status
from echo_jax.tools.tool import Tool

ATTEMPTS = 2  # at a rollout, if its sandbox fails


class RolloutError(UserError, RuntimeError):
    """No rollout can be made: the machine fails every time, or the budgets leave no room to act."""


class Interrupted(Exception):
    """The collection was asked to stop. `finished` holds the finished rollouts, without those in which a task or tool
    raised an exception; all others will be repeated."""

    def __init__(self, finished: Sequence[Trajectory] = ()):
        super().__init__(f"stopped with {len(finished)} rollouts finished")
        self.finished = finished


@dataclasses.dataclass(frozen=True)
class Job:
    """One rollout to make."""

    task: Task
    group: int
    rollout: int  # global index: the root of its sampling keys
    environment: str = ""  # entry of the task mixture that the task comes from
    temperature: float | None = None  # of its samples; None: the engine's


class Seconds(NamedTuple):
    """Where the wall time of a collection went."""

    engine: float = 0.0  # inside `Engine.step`
    tools: float = 0.0  # no session had a turn to sample: it waited for tools
    host: float = 0.0  # the rest


class Collector:
    """Makes trajectories, from a policy or from scripts. Use it as a context manager: its exit ends all threads and
    sandboxes."""

    def __init__(self, renderer: Renderer, rules: Rules, machine: Machine, tool_threads: int, max_sandboxes: int = 0):
        """
        Args:
          tool_threads: number of tool calls, starts of sandboxes and scorings that run at once.
          max_sandboxes: number of sandboxes that are open at once; 0: one for each session of the engine.
        """
        self.stop = threading.Event()  # if set, from any thread, the current collection soon raises Interrupted
        self.retried = 0  # number of rollouts that the last collection repeated
        self.fault = ""  # why the last rollout of that collection that failed or could not be scored did
        self.raised: dict[int, str] = {}  # rollout -> the first exception that its task or tools raised
        self.seconds = Seconds()  # of the last collection of sampled rollouts
        self.counts: Mapping[str, float] = {}  # what the engine counted in it, see `Engine.stats`
        self._renderer = renderer
        self._rules = rules
        self._machine = machine
        self._max_sandboxes = max_sandboxes
        threads = min(tool_threads, max_sandboxes or tool_threads)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="tool")
        self._ahead: dict[int, EpisodeWorld] = {}  # rollout -> its world, from `prepare`

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self._close_ahead()
        self._pool.shutdown(cancel_futures=True)

    def prepare(self, jobs: Sequence[Job], engine: Engine) -> None:
        """Starts the sandboxes that `rollouts(jobs, engine)` begins with, in other threads, so that they are ready by
        then. Another collection closes them, as does the collector's exit."""
        self._close_ahead()
        if self.stop.is_set():
            return
        first = jobs[: self._open_at_once(engine)]
        self._ahead = {job.rollout: self._new_world(job.task) for job in first}
        for world in self._ahead.values():
            world.open_in(self._pool)

    def rollouts(
        self,
        jobs: Sequence[Job],
        engine: Engine,
        on_finish: Callable[[int], None] = lambda done: None,
        finished: Sequence[Trajectory] = (),
    ) -> list[Trajectory]:
        """Samples one trajectory per job from the engine's policy.

        Each session of the engine runs one rollout at a time; job i starts when job i - sessions has ended. So the
        order of rollouts does not depend on how long tools take. A rollout has a sandbox from start to end, so
        `max_sandboxes` limits the sessions in use.

        Args:
          on_finish: called with the number of finished rollouts.
          finished: trajectories from an interrupted call with the same jobs and policy.

        Raises:
          Interrupted: `stop` was set.
        """
        collection = _Collection(self, jobs, engine, finished)
        stats = getattr(engine, "stats", dict)
        stats()  # from now on
        try:
            return collection.run(on_finish)
        finally:
            collection.close()
            self.seconds, self.counts = collection.seconds, stats()
            self.retried, self.fault, self.raised = collection.retried, collection.fault, collection.raised

    def scripted(
        self,
        jobs: Sequence[Job],
        solve: Sequence[bool],
        seed: int,
        on_finish: Callable[[int], None] = lambda done: None,
    ) -> list[Trajectory]:
        """Runs each task's demonstrator, right or flawed as `solve` says, through the same episodes and tools.

        Raises:
          RolloutError: one failed. Scripts do not fail, so the machine is at fault. The result is saved and used for
            the whole run, so it must be complete.
          UserCodeError: a script or a score raised an exception.
          Interrupted: `stop` was set.
        """
        self._close_ahead()
        futures = [self._pool.submit(self._script, job, right, seed) for job, right in zip(jobs, solve, strict=True)]
        try:
            trajectories = []
            for done, future in enumerate(futures, start=1):
                trajectories.append(future.result())
                on_finish(done)
            return trajectories
        finally:
            for future in futures:
                future.cancel()
            concurrent.futures.wait(futures)

    def _open_at_once(self, engine: Engine) -> int:
        """Returns how many rollouts are open at once."""
        return min(engine.sessions, self._max_sandboxes or engine.sessions)

    def _start(self, job: Job) -> tuple[Episode, EpisodeWorld]:
        """Returns a rollout's first state, and its world: the one opened ahead for it, if there is one."""
        task = job.task
        episode = episode_lib.start(self._renderer, self._rules, task.prompt, task.tools, task.listener)
        return episode, self._ahead.pop(job.rollout, None) or self._new_world(task)

    def _new_world(self, task: Task) -> EpisodeWorld:
        return EpisodeWorld(task, self._machine, self._renderer.speakers)

    def _close_ahead(self, but: Iterable[Job] = ()) -> None:
        """Closes the worlds that were opened ahead, but not those of these jobs."""
        tasks = {job.rollout: job.task for job in but}
        others = {i: world for i, world in self._ahead.items() if tasks.get(i) is not world.task}
        _close(others.values())
        for i in others:
            del self._ahead[i]

    def _script(self, job: Job, solve: bool, seed: int) -> Trajectory:
        for _ in range(ATTEMPTS):
            trajectory, fault = self._script_once(job, solve, np.random.default_rng([seed, job.rollout]))
            if trajectory.outcome not in FAULTS:
                return trajectory
        raise RolloutError(f"the script of task {job.task.name} failed on this machine: {fault or 'unknown cause'}")

    def _script_once(self, job: Job, solve: bool, rng: np.random.Generator) -> tuple[Trajectory, str]:
        episode, world = self._start(job)
        try:
            if not world.open():
                episode = episode_lib.abandon(episode)
            what = f"the script of task {job.task.name}"
            with user_code.calling(what):
                script = job.task.demonstrate(rng, solve=solve)
            if script is None:
                raise RolloutError(f"task {job.task.name} has no demonstrator")
            observation = None
            while episode.phase is not Phase.DONE:
                if self.stop.is_set():
                    raise Interrupted
                if episode.phase is Phase.CALL:
                    result = self._run(world, episode.call, episode.seconds_left)
                    observation = (result.head + result.tail).decode("utf-8", "surrogateescape")
                    episode = episode_lib.advance(episode, result)
                    continue
                try:
                    text = script.send(observation)
                except StopIteration as error:
                    raise RolloutError(
                        f"{what} ended without submitting; perhaps one of its turns "
                        f"is longer than rollout.max_turn_tokens = {self._rules.max_turn_tokens} tokens"
                    ) from error
                except BaseException as error:
                    raise user_code.UserCodeError(user_code.describe(what, error)) from error
                observation = ""
                action = self._renderer.action(self._spoken(text, episode.available))
                ids = action.ids[: episode.sample_budget]
                turn = Sampled(
                    ids,
                    logprobs=(0.0,) * len(ids),
                    entropies=(float("nan"),) * len(ids),
                    versions=(-1,) * len(ids),
                    stopped=len(ids) == len(action.ids),
                )
                episode = episode_lib.advance(episode, turn)
            trajectory = _score(job, episode, world)
            if world.score_raised:
                raise user_code.UserCodeError(world.score_raised)
            return trajectory, world.fault
        finally:
            world.close()

    def _run(self, world: EpisodeWorld, call: Call, seconds: float) -> CommandResult:
        return world.run(call.tool, self._rules.tools[call.tool], call.arguments, seconds)

    def _spoken(self, text: str, available: Mapping[str, Tool]) -> str:
        """Returns a script's turn, written in the plain grammar, in the grammar of the episodes."""
        attempt = GRAMMARS["plain"].parse(text, available)[0]
        grammar = self._rules.grammar
        return GRAMMARS[grammar].write(attempt, available) if grammar != "plain" and isinstance(attempt, Call) else text


def _score(job: Job, episode: Episode, world: EpisodeWorld) -> Trajectory:
    reward = world.finish(
        episode.answer,
        outcome=str(episode.outcome),
        turns=episode.turns,
        read_transcript=functools.partial(_transcript, episode),
    )
    if world.broken:
        episode = episode_lib.abandon(episode, Outcome.BROKEN)
    elif reward is None:
        episode = episode_lib.abandon(episode, Outcome.UNSCORED if world.unscored else Outcome.INFRA)
    return episode_lib.to_trajectory(
        episode,
        task=job.task.name,
        group=job.group,
        rollout=job.rollout,
        reward=reward or 0.0,
        reward_range=job.task.reward_range,
        limits_by=world.limits_by,
        environment=job.environment,
    )


def _transcript(episode: Episode) -> tuple[Message, ...]:
    """Returns the episode as text without chat markup, one message per part with one writer."""
    messages, at = [], 0
    for role, members in itertools.groupby(episode.roles):
        ids = episode.ids[at : at + len(list(members))]
        at += len(ids)
        if role is Role.ACTION:
            messages.append(Message(role, episode.renderer.turn_text(ids)))
        elif role is not Role.SCAFFOLD:
            messages.append(Message(role, episode.renderer.tokenizer.decode(ids)))
    return tuple(messages)


def _close(worlds: Iterable[EpisodeWorld], running: Iterable[concurrent.futures.Future] = ()) -> None:
    """Closes worlds, once all that runs in them has ended; what no thread has begun yet is cancelled."""
    worlds = list(worlds)
    pending = [*running, *(world.opened for world in worlds if world.opened)]
    for future in pending:
        future.cancel()
    concurrent.futures.wait(pending)
    for world in worlds:
        world.close()


class _Collection:
    """The state of one `Collector.rollouts`."""

    def __init__(self, collector: Collector, jobs: Sequence[Job], engine: Engine, finished: Sequence[Trajectory]):
        self._collector = collector
        self._jobs = jobs
        self._engine = engine
        self._pool = collector._pool
        self._worlds: dict[int, EpisodeWorld] = {}
        self._episodes: dict[int, Episode] = {}
        self._waiting: dict[concurrent.futures.Future, int] = {}  # what a job waits for in the pool -> job
        self._job_of: dict[int, int] = {}  # open session -> job
        self._session_of: dict[int, int] = {}
        self._known: dict[int, int] = {}  # job -> number of ids that its session holds
        made = {trajectory.rollout: trajectory for trajectory in finished if trajectory.scored}
        self._done = {i: made[job.rollout] for i, job in enumerate(jobs) if job.rollout in made}
        self._attempts = dict.fromkeys(range(len(jobs)), 0)
        self._at_once = collector._open_at_once(engine)
        self.retried = 0
        self._start = time.perf_counter()
        self._engine_seconds = self._tool_seconds = 0.0  # see `Seconds`

    def run(self, on_finish: Callable[[int], None]) -> list[Trajectory]:
        first = [i for i in map(self._unfinished, range(self._at_once)) if i is not None]
        self._collector._close_ahead(but=[self._jobs[i] for i in first])
        for i in first:
            self._begin(i)
        while len(self._done) < len(self._jobs):
            if self._collector.stop.is_set():
                raise Interrupted([t for t in self._done.values() if t.rollout not in self.raised])
            start = time.perf_counter()
            if self._engine.busy:
                turns = self._engine.step()
                self._engine_seconds += time.perf_counter() - start
                for session, turn in turns.items():
                    i = self._job_of[session]
                    self._known[i] += len(turn.ids)
                    self._advance(i, turn)
            elif self._waiting:
                concurrent.futures.wait(self._waiting, 0.1, concurrent.futures.FIRST_COMPLETED)
                self._tool_seconds += time.perf_counter() - start
            else:
                raise RolloutError(f"the engine lost the turns of {len(self._job_of)} open sessions")
            for future in [future for future in self._waiting if future.done()]:
                self._collect(self._waiting.pop(future), future.result())
                on_finish(len(self._done))
        return [self._done[i] for i in range(len(self._jobs))]

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the start."""
        passed = time.perf_counter() - self._start
        return Seconds(self._engine_seconds, self._tool_seconds, passed - self._engine_seconds - self._tool_seconds)

    @property
    def fault(self) -> str:
        """Why the last rollout that failed or could not be scored did."""
        faults = [world.fault for world in self._worlds.values() if world.fault]
        return faults[-1] if faults else ""

    @property
    def raised(self) -> dict[int, str]:
        """Rollout -> the first exception that its task or tools raised."""
        return {self._jobs[i].rollout: world.raised[0] for i, world in sorted(self._worlds.items()) if world.raised}

    def close(self) -> None:
        """Ends everything that still runs, so that no session or sandbox outlives a stopped collection."""
        _close(self._worlds.values(), running=self._waiting)
        self._collector._close_ahead()
        for session in list(self._job_of):
            self._close_session(self._job_of[session])

    def _unfinished(self, i: int) -> int | None:
        """Returns i or, if job i is done, the next job of its session that is not; None if none is left."""
        return next((k for k in range(i, len(self._jobs), self._at_once) if k not in self._done), None)

    def _begin(self, i: int) -> None:
        job = self._jobs[i]
        self._attempts[i] += 1
        self._episodes[i], self._worlds[i] = self._collector._start(job)
        if self._worlds[i].opened is None:
            self._worlds[i].open_in(self._pool)  # in parallel to the policy's first turn
        own = {} if job.temperature is None else {"temperature": job.temperature}
        session = self._engine.open(job.rollout, job.group, **own)
        self._job_of[session], self._session_of[i], self._known[i] = i, session, 0
        self._ask(i)

    def _close_session(self, i: int) -> None:
        session = self._session_of.pop(i)
        del self._job_of[session]
        self._engine.close(session)

    def _ask(self, i: int) -> None:
        """Sends the engine the ids that it has not seen, and asks for the episode's next turn."""
        episode = self._episodes[i]
        new, self._known[i] = episode.ids[self._known[i] :], len(episode.ids)
        self._engine.extend(self._session_of[i], new, episode.sample_budget)

    def _advance(self, i: int, event: Sampled | CommandResult) -> None:
        episode = self._episodes[i] = episode_lib.advance(self._episodes[i], event)
        if episode.phase is Phase.GENERATE:
            self._ask(i)
        elif self._worlds[i].opened.done():
            self._act(i)
        else:
            self._waiting[self._worlds[i].opened] = i  # only then, so that no thread of the pool waits for another

    def _act(self, i: int) -> None:
        """Has a thread of the pool run the episode's call or, at its end, score it, now that its world is open."""
        episode, world = self._episodes[i], self._worlds[i]
        is_open = world.opened.result()
        if episode.phase is not Phase.CALL:
            self._waiting[self._pool.submit(_score, self._jobs[i], episode, world)] = i
        elif is_open:
            run = self._collector._run
            self._waiting[self._pool.submit(run, world, episode.call, episode.seconds_left)] = i
        else:
            self._advance(i, CommandResult(Status.INFRA, None, b"", b"", 0, 0.0, ""))

    def _collect(self, i: int, result: bool | CommandResult | Trajectory) -> None:
        if isinstance(result, bool):  # whether the world is open
            self._act(i)
            return
        if isinstance(result, CommandResult):
            self._advance(i, result)
            return
        self._close_session(i)
        if result.outcome in FAULTS and self._attempts[i] < ATTEMPTS:
            self.retried += 1
            self._begin(i)
            return
        self._done[i] = result
        if (following := self._unfinished(i)) is not None:
            self._begin(following)
