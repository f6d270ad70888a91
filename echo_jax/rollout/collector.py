"""Runs episodes: one thread drives the engine, a pool of threads runs tools in sandboxes.

In: tasks. Out: one `Trajectory` for each, in order, none lost: a crash or a time-out of a tool is an observation; after
a fault of the machine the rollout is made again, and if it fails again that is a recorded outcome.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from echo_jax.render import Renderer
from echo_jax.render.calls import GRAMMARS, Call
from echo_jax.rollout import episode as episode_lib
from echo_jax.rollout.engine.dense import DenseEngine
from echo_jax.rollout.episode import Episode, Phase, Rules
from echo_jax.rollout.trajectory import Sampled, Trajectory
from echo_jax.rollout.world import EpisodeWorld, Machine
from echo_jax.system.errors import UserError
from echo_jax.system.peers import Peers
from echo_jax.tasks.task import Task
from echo_jax.tools.sandbox import CommandResult, Status

ATTEMPTS = 2  # at a rollout, when the machine fails it


class RolloutError(UserError, RuntimeError):
    """Rollouts cannot be made: the machine fails every time, or the budgets leave no room to act."""


class Interrupted(Exception):
    """The collection was asked to stop: `finished` is what it had, the others will be made again."""

    def __init__(self, finished: Sequence[Trajectory] = ()):
        super().__init__(f"stopped with {len(finished)} rollouts finished")
        self.finished = finished


@dataclasses.dataclass(frozen=True)
class Job:
    """One rollout to make."""

    task: Task
    group: int
    rollout: int  # global index: the root of its sampling keys


class Collector:
    """Makes trajectories, from a policy or from scripts. A context manager: leaving it ends all threads."""

    def __init__(
        self, renderer: Renderer, rules: Rules, machine: Machine, tool_threads: int, peers: Peers | None = None
    ):
        """`peers`: if one of the processes is stopped, the collections of all of them raise `Interrupted`."""
        self.stop = threading.Event()  # set it from anywhere: the collection under way raises Interrupted soon
        self._peers = peers or Peers()
        self.retried = 0  # rollouts of the last collection that were made again
        self._renderer = renderer
        self._rules = rules
        self._machine = machine
        self._pool = concurrent.futures.ThreadPoolExecutor(tool_threads, thread_name_prefix="tool")

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rollouts(
        self,
        jobs: Sequence[Job],
        engine: DenseEngine,
        on_finish: Callable[[int], None] = lambda done: None,
        finished: Sequence[Trajectory] = (),
    ) -> list[Trajectory]:
        """Samples one trajectory a job from the engine's policy.

        Job i runs in lane i mod lanes, after the job before it there: with it, its tokens and log-probs are the same
        however long the tools take. `on_finish` is called with the number of finished rollouts. `finished`: what an
        interrupted call with the same jobs and policy already made.
        """
        collection = _Collection(self, jobs, engine, finished)

        def collect() -> list[Trajectory]:
            try:
                return collection.run(on_finish)
            finally:
                engine.cancel()
                collection.close()
                self.retried = collection.retried

        trajectories = self._together(collect)
        self._check_machines(trajectories, collection.fault)
        return trajectories

    def scripted(
        self,
        jobs: Sequence[Job],
        solve: Sequence[bool],
        seed: int,
        on_finish: Callable[[int], None] = lambda done: None,
    ) -> list[Trajectory]:
        """Runs each task's own demonstrator, the right one or a flawed one, through the same episodes and tools.

        Raises:
          RolloutError: one failed. A script does what it should, so the machine is at fault; the result would be kept
            and used for the whole run, so it must be complete.
        """
        futures = [self._pool.submit(self._script, job, right, seed) for job, right in zip(jobs, solve, strict=True)]

        def collect() -> list[Trajectory]:
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

        return self._together(collect)

    def check_stop(self) -> None:
        """Raises `Interrupted` if this process, or another of the run, was asked to stop."""
        if any(self._peers.gather(self.stop.is_set(), "a step")):
            raise Interrupted

    def _together(self, collect: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        try:
            trajectories, interrupted = collect(), False
        except Interrupted as own:
            trajectories, interrupted = list(own.finished), True
        if any(self._peers.gather(interrupted, "rollouts")):
            raise Interrupted(trajectories)
        return trajectories

    def _check_machines(self, trajectories: Sequence[Trajectory], fault: str) -> None:
        """Raises `RolloutError` if of all processes none had a rollout that could be scored."""
        own = [len(trajectories), sum(t.scored for t in trajectories), fault]
        made, scored, faults = zip(*self._peers.gather(own, "faults"), strict=True)
        if any(made) and not any(scored):
            causes = "; ".join(dict.fromkeys(filter(None, faults)))
            raise RolloutError(
                f"all {sum(made)} rollouts failed on this machine; mend the cause, then run the same command again. "
                f"The last one: {causes or 'no cause'}"
            )

    def _start(self, job: Job) -> tuple[Episode, EpisodeWorld]:
        episode = episode_lib.start(self._renderer, self._rules, job.task.prompt, job.task.tools)
        return episode, EpisodeWorld(job.task, self._machine)

    def _script(self, job: Job, solve: bool, seed: int) -> Trajectory:
        for _ in range(ATTEMPTS):
            trajectory, fault = self._script_once(job, solve, np.random.default_rng([seed, job.rollout]))
            if trajectory.scored:
                return trajectory
        raise RolloutError(f"the script of task {job.task.name} failed on this machine: {fault or 'no cause'}")

    def _script_once(self, job: Job, solve: bool, rng: np.random.Generator) -> tuple[Trajectory, str]:
        episode, environment = self._start(job)
        try:
            if not environment.open():
                episode = episode_lib.abandon(episode)
            script = job.task.demonstrate(rng, solve=solve)
            observation = None
            while episode.phase is not Phase.DONE:
                if self.stop.is_set():
                    raise Interrupted
                if episode.phase is Phase.CALL:
                    result = environment.run(episode.call, episode.seconds_left)
                    observation = (result.head + result.tail).decode("utf-8", "surrogateescape")
                    episode = episode_lib.advance(episode, result)
                    continue
                try:
                    text = script.send(observation)
                except StopIteration as error:
                    raise RolloutError(
                        f"the script of task {job.task.name} ended without submitting; perhaps a turn of it is "
                        f"longer than {self._rules.max_turn_tokens} tokens"
                    ) from error
                observation = ""
                action = self._renderer.action(self._spoken(text, episode.available))
                ids = action.ids[: episode.sample_budget]
                turn = Sampled(
                    ids,
                    logprobs=(0.0,) * len(ids),
                    entropies=(float("nan"),) * len(ids),
                    stopped=len(ids) == len(action.ids),
                    policy_version=-1,
                )
                episode = episode_lib.advance(episode, turn)
            return _score(job, episode, environment), environment.fault
        finally:
            environment.close()

    def _spoken(self, text: str, available: tuple[str, ...]) -> str:
        """Returns a script's turn, which is plain, in the grammar of the episodes."""
        attempt = GRAMMARS["plain"].parse(text, available)[0]
        grammar = self._rules.grammar
        return GRAMMARS[grammar].write(attempt) if grammar != "plain" and isinstance(attempt, Call) else text


