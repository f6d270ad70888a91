"""Tasks made from templates: the common part of the families `shell`, `python` and `sqlite`.

In: templates, functions of random numbers and a level. Out: tasks. A template draws all content at random, so that no
two tasks are alike. It also defines what earns the reward (`Goal`), the turns that reach it, and a beginner's mistake.
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from echo_jax.tasks import readers
from echo_jax.tasks.task import FinishedEpisode, Script, Split, Task, check_revision
from echo_jax.tasks.words import WORDS
from echo_jax.tools.sandbox import CommandResult, Sandbox, SandboxBroken, SandboxError, Status

LEVELS = (1, 2, 3)
READER_SECONDS = 5  # of a processor, for reading one file; an honest one takes a fraction of that
_SPLITS = {"train": 1, "heldout": 2}
_Item = TypeVar("_Item")


class Goal(Protocol):
    """The condition that earns the reward."""

    answer: str  # the right answer; empty if the task asks for a deed

    def reached(self, answer: str, sandbox: Sandbox) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """The right words in the right order, with any spacing; a path may begin with `./`."""

    answer: str

    def reached(self, answer: str, sandbox: Sandbox) -> bool:
        return _plain_words(answer) == _plain_words(self.answer)


def _plain_words(text: str) -> list[str]:
    return [word.removeprefix("./") for word in text.split()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The output of a template."""

    prompt: str
    files: Mapping[str, bytes]
    symlinks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    solution: tuple[str, ...]  # the turns that solve it, without the submission
    slip: str  # what a beginner might write instead of the last of them
    goal: Goal


Template = Callable[[np.random.Generator, int], Problem]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProceduralTask(Task):
    """A problem as a task."""

    template: str
    problem: Problem

    def score(self, episode: FinishedEpisode) -> float:
        reached = self.problem.goal.reached
        return float(episode.answer is not None and reached(episode.answer, episode.world))

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        problem = self.problem
        flaw = "none" if solve else pick(rng, ["slip", "slip", "too early", "guess"])
        *first, last = problem.solution
        observation = ""
        for turn in {"none": [*first, last], "slip": [*first, problem.slip], "too early": first, "guess": []}[flaw]:
            observation = yield turn
        if solve:
            answer = problem.goal.answer
        elif flaw == "slip" and problem.goal.answer and 0 < len(observation) < 200:
            answer = " ".join(observation.split())
        else:
            answer = self._guess(rng)
        yield f"submit {answer}"

    def _guess(self, rng: np.random.Generator) -> str:
        """Returns an answer of the right kind, almost always wrong."""
        return " ".join(
            str(int(word) + int(rng.integers(1, 1 + max(10, abs(int(word))))))
            if word.removeprefix("-").isdigit()
            else pick(rng, WORDS)
            for word in self.problem.goal.answer.split()
        )


class ProceduralFamily:
    """Tasks from several equally frequent templates. `level` sets how large they are and how many steps they need."""

    name: ClassVar[str]
    tools: ClassVar[tuple[str, ...]]
    templates: ClassVar[Mapping[str, Template]]
    first_templates: ClassVar[Mapping[str, Template]]  # those of revision 1 that differ
    newest_revision: ClassVar[int] = 2

    def __init__(self, level: int, revision: int = 1):
        if level not in LEVELS:
            raise ValueError(f"task.{self.name}.level = {level}: choose {LEVELS[0]} to {LEVELS[-1]}")
        self.level = level
        check_revision(self.name, revision, self.newest_revision)
        self._templates = self.templates | (self.first_templates if revision == 1 else {})

    def make(self, split: Split, index: int) -> ProceduralTask:
        rng = np.random.default_rng([*self.name.encode(), _SPLITS[split], self.level, index])
        template = pick(rng, list(self._templates))
        problem = self._templates[template](rng, self.level)
        return ProceduralTask(
            name=f"{self.name}/{split}/{index}",
            prompt=problem.prompt,
            tools=self.tools,
            files=problem.files,
            symlinks=problem.symlinks,
            template=template,
            problem=problem,
        )


def by_level(level: int, *choices: _Item) -> _Item:
    """Returns the choice for a level."""
    return choices[level - 1]


# -- drawing -------------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, items: Sequence[_Item], count: int) -> list[_Item]:
    """Returns `count` different items in random order."""
    return [items[i] for i in rng.choice(len(items), count, replace=False)]


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    return items[int(rng.integers(len(items)))]


def names(rng: np.random.Generator) -> Iterator[str]:
    """Yields distinct words, none a substring of another, so that a search for one does not find another."""
    for word in draw(rng, WORDS, len(WORDS)):
        if not any(word != other and (word in other or other in word) for other in WORDS):
            yield word


# -- inspecting what the agent left -----------------------------------------------------------------------------------


def holds(sandbox: Sandbox, command: str) -> bool:
    """Returns whether a command exits with status 0. It ignores the agent's changes to the environment.

    Raises SandboxBroken if the sandbox is dead through no fault of the agent.
    """
    return _run(sandbox, command).status is Status.OK


def _run(sandbox: Sandbox, command: str) -> CommandResult:
    result = sandbox.run(command, fresh=True)
    if result.status is Status.INFRA:
        raise SandboxBroken(f"the sandbox died during scoring: {result.head.decode(errors='replace')}")
    return result


def read_inside(sandbox: Sandbox, path: str, reader: str, **arguments) -> str | None:
    """Returns `readers.digest` of a file that the agent left, read by the function `reader` of readers.py. None unless
    it is a regular file of at most `readers.MAX_BYTES` and the reader gets through it.

    The reader runs in the sandbox, since the file may be hostile. Its code comes from here with each call, in a fresh
    interpreter that imports nothing from the agent's folders. It is not told what is right.

    Raises SandboxError if its answer does not fit in sandbox.output_bytes, SandboxBroken if the sandbox is dead through
    no fault of the agent.
    """
    if not content(sandbox, path, readers.MAX_BYTES):
        return None
    command = ["/opt/python/bin/python3", "-I", "-S", "-c", _source(), reader, path, json.dumps(arguments)]
    result = _run(sandbox, f"ulimit -t {READER_SECONDS} 2> /dev/null; exec {shlex.join(command)}")
    if result.status is not Status.OK:
        return None
    if result.dropped_bytes:
        raise SandboxError(
            f"sandbox.output_bytes = {sandbox.limits.output_bytes} cuts the answer of a reader; set it to 64 or more"
        )
    return (result.head + result.tail).decode().strip()


@functools.cache
def _source() -> str:
    return Path(readers.__file__).read_text(encoding="utf-8")


def content(sandbox: Sandbox, path: str, limit: int) -> bytes | None:
    """Returns a file's content; None unless it is a regular file of at most `limit` bytes."""
    try:
        return sandbox.read_file(path, limit=limit)
    except SandboxBroken:
        raise
    except SandboxError:
        return None
