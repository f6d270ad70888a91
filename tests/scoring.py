"""Scores a task without an episode."""

from echo_jax.tasks.task import FinishedEpisode, Task


def score(task: Task, answer: str | None, world) -> float:
    """Returns the reward of an agent that submitted `answer` (None: no answer) and left `world` behind."""
    return task.score(FinishedEpisode(answer, world, outcome="submitted", turns=1))
