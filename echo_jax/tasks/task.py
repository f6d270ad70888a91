"""What a task is."""

import abc
import dataclasses
from collections.abc import Generator, Mapping
from typing import Literal, Protocol

import numpy as np

from echo_jax.tools.tool import World

Split = Literal["train", "heldout"]
# A scripted agent: yields the text of one turn ("bash ls", "submit oak") and is sent the observation that it caused.
Script = Generator[str, str, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One task. Everything in it follows from its family's parameters, split and index."""

    name: str  # "family/split/index": unique, stable
    prompt: str  # what the agent reads
    tools: tuple[str, ...] = ("bash",)  # names in TOOLS that the agent has beside `submit`
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # path below /work -> content
    symlinks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path below /work -> target
    setup: str = ""  # a shell command run before the agent starts; what it changes of the directory stays

    def world(self) -> World | None:
        """Returns a new world for an episode that needs no sandbox; None: it runs in a sandbox."""
        return None

    @abc.abstractmethod
    def score(self, answer: str | None, world: World) -> float:
        """Returns the reward in [0, 1] of what the agent submitted (None: nothing) and left behind.

        The agent's processes are ended before. In a sandbox, look through `read_file` or `run(…, fresh=True)`: the
        files are the agent's, the environment of a fresh call is not.
        """

    @abc.abstractmethod
    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        """Returns a scripted agent: one that solves the task, or one that errs as beginners do."""


class Family(Protocol):
    """A source of tasks, random-access by index."""

    def make(self, split: Split, index: int) -> Task: ...
