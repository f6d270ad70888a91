"""How tests score a task without an episode around it."""

from echo_jax.tasks.task import FinishedEpisode, Task


def score(task: Task, answer: str | None, world) -> float:
    """Returns the reward of an agent that submitted `answer` (None: nothing) and left `world` behind."""
    return task.score(FinishedEpisode(answer, world, outcome="submitted", turns=1))
