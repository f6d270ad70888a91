"""The world of one episode, a sandbox or a world that its task makes, from setup to scoring.

In: a task and the tool calls of its agent. Out: results, and in the end a reward. Setup, calls and scoring have
separate budgets. Nothing that the agent does ends the run or takes its rollout out of the account:

- An exception out of a tool is an observation; out of a score, and a score outside its range, the reward 0. Each is
  logged.
- A fault before the agent's first call is the machine's: there is no reward.
- A sandbox that breaks later may have been broken by the agent's processes. The reward is the lowest (`broken`); the
  collector first repeats the rollout, since the machine may have been at fault after all.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from echo_jax.roles import SPEAKERS
from echo_jax.system import user_code
from echo_jax.tasks.task import CannotScore, FinishedEpisode, Message, Task
from echo_jax.tools.sandbox import (
    CommandResult,
    Limits,
    Sandbox,
    SandboxBroken,
    SandboxError,
    SandboxUsedUp,
    Status,
    failure,
)
from echo_jax.tools.tool import Tool, World

START_ATTEMPTS = 3  # at starting a sandbox; then its rollout counts as a fault of the machine
_KINDS = {
    "status": Status,
    "exit_code": int | None,
    "head": bytes,
    "tail": bytes,
    "dropped_bytes": int,
    "seconds": float | int,
    "cwd": str,
    "limit": str,
    "speaker": str,
}  # of the fields of a CommandResult


class ScoreError(ValueError):
    """A task returned a score outside its declared range of rewards."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """How sandboxes are made, and time-outs of the commands that the harness runs in them."""

    limits: Limits
    backend: str = "auto"
    setup_seconds: float = 30.0
    score_seconds: float = 30.0


class EpisodeWorld:
    """The world of one episode. Its methods run in threads of a pool, one at a time."""

    def __init__(self, task: Task, machine: Machine, speakers: Collection[str] = tuple(SPEAKERS)):
        """
        Args:
          speakers: those that the chat format can show; a result of another is an exception of the tool.
        """
        self.task = task
        self.opened: concurrent.futures.Future[bool] | None = None  # what `open` returns, once `open_in` was called
        self._machine = machine
        self._speakers = speakers
        self._world: World | None = None
        self.acted = False  # whether a call of the agent was run
        self.broken = False  # whether the sandbox broke after that
        self.fault = ""  # why the world could not be made, broke, or could not be scored
        self.unscored = False  # whether the task raised `CannotScore`
        self.score_raised = ""  # the exception of the score
        self.raised: list[str] = []  # exceptions of the task and of tools, see `user_code.describe`
        self.limits_by = ""

    def open_in(self, pool: concurrent.futures.Executor) -> None:
        """Has a thread of the pool `open` it."""
        self.opened = pool.submit(self.open)

    def open(self) -> bool:
        """Starts the world; returns whether it is ready. Retries after faults of the machine."""
        try:
            self._world = self.task.world()
        except BaseException as error:
            self.fault = self._log("the world of task", error)
            return False
        if self._world is not None:
            return True
        for _ in range(START_ATTEMPTS):
            try:
                self._world = Sandbox(
                    limits=self._machine.limits,
                    backend=self._machine.backend,
                    files=self.task.files,
                    symlinks=self.task.symlinks,
                    places=self.task.reads_places,
                )
            except SandboxBroken as error:
                self.fault = str(error)
                continue
            except SandboxError:
                raise
            except Exception as error:
                self.fault = self._log("the files of task", error)
                return False
            self.limits_by = self._world.limits_by
            setup = self._setup()
            if setup is None or setup.status is Status.OK:
                self.fault = ""  # of an earlier attempt
                return True
            self.fault = f"setup {self.task.setup!r}: {setup.status} {setup.head.decode(errors='replace')}"
            self.close()
        return False

    def _setup(self) -> CommandResult | None:
        return self._world.run(self.task.setup, timeout=self._machine.setup_seconds) if self.task.setup else None

    def run(self, name: str, tool: Tool, arguments: Mapping[str, Any], seconds: float) -> CommandResult:
        """Runs a call for at most `seconds`, and at most the time-out of the limits. An exception of the tool is what
        the agent observes."""
        self.acted = True
        self._world.timeout = min(self._machine.limits.timeout_seconds, seconds)
        start = time.monotonic()
        try:
            result = tool.run(self._world, arguments)
            _check(result, self._speakers)
        except BaseException as error:
            text = user_code.message_of(error)
            text = text if isinstance(error, SandboxError) else f"{type(error).__name__}: {text}"
            seconds, limit = time.monotonic() - start, self._machine.limits.output_bytes
            result = failure(error, text, limit, seconds=seconds, cwd=self._world.cwd)
            if not isinstance(error, SandboxError):
                self._log(f"tool {name!r} in task", error)
        if result.status is Status.INFRA:
            self.broken, self.fault = True, result.head.decode(errors="replace")
        return result

    def finish(
        self,
        answer: str | None,
        *,
        outcome: str = "submitted",
        turns: int = 0,
        read_transcript: Callable[[], tuple[Message, ...]] = tuple,
    ) -> float | None:
        """Ends the agent's processes, scores the episode and closes the world.

        Returns:
          The reward: 0 if the score raised an exception, the lowest if the sandbox broke after a call of the agent
          (`broken`). None if it failed before that, or if the task cannot score the episode (`unscored`).
        """
        low, high = self.task.reward_range
        try:
            if self._world is None:
                return None
            if self.broken:
                return low
            self._world.timeout = self._machine.score_seconds
            self._world.kill_processes()
            reward = float(self.task.score(FinishedEpisode(answer, self._world, outcome, turns, read_transcript)))
            if not low <= reward <= high:
                raise ScoreError(f"the score is {reward}, outside the reward_range [{low:g}, {high:g}]")
            return reward
        except SandboxUsedUp:
            return low
        except SandboxBroken as error:
            self.broken, self.fault = self.acted, str(error)
            return low if self.acted else None
        except CannotScore as error:
            self.unscored = True
            self.fault = f"task {self.task.name} cannot be scored: {user_code.message_of(error)}"
            return None
        except BaseException as error:  # also a SandboxError: that a file is missing is no fault of the machine
            self.score_raised = self._log("the score of task", error)
            return min(max(0.0, low), high)
        finally:
            self.close()

    def close(self) -> None:
        if self._world is None:
            return
        try:
            self._world.close()
        except BaseException as error:
            self._log("closing the world of task", error)
        finally:
            self._world = None

    def _log(self, what: str, error: BaseException) -> str:
        """Keeps an exception of the user's code; returns its text. A `sys.exit()` counts too: here, in a thread of the
        pool, nobody means the run by it."""
        text = user_code.describe(f"{what} {self.task.name}", error)
        self.raised.append(text)
        user_code.log(text)
        return text


def _check(result: CommandResult, speakers: Collection[str]) -> None:
    """Raises `TypeError` or `ValueError` unless a tool returned what it must."""
    if not isinstance(result, CommandResult):
        raise TypeError(f"it returned a {type(result).__name__}; it must return a CommandResult")
    for name, kind in _KINDS.items():
        if not isinstance(value := getattr(result, name), kind):
            raise TypeError(f"its result has {name} = {value!r:.60}; it must be {getattr(kind, '__name__', kind)}")
    if result.speaker not in SPEAKERS:
        raise ValueError(f"its result has speaker = {result.speaker!r}; choose one of {', '.join(SPEAKERS)}")
    if result.speaker not in speakers:
        raise ValueError(
            f"its result has speaker = {result.speaker!r}, of whom the chat format shows no message after a turn; "
            f"choose one of {', '.join(speakers)}"
        )
    if not 0 <= result.seconds < math.inf:
        raise ValueError(f"its result has seconds = {result.seconds}; it must be a finite number from 0")
