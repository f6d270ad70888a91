"""Collections by all processes of a run, which stop together and fail together.

In: this process's share of the jobs. Out: its trajectories; or, in every process, the same exception.
"""

from collections.abc import Callable, Sequence
from typing import Any

from echo_jax.rollout.collector import Collector, Interrupted, RolloutError
from echo_jax.rollout.episode import Outcome
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.peers import Peers
from echo_jax.system.user_code import UserCodeError


class JointCollector:
    """A `Collector` that all processes of a run use at the same time, each with its share of the jobs."""

    def __init__(self, collector: Collector, peers: Peers):
        self._collector = collector
        self._peers = peers
        self.raised = 0  # number of rollouts of the last collection that met exceptions in a task or tool
        self.first_raised = ""  # the first of these exceptions, see `user_code.describe`
        self.failed_together = False  # whether all processes raised the same error

    @property
    def retried(self) -> int:
        """Number of rollouts that the last collection repeated, over all processes."""
        return sum(self._peers.gather(self._collector.retried))

    def rollouts(self, *arguments: Any, **options: Any) -> list[Trajectory]:
        """Like `Collector.rollouts`.

        Raises:
          Interrupted: this process, or another, was asked to stop; it holds the rollouts that this process finished.
          RolloutError: the machine failed every rollout, in all processes.
          UserCodeError: every rollout, of all processes, met an exception in its task or a tool.
        """
        trajectories = self._together(lambda: self._collector.rollouts(*arguments, **options))
        self._check(trajectories)
        return trajectories

    def scripted(self, *arguments: Any, **options: Any) -> list[Trajectory]:
        """Like `Collector.scripted`.

        Raises:
          Interrupted: this process, or another, was asked to stop.
        """
        return self._together(lambda: self._collector.scripted(*arguments, **options))

    def check_stop(self) -> None:
        """Raises `Interrupted` if this process, or another of the run, was asked to stop."""
        if any(self._peers.gather(self._collector.stop.is_set(), "a step")):
            raise Interrupted

    def _together(self, collect: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        try:
            trajectories, interrupted = collect(), False
        except Interrupted as stopped:
            trajectories, interrupted = list(stopped.finished), True
        if any(self._peers.gather(interrupted, "rollouts")):
            raise Interrupted(trajectories)
        return trajectories

    def _check(self, trajectories: Sequence[Trajectory]) -> None:
        """Raises an exception if not one rollout is worth going on for."""
        own = self._collector
        lost = sum(t.outcome == Outcome.INFRA for t in trajectories)
        everyone = self._peers.gather([len(trajectories), lost, own.fault, len(own.raised), *own.raised[:1]], "faults")
        made, lost, self.raised = (sum(counts[i] for counts in everyone) for i in (0, 1, 3))
        self.first_raised = next((text for counts in everyone for text in counts[4:]), "")
        self.failed_together = made > 0 and made in (self.raised, lost)
        if made and self.raised == made:
            raise UserCodeError(
                f"all {made} rollouts met an exception in a task or a tool; mend it, then run the same command again. "
                f"The first: {self.first_raised}"
            )
        if made and lost == made:
            causes = "; ".join(dict.fromkeys(filter(None, (counts[2] for counts in everyone))))
            raise RolloutError(
                f"all {made} rollouts failed on this machine; fix the cause, then run the same command again. "
                f"Last cause: {causes or 'unknown'}"
            )