def _score(job: Job, episode: Episode, environment: EpisodeWorld) -> Trajectory:
    reward = environment.finish(episode.answer)
    if reward is None:
        episode = episode_lib.abandon(episode)
    return episode_lib.to_trajectory(
        episode,
        task=job.task.name,
        group=job.group,
        rollout=job.rollout,
        reward=reward or 0.0,
        limits_by=environment.limits_by,
    )


class _Collection:
    """The state of one `Collector.rollouts`."""

    def __init__(self, collector: Collector, jobs: Sequence[Job], engine: DenseEngine, finished: Sequence[Trajectory]):
        self._collector = collector
        self._jobs = jobs
        self._engine = engine
        self._pool = collector._pool
        self._environments: dict[int, EpisodeWorld] = {}
        self._opened: dict[int, concurrent.futures.Future] = {}
        self._episodes: dict[int, Episode] = {}
        self._waiting: dict[concurrent.futures.Future, int] = {}  # tool call or score under way -> job
        self._in_lane: dict[int, int] = {}
        made = {trajectory.rollout: trajectory for trajectory in finished if trajectory.scored}
        self._done = {i: made[job.rollout] for i, job in enumerate(jobs) if job.rollout in made}
        self._attempts = dict.fromkeys(range(len(jobs)), 0)
        self.retried = 0

    def run(self, on_finish: Callable[[int], None]) -> list[Trajectory]:
        for lane in range(self._engine.lanes):
            self._fill(lane, lane)
        while len(self._done) < len(self._jobs):
            if self._collector.stop.is_set():
                raise Interrupted(list(self._done.values()))
            if self._engine.busy:
                for lane, turn in self._engine.step().items():
                    self._advance(self._in_lane[lane], turn)
            else:
                concurrent.futures.wait(self._waiting, 0.1, concurrent.futures.FIRST_COMPLETED)
            for future in [future for future in self._waiting if future.done()]:
                self._collect(self._waiting.pop(future), future.result())
                on_finish(len(self._done))
        return [self._done[i] for i in range(len(self._jobs))]

    @property
    def fault(self) -> str:
        """Why the last rollout that the machine failed could not be scored."""
        faults = [environment.fault for environment in self._environments.values() if environment.fault]
        return faults[-1] if faults else ""

    def close(self) -> None:
        """Ends what still runs, so that no sandbox outlives a collection that was stopped."""
        pending = [*self._opened.values(), *self._waiting]
        for future in pending:
            future.cancel()
        concurrent.futures.wait(pending)
        for environment in self._environments.values():
            environment.close()

    def _fill(self, lane: int, i: int) -> None:
        """Begins the first job from i on that this lane has to do, if one is left."""
        while i in self._done:
            i += self._engine.lanes
        if i < len(self._jobs):
            self._begin(lane, i)

    def _begin(self, lane: int, i: int) -> None:
        job = self._jobs[i]
        self._attempts[i] += 1
        self._in_lane[lane] = i
        self._episodes[i], self._environments[i] = self._collector._start(job)
        self._opened[i] = self._pool.submit(self._environments[i].open)  # while the policy writes its first turn
        self._engine.open(lane, job.rollout)
        self._ask(i)

    def _ask(self, i: int) -> None:
        """Asks the engine for the episode's next turn, sending it the ids that it has not seen."""
        episode, lane = self._episodes[i], i % self._engine.lanes
        new = episode.ids[self._engine.known(lane) :]
        self._engine.generate(lane, new, episode.sample_budget)

    def _advance(self, i: int, event: Sampled | CommandResult) -> None:
        episode = self._episodes[i] = episode_lib.advance(self._episodes[i], event)
        if episode.phase is Phase.GENERATE:
            self._ask(i)
        elif episode.phase is Phase.CALL:
            self._waiting[self._pool.submit(self._call, i, episode.call, episode.seconds_left)] = i
        else:
            self._waiting[self._pool.submit(self._finish, i, episode)] = i

    def _collect(self, i: int, result: CommandResult | Trajectory) -> None:
        if isinstance(result, CommandResult):
            self._advance(i, result)
            return
        lane = i % self._engine.lanes
        if not result.scored and self._attempts[i] < ATTEMPTS:
            self.retried += 1
            self._begin(lane, i)
            return
        self._done[i] = result
        self._fill(lane, i)

    # The two below run in the pool. The pool starts jobs in order, so `_opened[i]` is never behind them.

    def _call(self, i: int, call: Call, seconds: float) -> CommandResult:
        if not self._opened[i].result():
            return CommandResult(Status.INFRA, None, b"", b"", 0, 0.0, "")
        return self._environments[i].run(call, seconds)

    def _finish(self, i: int, episode: Episode) -> Trajectory:
        self._opened[i].result()
        return _score(self._jobs[i], episode, self._environments[i])
