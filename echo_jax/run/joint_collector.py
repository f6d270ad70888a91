"""Collections by all processes of a run, which stop together and fail together.

In: this process's share of the jobs. Out: its trajectories; or, in every process, the same exception.
"""

from collections.abc import Callable, Sequence
from typing import Any

from echo_jax.rollout.collector import Collector, Interrupted, RolloutError
from echo_jax.rollout.episode import Outcome
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.peers import Peers


class JointCollector:
    """A `Collector` that all processes of a run use at the same time, each with its share of the jobs."""

    def __init__(self, collector: Collector, peers: Peers):
        self._collector = collector
        self._peers = peers

    @property
    def retried(self) -> int:
        """Number of rollouts that the last collection repeated, over all processes."""
        return sum(self._peers.gather(self._collector.retried))

    def rollouts(self, *arguments: Any, **options: Any) -> list[Trajectory]:
        """Like `Collector.rollouts`.

        Raises:
          Interrupted: this process, or another, was asked to stop; it holds the rollouts that this process finished.
          RolloutError: the machine failed every rollout, in all processes.
        """
        trajectories = self._together(lambda: self._collector.rollouts(*arguments, **options))
        self._check_machines(trajectories)
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

    def _check_machines(self, trajectories: Sequence[Trajectory]) -> None:
        lost = sum(t.outcome == Outcome.INFRA for t in trajectories)
        made, lost, faults = zip(
            *self._peers.gather([len(trajectories), lost, self._collector.fault], "faults"), strict=True
        )
        if any(made) and sum(lost) == sum(made):
            causes = "; ".join(dict.fromkeys(filter(None, faults)))
            raise RolloutError(
                f"all {sum(made)} rollouts failed on this machine; fix the cause, then run the same command again. "
                f"Last cause: {causes or 'unknown'}"
            )
