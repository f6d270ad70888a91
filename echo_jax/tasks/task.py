"""What a task is."""

import abc
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import ClassVar, Literal, Protocol

import numpy as np

from echo_jax.roles import Role
from echo_jax.tools.tool import World

Split = Literal["train", "heldout"]
# A scripted agent: yields the text of one turn ("bash ls", "submit oak") and is sent the observation that it caused.
Script = Generator[str, str, None]


class CannotScore(Exception):
    """Raised by `Task.score` when it cannot say how an episode went, through nobody's fault: a judge that does not
    answer. The rollout stays, unscored: it has no reward, and its group's baseline leaves it out."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A stretch of an episode with one writer."""

    role: Role
    text: str


@dataclasses.dataclass(frozen=True)
class FinishedEpisode:
    """What a task looks at to score an episode."""

    answer: str | None  # what the agent submitted; None: nothing
    world: World  # what it left behind; its processes have ended
    outcome: str  # why the episode ended, a value of `Outcome`
    turns: int
    read_transcript: Callable[[], tuple[Message, ...]] = tuple

    @property
    def transcript(self) -> tuple[Message, ...]:
        """Everything that was written, in order, from the prompt to the last turn; chat markup is left out."""
        return self.read_transcript()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One task. Everything in it follows from its family's parameters, split and index."""

    reward_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # a reward of the upper end means solved

    name: str  # "family/split/index": unique, stable
    prompt: str  # what the agent reads
    tools: tuple[str, ...] = ("bash",)  # names of the tools that the agent has beside `submit`
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # path below /work -> content
    symlinks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path below /work -> target
    setup: str = ""  # a shell command run before the agent starts; what it changes of the directory stays

    def world(self) -> World | None:
        """Returns a new world for an episode that needs no sandbox; None: it runs in a sandbox."""
        return None

    @abc.abstractmethod
    def score(self, episode: FinishedEpisode) -> float:
        """Returns the reward, within `reward_range`, of what the agent submitted and left behind.

        In a sandbox, look through `episode.world.read_file` or `.run(…, fresh=True)`: the files are the agent's, the
        environment of a fresh call is not.

        Raises:
          CannotScore: it cannot be said, and that is nobody's fault.
        """

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script | None:
        """Returns a scripted agent, one that solves the task or one that errs as beginners do; None: there is none,
        and the family can be trained with `warm_start.num_steps = 0` or from saved rollouts."""
        return None


class Family(Protocol):
    """A source of tasks, random-access by index. Its parameters are the constructor's keyword arguments."""

    def make(self, split: Split, index: int) -> Task: ...
