"""What a task is."""

from collections.abc import Generator, Mapping
from typing import Literal, Protocol

import numpy as np

from echo_jax.tools.sandbox import Sandbox

Split = Literal["train", "heldout"]
# A scripted agent: yields the text of one turn ("bash ls", "submit oak") and is sent the observation that it caused.
Script = Generator[str, str, None]


class Task(Protocol):
    """One task. Everything in it follows from its family's parameters, split and index."""

    name: str  # "family/split/index": unique, stable
    prompt: str  # what the agent reads
    files: Mapping[str, bytes]  # path below the working directory -> content
    symlinks: Mapping[str, str]  # path below the working directory -> target
    setup: str  # a shell command run before the agent starts ("" for none)

    def score(self, answer: str | None, sandbox: Sandbox) -> float:
        """Returns the reward in [0, 1] of what the agent submitted (None: nothing) and left behind."""
        ...

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        """Returns a scripted agent: one that solves the task, or one that errs as beginners do."""
        ...


class Family(Protocol):
    """A source of tasks, random-access by index."""

    def make(self, split: Split, index: int) -> Task: ...
