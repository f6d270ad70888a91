"""The interface of tasks and task families."""

import abc
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import ClassVar, Literal, Protocol

import numpy as np

from echo_jax.roles import Role
from echo_jax.tools.tool import World

Split = Literal["train", "heldout"]
# A scripted agent: yields the text of a turn ("bash ls", "submit oak") and is sent the observation that follows.
Script = Generator[str, str, None]


class CannotScore(Exception):
    """Raised by `Task.score` if it cannot score an episode through nobody's fault, for example because a judge does not
    answer. The rollout stays, unscored: it has no reward, and its group's baseline leaves it out."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A part of an episode with one writer."""

    role: Role
    text: str


@dataclasses.dataclass(frozen=True)
class FinishedEpisode:
    """What a task inspects to score an episode."""

    answer: str | None  # what the agent submitted; None: it submitted nothing
    world: World  # as the agent left it; its processes have ended
    outcome: str  # why the episode ended, a value of `Outcome`
    turns: int
    read_transcript: Callable[[], tuple[Message, ...]] = tuple

    @property
    def transcript(self) -> tuple[Message, ...]:
        """All text in order, from the prompt to the last turn, without chat markup."""
        return self.read_transcript()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One task, fully determined by its family's parameters, split and index."""

    reward_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # (lowest, highest) reward; the highest means solved
    # Whether the score reads `episode.world.places`: where the agent's shell stood after each call, which the kernel
    # tells and the agent cannot forge. A call then takes about a millisecond more.
    reads_places: ClassVar[bool] = False

    name: str  # "family/split/index": unique, stable
    prompt: str  # what the agent reads
    tools: tuple[str, ...] = ("bash",)  # names of the agent's tools, besides `submit`
    # Name of the tool that gets the text of a turn without a call, as its only argument, and may answer as a user:
    # `CommandResult.speaker`. The agent is not told of it. "": such a turn is a format error.
    listener: str = ""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # path below /work -> content
    symlinks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path below /work -> target
    setup: str = ""  # a shell command run before the agent starts; its changes to the directory stay

    def world(self) -> World | None:
        """Returns a new world for an episode that needs no sandbox; None: the episode runs in a sandbox.

        Runs in another thread, for the first episodes of a step during the update before it."""
        return None

    @abc.abstractmethod
    def score(self, episode: FinishedEpisode) -> float:
        """Returns the reward, within `reward_range`, for what the agent submitted and left behind.

        In a sandbox, inspect it with `episode.world.read_file` or `.run(…, fresh=True)`: the agent controls the files,
        but not the environment of a fresh call. This method runs in the trainer: an archive, a database or other text
        of the agent's that could hang or crash a parser is read by a command in the sandbox, as `read_inside` in
        procedural.py does.

        Raises:
          CannotScore: it cannot score the episode, through nobody's fault. Not for what the agent can bring about: it
            could leave its group's baseline at will.

        Any other exception, and a reward outside the range, is logged and is the reward 0, or the lowest if the range
        begins above 0; if every rollout of a step has one, the run stops. If the sandbox broke after the agent's first
        call, and again when the rollout was repeated, the reward is the lowest.
        """

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script | None:
        """Returns a scripted agent that solves the task or, unless `solve`, errs as beginners do. None: no script; the
        family can be trained with `warm_start.num_steps = 0` or from saved rollouts."""
        return None


def check_revision(family: str, revision: int, newest: int) -> int:
    """Returns a revision of a built-in family's tasks. Tasks of one revision never change, so a mended family gets
    another; the first is that of runs from before revisions were recorded.

    Raises:
      ValueError: there is no such revision.
    """
    if not 1 <= revision <= newest:
        raise ValueError(f"task.{family}.revision = {revision}: choose 1 to {newest}, or 0 for the newest")
    return revision


def has_demonstrator(task: Task) -> bool:
    return task.demonstrate(np.random.default_rng(0), solve=True) is not None


class Family(Protocol):
    """A source of tasks, random-access by index. Its parameters are the constructor's keyword arguments."""

    def make(self, split: Split, index: int) -> Task: ...
