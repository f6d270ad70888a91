"""What one episode acts on: a sandbox, or a world of the task's own; from its start to the score.

In: a task and the tool calls of its agent. Out: results, and in the end a reward. Setup, calls and scoring have budgets
of their own; what fails by the machine's fault is told apart from what the agent brought about.
"""

import dataclasses

from echo_jax.render.calls import Call
from echo_jax.system.errors import UserError
from echo_jax.tasks.task import Task
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Limits, Sandbox, SandboxBroken, SandboxError, SandboxUsedUp, Status
from echo_jax.tools.tool import World

START_ATTEMPTS = 3  # of a sandbox, before its rollout is given up as a fault of the machine


class ScoreError(UserError, ValueError):
    """A task gave something else than a reward in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """How sandboxes are made, and the seconds that the harness's own commands in them may take."""

    limits: Limits
    backend: str = "auto"
    setup_seconds: float = 30.0
    score_seconds: float = 30.0


class EpisodeWorld:
    """One episode's. Its methods run in threads of a pool, one at a time."""

    def __init__(self, task: Task, machine: Machine):
        self._task = task
        self._machine = machine
        self._world: World | None = None
        self.fault = ""  # what the machine did wrong last
        self.limits_by = ""

    def open(self) -> bool:
        """Starts the world; returns whether it stands. Faults of the machine are tried again."""
        self._world = self._task.world()
        if self._world is not None:
            return True
        for _ in range(START_ATTEMPTS):
            try:
                self._world = Sandbox(
                    limits=self._machine.limits,
                    backend=self._machine.backend,
                    files=self._task.files,
                    symlinks=self._task.symlinks,
                )
            except SandboxBroken as error:
                self.fault = str(error)
                continue
            self.limits_by = self._world.limits_by
            setup = self._setup()
            if setup is None or setup.status is Status.OK:
                return True
            self.fault = f"setup {self._task.setup!r}: {setup.status} {setup.head.decode(errors='replace')}"
            self.close()
        return False

    def _setup(self) -> CommandResult | None:
        return self._world.run(self._task.setup, timeout=self._machine.setup_seconds) if self._task.setup else None

    def run(self, call: Call, seconds: float) -> CommandResult:
        """Runs a call for at most so many seconds, and not longer than the limits say."""
        self._world.timeout = min(self._machine.limits.timeout_seconds, seconds)
        result = TOOLS[call.tool].run(self._world, call.arguments)
        if result.status is Status.INFRA:
            self.fault = result.head.decode(errors="replace")
        return result

    def finish(self, answer: str | None) -> float | None:
        """Ends the agent's processes, scores what it did and closes; None when the machine failed meanwhile.

        Raises:
          ScoreError: the task's score is no reward.
        """
        try:
            if self._world is None:
                return None
            self._world.timeout = self._machine.score_seconds
            self._world.kill_processes()
            reward = self._task.score(answer, self._world)
        except SandboxUsedUp:
            return 0.0
        except SandboxError as error:
            self.fault = str(error)
            return None
        finally:
            self.close()
        if not 0.0 <= reward <= 1.0:
            raise ScoreError(f"the score of task {self._task.name} is {reward}; a reward lies in [0, 1]")
        return reward

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None
