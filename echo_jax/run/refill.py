"""Dynamic sampling: a group whose rollouts all earn the same reward says nothing about how to act, so it is replaced by
one of another task before the step trains (DAPO, arXiv 2503.14476, section 3.2).

In: what a step has sampled so far. Out: the next jobs, and in the end what the step trains. Tasks and sampling keys are
functions of (step, group, try), and only rewards decide, so a run that was stopped goes on bit for bit.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import ml_collections

from echo_jax.config import FIRST_SPARE, TASKS_PER_SEED, ConfigError, of_environment
from echo_jax.objective.advantages import Pool, alone, rewards_by_group
from echo_jax.objective.weights import MODES, mode_at
from echo_jax.rollout.trajectory import Trajectory

if TYPE_CHECKING:  # checks of a config need neither tasks nor tools
    from echo_jax.rollout.collector import Job
    from echo_jax.tasks.task import Task

# Sampling keys of ordinary steps are below; those of evaluations follow from 1 << 30 on.
FIRST_REFILL_ROLLOUT = 1 << 29


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers the tasks and rollouts of refills; no two of a run share one.

    Args of its methods: RL steps, groups of a step and places count from 0, tries from 1.
    """

    tries: int  # at most, for each group
    groups: int  # of a step
    places: int  # of rollouts in a step

    def task(self, step: int, group: int, attempt: int) -> int:
        """Returns the index of a group's task among its environment's spare ones."""
        return (step * self.groups + group) * self.tries + attempt - 1

    def rollout(self, step: int, place: int, attempt: int) -> int:
        """Returns the global index of the rollout at a place of the step, the root of its sampling keys."""
        return FIRST_REFILL_ROLLOUT + (step * self.tries + attempt - 1) * self.places + place


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a step has sampled: one process's rollouts, and how many groups there were over all processes."""

    trained: list[Trajectory]  # the rollouts that the update gets, in the order of the step's jobs
    tries: list[list[Trajectory]]  # all that were sampled: the step's own tasks, then each try to refill
    refilled: int = 0  # groups that were replaced
    unfilled: int = 0  # groups without variance that are trained, since no try is left

    @classmethod
    def of(cls, trajectories: list[Trajectory]) -> "Collected":
        return cls(trajectories, [trajectories])

    @property
    def sampled(self) -> list[Trajectory]:
        return [trajectory for members in self.tries for trajectory in members]

    def replacing(self, groups: Collection[int], trajectories: list[Trajectory]) -> "Collected":
        """Returns it with these groups replaced, each rollout in its place.

        Args:
          trajectories: this process's rollouts of the new groups, in the order of those that they replace.
        """
        new = iter(trajectories)
        trained = [next(new) if old.group in groups else old for old in self.trained]
        return Collected(trained, [*self.tries, trajectories], self.refilled + len(groups))

    def metrics(self, groups: int) -> dict[str, float]:
        """Returns the account of a step that trains `groups` groups; it adds up: offered = trained + refilled."""
        return {
            "rollout/offered": groups + self.refilled,
            "rollout/refilled": self.refilled,
            "rollout/unfilled": self.unfilled,
        }


def without_variance(trajectories: Sequence[Trajectory], pool: Pool = alone) -> set[int]:
    """Returns the groups with fewer than two different rewards among their scored rollouts, over all processes."""
    return {group for group, rewards in rewards_by_group(trajectories, pool).items() if len(set(rewards.values())) < 2}


def refill_jobs(
    jobs: Sequence["Job"],
    groups: Collection[int],
    attempt: int,
    *,
    step: int,
    first_rollout: int,
    numbers: Numbers,
    spare_task: Callable[[str, int], "Task"],
) -> list["Job"]:
    """Returns the jobs that take the places of a step's jobs in these groups.

    Args:
      jobs: this process's share of the step's own jobs; `first_rollout`: the number at the step's first place.
      step: of RL, from 0; `attempt`: from 1.
      spare_task: (environment, index) -> task.
    """
    replaced = [job for job in jobs if job.group in groups]
    environments = {job.group: job.environment for job in replaced}
    tasks = {group: spare_task(entry, numbers.task(step, group, attempt)) for group, entry in environments.items()}
    return [
        dataclasses.replace(
            job, task=tasks[job.group], rollout=numbers.rollout(step, job.rollout - first_rollout, attempt)
        )
        for job in replaced
    ]


def has_policy_term(config: ml_collections.ConfigDict, entry: str, step: int) -> bool:
    """Returns whether the rewards of an environment's rollouts count in an RL step, from 0."""
    return "policy" in MODES[mode_at(step, of_environment(config, entry).loss.mode, config.loss.mode_changes)]


def check_lengths(config: ml_collections.ConfigDict, places: int) -> None:
    """Checks that the tasks and the sampling keys of refills meet no others, and do not run out.

    Raises:
      ConfigError: the run is too long.
    """
    rollout, steps, warm = config.rollout, config.num_steps, config.warm_start
    numbers = Numbers(rollout.refill_tries, rollout.groups, places)
    spare = TASKS_PER_SEED - FIRST_SPARE
    for what, needed, most in (
        ("tasks of its own", warm.demonstrations + steps * rollout.groups, FIRST_SPARE),
        ("tasks to refill with", numbers.task(steps, 0, 1), spare),
        ("sampling keys of its own", (warm.num_steps + steps) * places, FIRST_REFILL_ROLLOUT),
        ("sampling keys of refills", numbers.rollout(steps, 0, 1) - FIRST_REFILL_ROLLOUT, FIRST_REFILL_ROLLOUT),
    ):
        if needed > most:
            raise ConfigError(
                f"config.num_steps = {steps} with rollout.groups = {rollout.groups}, {places} rollouts a step and "
                f"rollout.refill_tries = {rollout.refill_tries} needs {needed} {what}, but a run has {most}; lower one "
                "of these"
            )
