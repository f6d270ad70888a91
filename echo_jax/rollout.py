"""Runs episodes: one thread drives the engine, a pool of threads runs tools in sandboxes.

In: tasks. Out: one `Trajectory` for each, in order, none lost: a crash or a time-out of a tool is an observation, a
fault of the machine is a recorded outcome.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from echo_jax import episode as episode_lib
from echo_jax.engine.dense import DenseEngine
from echo_jax.episode import Call, Episode, Phase, Rules
from echo_jax.render import Renderer
from echo_jax.roles import Role
from echo_jax.tasks.task import Task
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Limits, Sandbox, SandboxBroken, SandboxError, Status
from echo_jax.trajectory import Sampled, Trajectory

START_ATTEMPTS = 3  # of a sandbox, before its rollout is given up as a fault of the machine


class RolloutError(RuntimeError):
    """Rollouts cannot be made: the machine fails every time, or the budgets leave no room to act."""


class Interrupted(Exception):
    """The collection was asked to stop; its unfinished rollouts are dropped and will be made again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One rollout to make."""

    task: Task
    group: int
    rollout: int  # global index: the root of its sampling keys


class Environment:
    """What one episode acts on: its sandbox. Every method runs in a thread of the pool, one at a time."""

    def __init__(self, task: Task, limits: Limits, backend: str):
        self._task = task
        self._limits = limits
        self._backend = backend
        self._sandbox: Sandbox | None = None
        self.fault = ""  # what the machine did wrong last
        self._used_up = False  # the agent's own doing: it took all memory, and the sandbox died of it

    def open(self) -> bool:
        """Starts the sandbox; returns whether it stands. Faults of the machine are tried again."""
        for _ in range(START_ATTEMPTS):
            try:
                self._sandbox = Sandbox(
                    limits=self._limits, backend=self._backend, files=self._task.files, symlinks=self._task.symlinks
                )
            except SandboxBroken as error:
                self.fault = str(error)
                continue
            setup = self._sandbox.run(self._task.setup) if self._task.setup else None
            if setup is None or setup.status is Status.OK:
                return True
            self.fault = f"setup {self._task.setup!r}: {setup.status} {setup.head.decode(errors='replace')}"
            self.close()
        return False

    def run(self, call: Call) -> CommandResult:
        result = TOOLS[call.name]().run(self._sandbox, call.argument)
        if result.status is Status.INFRA:
            self.fault = result.head.decode(errors="replace")
        self._used_up = result.status is Status.OOM and result.exit_code is None
        return result

    def finish(self, answer: str | None) -> float | None:
        """Ends the agent's processes, scores what it did and closes; None when the machine failed meanwhile."""
        try:
            if self._sandbox is None:
                return None
            self._sandbox.kill_processes()
            return self._task.score(answer, self._sandbox)
        except SandboxError as error:
            self.fault = str(error)
            return 0.0 if self._used_up else None
        finally:
            self.close()

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


class Collector:
    """Makes trajectories, from a policy or from scripts. A context manager: leaving it ends all threads."""

    def __init__(self, renderer: Renderer, rules: Rules, limits: Limits, backend: str, tool_threads: int):
        self.stop = threading.Event()  # set it from anywhere: the collection under way raises Interrupted soon
        self._renderer = renderer
        self._rules = rules
        self._limits = limits
        self._backend = backend
        self._pool = concurrent.futures.ThreadPoolExecutor(tool_threads, thread_name_prefix="tool")

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rollouts(
        self, jobs: Sequence[Job], engine: DenseEngine, on_finish: Callable[[int], None] = lambda done: None
    ) -> list[Trajectory]:
        """Samples one trajectory a job from the engine's policy.

        Job i runs in lane i mod lanes, after the job before it there: with it, its tokens and log-probs are the same
        however long the tools take. `on_finish` is called with the number of finished rollouts.
        """
        collection = _Collection(self, jobs, engine)
        try:
            return collection.run(on_finish)
        finally:
            engine.cancel()
            collection.close()

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
        futures = [
            self._pool.submit(self._script, job, right, np.random.default_rng([seed, job.rollout]))
            for job, right in zip(jobs, solve, strict=True)
        ]
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

    def _start(self, job: Job) -> tuple[Episode, Environment]:
        episode = episode_lib.start(self._renderer, self._rules, job.task.prompt)
        return episode, Environment(job.task, self._limits, self._backend)

    def _script(self, job: Job, solve: bool, rng: np.random.Generator) -> Trajectory:
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
                    result = environment.run(episode.call)
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
                action = self._renderer.action(text)
                ids = action.ids[: episode.sample_budget]
                turn = Sampled(
                    ids,
                    logprobs=(0.0,) * len(ids),
                    entropies=(float("nan"),) * len(ids),
                    stopped=len(ids) == len(action.ids),
                    policy_version=-1,
                )
                episode = episode_lib.advance(episode, turn)
            trajectory = _score(job, episode, environment)
            if not trajectory.scored:
                raise RolloutError(
                    f"the script of task {job.task.name} failed on this machine: {environment.fault or 'no cause'}"
                )
            return trajectory
        finally:
            environment.close()


