"""Collections by all processes of a run, which stop together and fail together.

In: this process's share of the jobs. Out: its trajectories; or, in every process, the same exception.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from echo_jax.rollout.collector import Collector, Interrupted, Job, RolloutError, Seconds
from echo_jax.rollout.engine import Engine
from echo_jax.rollout.episode import Outcome
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.peers import Peers
from echo_jax.system.user_code import UserCodeError


class _Account(NamedTuple):
    """What a `Collector` says of one collection."""

    retried: int
    raised: Mapping[int, str]
    seconds: Seconds
    counts: Mapping[str, float]


class JointCollector:
    """A `Collector` that all processes of a run use at the same time, each with its share of the jobs."""

    def __init__(self, collector: Collector, peers: Peers):
        self._collector = collector
        self._peers = peers
        self.raised = 0  # number of rollouts of the last collection whose task or tools raised exceptions
        self.first_raised = ""  # the first of these exceptions, see `user_code.describe`
        self._before: list[_Account] = []  # of the collections to which the last one adds

    @property
    def retried(self) -> int:
        """Number of rollouts that the last collection repeated, over all processes."""
        return sum(self._peers.gather(sum(account.retried for account in self._accounts)))

    def seconds(self) -> Seconds:
        """Returns where the wall time of the last collection went, in the mean over all processes."""
        own = [sum(spent) for spent in zip(*(account.seconds for account in self._accounts), strict=True)]
        everyone = self._peers.gather(own, "seconds")
        return Seconds(*map(mean, zip(*everyone, strict=True)))

    def counts(self) -> list[Mapping[str, float]]:
        """Returns what the engine of each process counted in the last collection, and in each to which it adds."""
        return self._peers.join([dict(account.counts) for account in self._accounts], "counts")

    def raised_here(self) -> Collection[int]:
        """Returns which of this process's rollouts in the last collection those were."""
        return [rollout for account in self._accounts for rollout in account.raised]

    def prepare(self, jobs: Sequence[Job], engine: Engine) -> None:
        """Like `Collector.prepare`. It waits for no other process."""
        self._collector.prepare(jobs, engine)

    def rollouts(self, *arguments: Any, adds: bool = False, **options: Any) -> list[Trajectory]:
        """Like `Collector.rollouts`.

        Args:
          adds: to the collection before, of which at least one rollout went well: counts and seconds go on, and the
            run does not stop if all rollouts of this one fail.

        Raises:
          Interrupted: this process, or another, was asked to stop; it holds the rollouts that this process finished.
          RolloutError: the machine failed every rollout, in all processes.
          UserCodeError: in every rollout, of all processes, the task or a tool raised an exception.
        """
        if not adds:
            self.raised, self.first_raised = 0, ""
        self._before = self._accounts if adds else []
        trajectories = self._together(lambda: self._collector.rollouts(*arguments, **options))
        self._check(trajectories, may_fail=adds)
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
            with self._peers.failing_together():
                trajectories, interrupted = collect(), False
        except Interrupted as stopped:
            trajectories, interrupted = list(stopped.finished), True
        if any(self._peers.gather(interrupted, "rollouts")):
            raise Interrupted(trajectories)
        return trajectories

    @property
    def _accounts(self) -> list["_Account"]:
        own = self._collector
        return [*self._before, _Account(own.retried, own.raised, own.seconds, own.counts)]

    def _check(self, trajectories: Sequence[Trajectory], *, may_fail: bool) -> None:
        """Raises an error, in all processes, if not one rollout is worth going on for."""
        own = self._collector
        lost = sum(t.outcome == Outcome.INFRA for t in trajectories)  # not those that the agent may have broken
        first = list(own.raised.values())[:1]
        everyone = self._peers.gather([len(trajectories), lost, own.fault, len(own.raised), *first], "faults")
        made, lost, raised = (sum(counts[i] for counts in everyone) for i in (0, 1, 3))
        self.raised += raised
        self.first_raised = self.first_raised or next((text for counts in everyone for text in counts[4:]), "")
        if may_fail:
            return
        if made and raised == made:
            self._peers.fail_together(
                UserCodeError(
                    f"in all {made} rollouts the task or a tool raised an exception; mend it, then run the same "
                    "command again. (A tool that only refuses its arguments should return a result.) "
                    f"The first: {self.first_raised}"
                )
            )
        if made and lost == made:
            causes = "; ".join(dict.fromkeys(filter(None, (counts[2] for counts in everyone))))
            self._peers.fail_together(
                RolloutError(
                    f"all {made} rollouts failed on this machine; fix the cause, then run the same command again. "
                    f"Last cause: {causes or 'unknown'}"
                )
            )
