"""Maze: walk to a goal in a text maze that is new in every task, as in the microcosm of the ECHO paper
(arXiv:2605.24517). It runs no process: the world is a few numbers.

The agent knows its cell and the goal's, and sees only the doors of its cell.
Revision 2: a hash of the maze decides which split it belongs to, so that the splits share none, however small it is.
Walls block the two straight ways to the goal, first all columns or first all rows.
"""

import dataclasses
import functools
import hashlib
import time
from typing import ClassVar

import numpy as np

from echo_jax.tasks.task import FinishedEpisode, Script, Split, Task, check_revision
from echo_jax.tasks.ways import shortest_ways
from echo_jax.tools.sandbox import CommandResult, Status

Cell = tuple[int, int]  # column, row; the first row is the northmost

STEPS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
EXTRA_DOORS = 0.15  # opens this share of all doors in addition to a spanning tree: there is more than one path
MAX_WANDERING = 12  # steps of a flawed demonstration


class MazeWorld:
    """Holds the agent's cell. `doors`: the pairs of cells between which one can walk."""

    def __init__(self, doors: frozenset[tuple[Cell, Cell]], start: Cell, goal: Cell):
        self.cell = start
        self.goal = goal
        self.timeout = 1.0
        self.cwd = "/"
        self._doors = doors

    def go(self, direction: str) -> CommandResult:
        started = time.monotonic()
        if direction not in STEPS:
            return self._answer(f"go {', '.join(STEPS)}", started, well=False)
        doors = exits(self._doors, self.cell)
        if direction not in doors:
            return self._answer(f"wall; {self.seen()}", started, well=False)
        self.cell = doors[direction]
        return self._answer(self.seen(), started, well=True)

    def seen(self) -> str:
        """Returns what the agent sees: `at 2 3; doors north east; goal 5 0`."""
        doors = " ".join(exits(self._doors, self.cell))
        return f"at {self.cell[0]} {self.cell[1]}; doors {doors}; goal {self.goal[0]} {self.goal[1]}"

    def _answer(self, text: str, started: float, *, well: bool) -> CommandResult:
        return CommandResult(
            status=Status.OK if well else Status.NONZERO,
            exit_code=0 if well else 1,
            head=f"{text}\n".encode(),
            tail=b"",
            dropped_bytes=0,
            seconds=time.monotonic() - started,
            cwd=self.cwd,
        )

    def kill_processes(self) -> None:
        """Does nothing: there are no processes."""

    def close(self) -> None:
        """Does nothing: there is nothing to free."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MazeTask(Task):
    """Solved when the agent submits while it stands on the goal."""

    tools: tuple[str, ...] = ("go",)
    doors: frozenset[tuple[Cell, Cell]]
    start: Cell
    goal: Cell

    def world(self) -> MazeWorld:
        return MazeWorld(self.doors, self.start, self.goal)

    def ways(self) -> dict[Cell, tuple[str, ...]]:
        """Returns the directions of a shortest path to each cell."""
        return shortest_ways(functools.partial(exits, self.doors), self.start)

    def score(self, episode: FinishedEpisode) -> float:
        return float(episode.answer is not None and episode.world.cell == self.goal)

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        if solve:
            for direction in self.ways()[self.goal]:
                yield f"go {direction}"
        else:  # wander roughly towards the goal, run into walls, and give up
            liked = [direction for line in _towards(self.start, self.goal) for direction in line]
            for _ in range(int(rng.integers(1, MAX_WANDERING + 1))):
                yield f"go {rng.choice([*liked, *STEPS])}"
        yield "submit "


class MazeFamily:
    """A new random maze of `width` × `height` cells for each task. The goal is at least half as far as the farthest
    cell."""

    newest_revision: ClassVar[int] = 2

    def __init__(self, width: int, height: int, revision: int = 1):
        if min(width, height) < 2 or max(width, height) > 20:
            raise ValueError(f"task.maze: {width} × {height} cells; choose 2 to 20 each way")
        self.width = width
        self.height = height
        self.revision = check_revision("maze", revision, self.newest_revision)

    def make(self, split: Split, index: int) -> MazeTask:
        rng = np.random.default_rng([*b"maze", {"train": 1, "heldout": 2}[split], self.width, self.height, index])
        task = self._draw(f"maze/{split}/{index}", rng)
        while self.revision > 1 and (_split_of(task) != split or _is_straight(task)):
            task = self._draw(task.name, rng)
        return task

    def _draw(self, name: str, rng: np.random.Generator) -> MazeTask:
        cells = [(x, y) for x in range(self.width) for y in range(self.height)]
        doors = _dig(cells, rng)
        start = cells[int(rng.integers(len(cells)))]
        ways = shortest_ways(functools.partial(exits, doors), start)
        longest = max(map(len, ways.values()))
        far = [cell for cell, way in ways.items() if 2 * len(way) >= longest]
        goal = far[int(rng.integers(len(far)))]
        return MazeTask(
            name=name,
            prompt=f"Walk to the goal, then submit. {MazeWorld(doors, start, goal).seen()}",
            doors=doors,
            start=start,
            goal=goal,
        )


def _split_of(task: MazeTask) -> Split:
    """Returns one of the splits for all tasks with this maze, start and goal."""
    content = repr((sorted(task.doors), task.start, task.goal)).encode()
    return "heldout" if hashlib.sha256(content).digest()[0] % 2 else "train"


def _towards(start: Cell, goal: Cell) -> tuple[list[str], list[str]]:
    """Returns the steps along the columns and those along the rows that lead from start to goal where no wall is."""
    x, y = goal[0] - start[0], goal[1] - start[1]
    return ["east" if x > 0 else "west"] * abs(x), ["south" if y > 0 else "north"] * abs(y)


def _is_straight(task: MazeTask) -> bool:
    """Returns whether one of the two ways to the goal with at most one turn is open."""
    first, second = _towards(task.start, task.goal)
    for way in (first + second, second + first):
        world = task.world()
        for direction in way:
            world.go(direction)
        if world.cell == task.goal:
            return True
    return False


def neighbour(cell: Cell, direction: str) -> Cell:
    return cell[0] + STEPS[direction][0], cell[1] + STEPS[direction][1]


def exits(doors: frozenset[tuple[Cell, Cell]], cell: Cell) -> dict[str, Cell]:
    """Returns {direction: cell behind the door} for the doors of a cell."""
    neighbours = {direction: neighbour(cell, direction) for direction in STEPS}
    return {direction: behind for direction, behind in neighbours.items() if (cell, behind) in doors}


def _dig(cells: list[Cell], rng: np.random.Generator) -> frozenset[tuple[Cell, Cell]]:
    """Returns the doors of a random spanning tree, dug by a walk that backs out of dead ends, and some extra doors."""
    pairs = [(cell, neighbour(cell, direction)) for cell in cells for direction in ("east", "south")]
    doors = {pair for pair in pairs if pair[1] in cells and rng.random() < EXTRA_DOORS}
    path = [cells[int(rng.integers(len(cells)))]]
    visited = {path[0]}
    while path:
        neighbours = [neighbour(path[-1], direction) for direction in STEPS]
        new = [cell for cell in neighbours if cell in cells and cell not in visited]
        if not new:
            path.pop()
            continue
        following = new[int(rng.integers(len(new)))]
        doors.add((path[-1], following))
        visited.add(following)
        path.append(following)
    return frozenset(doors | {(there, here) for here, there in doors})