def _score(job: Job, episode: Episode, environment: Environment) -> Trajectory:
    reward = environment.finish(episode.answer)
    if reward is None:
        episode = episode_lib.abandon(episode)
    return episode_lib.to_trajectory(
        episode, task=job.task.name, group=job.group, rollout=job.rollout, reward=reward or 0.0
    )


class _Collection:
    """The state of one `Collector.rollouts`."""

    def __init__(self, collector: Collector, jobs: Sequence[Job], engine: DenseEngine):
        self._collector = collector
        self._jobs = jobs
        self._engine = engine
        self._pool = collector._pool
        self._environments: dict[int, Environment] = {}
        self._opened: dict[int, concurrent.futures.Future] = {}
        self._episodes: dict[int, Episode] = {}
        self._waiting: dict[concurrent.futures.Future, int] = {}  # tool call or score under way -> job
        self._in_lane: dict[int, int] = {}
        self._done: dict[int, Trajectory] = {}

    def run(self, on_finish: Callable[[int], None]) -> list[Trajectory]:
        for i in range(min(len(self._jobs), self._engine.lanes)):
            self._begin(i)
        while len(self._done) < len(self._jobs):
            if self._collector.stop.is_set():
                raise Interrupted
            if self._engine.busy:
                for lane, turn in self._engine.step().items():
                    self._advance(self._in_lane[lane], turn)
            else:
                concurrent.futures.wait(self._waiting, 0.1, concurrent.futures.FIRST_COMPLETED)
            for future in [future for future in self._waiting if future.done()]:
                self._collect(self._waiting.pop(future), future.result())
                on_finish(len(self._done))
        if self._jobs and not any(trajectory.scored for trajectory in self._done.values()):
            faults = [environment.fault for environment in self._environments.values() if environment.fault]
            raise RolloutError(
                f"all {len(self._jobs)} rollouts failed on this machine; mend the cause, then run the same command "
                f"again. The last one: {faults[-1] if faults else 'no cause'}"
            )
        return [self._done[i] for i in range(len(self._jobs))]

    def close(self) -> None:
        """Ends what still runs, so that no sandbox outlives a collection that was stopped."""
        pending = [*self._opened.values(), *self._waiting]
        for future in pending:
            future.cancel()
        concurrent.futures.wait(pending)
        for environment in self._environments.values():
            environment.close()

    def _begin(self, i: int) -> None:
        job = self._jobs[i]
        lane = i % self._engine.lanes
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
            self._waiting[self._pool.submit(self._call, i, episode.call)] = i
        else:
            self._waiting[self._pool.submit(self._finish, i, episode)] = i

    def _collect(self, i: int, result: CommandResult | Trajectory) -> None:
        if isinstance(result, CommandResult):
            self._advance(i, result)
            return
        self._done[i] = result
        following = i + self._engine.lanes
        if following < len(self._jobs):
            self._begin(following)

    # The two below run in the pool. The pool starts jobs in order, so `_opened[i]` is never behind them.

    def _call(self, i: int, call: Call) -> CommandResult:
        if not self._opened[i].result():
            return CommandResult(Status.INFRA, None, b"", b"", 0, 0.0, "")
        return self._environments[i].run(call)

    def _finish(self, i: int, episode: Episode) -> Trajectory:
        self._opened[i].result()
        return _score(self._jobs[i], episode, self._environments[i])


def imagined_observations(trajectories: Sequence[Trajectory], header: tuple[int, ...]) -> float:
    """Returns the share of action tokens that spell the header of an observation: the policy writes what only the
    environment should."""
    actions = imitated = 0
    for t in trajectories:
        action = t.role == Role.ACTION
        actions += int(action.sum())
        places = len(t.ids) - len(header) + 1
        if places > 0:
            window = np.arange(places)[:, None] + np.arange(len(header))
            imitated += len(header) * int((action[window] & (t.ids[window] == header)).all(axis=1).sum())
    return imitated / max(actions, 1)


def rollout_metrics(trajectories: Sequence[Trajectory], prefix: str, header: tuple[int, ...]) -> dict[str, float]:
    """Returns what a set of rollouts looks like; rewards are averaged over those that were scored. `header`: the ids
    that an observation begins with."""
    scored = [t.reward for t in trajectories if t.scored]
    statuses: dict[str, int] = {}
    for trajectory in trajectories:
        for status, count in trajectory.calls.items():
            statuses[status] = statuses.get(status, 0) + count
    groups: dict[int, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.scored:
            groups.setdefault(trajectory.group, []).append(trajectory.reward)
    metrics = {
        "turns": float(np.mean([t.turns for t in trajectories])),
        "tokens": float(np.mean([len(t.ids) for t in trajectories])),
        "infra": sum(not t.scored for t in trajectories),
        "imagined_observations": imagined_observations(trajectories, header),
    }
    if scored:
        metrics["solve_rate"] = float(np.mean([reward >= 1.0 for reward in scored]))
        metrics["reward"] = float(np.mean(scored))
        if len(scored) > len(groups):  # else no group has two to compare
            metrics["mixed_groups"] = float(np.mean([len(set(rewards)) > 1 for rewards in groups.values()]))
    for status in (*Status, "unknown_tool", "unclosed", "submit"):
        metrics[f"calls_{status}"] = statuses.get(status, 0)
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
