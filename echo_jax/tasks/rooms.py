"""Rooms: walk from one room to another on a map that the agent never gets to see.

Rooms are directories with opaque names, exits are symlinks `n e s w` (a wall leads back to the same room), and the file
`sign` names the room. A seed fixes the map, and tasks are start/goal pairs on it. So the dynamics can be learned, from
rewards alone or from the tools' output.

The score checks where the shell stands after each call, which the kernel tells: no file that the agent writes does.
Revision 2: an exit at a time. A call that goes anywhere but through one exit of its room, as with `cd` to a directory
that a search for the goal's sign has found, earns nothing; and the goal is never the room next door. (An agent that can
program may still search the links for a way in one call, and then take a step of it in each.) In revision 1 only the
last place counts.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from echo_jax.tasks.task import FinishedEpisode, Script, Split, Task, check_revision
from echo_jax.tasks.ways import shortest_ways
from echo_jax.tasks.words import WORDS

EXITS = {"n": (0, -1), "e": (1, 0), "s": (0, 1), "w": (-1, 0)}
OPEN_SHARE = 0.35  # of the doors that a spanning tree leaves closed
HELDOUT_SHARE = 1 / 3  # of the start/goal pairs


def move(exit_name: str) -> str:
    """Returns the turn that goes through an exit and reads the next room's sign."""
    return f"bash cd -P {exit_name}; cat sign"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoomsTask(Task):
    """Solved when the agent submits while its shell is in the goal room and, unless `neighbours` is None, has walked
    there."""

    reads_places: ClassVar[bool] = True
    path: tuple[str, ...]  # the exits on a shortest path
    goal: str  # directory of the goal room
    goal_sign: str
    neighbours: Mapping[str, tuple[str, ...]] | None = None  # directory of a room -> those behind its exits

    def score(self, episode: FinishedEpisode) -> float:
        if episode.answer is None:
            return 0.0
        rooms = [place.removeprefix("/work/") for place in episode.world.places]  # from the setup's on
        walked = self.neighbours is None or all(
            there == here or there in self.neighbours.get(here, ()) for here, there in itertools.pairwise(rooms)
        )
        return float(walked and rooms[-1] == self.goal)

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        if solve:
            for exit_name in self.path:
                yield move(exit_name)
        else:  # wander for about as many steps, then claim to be there
            for _ in range(len(self.path) + int(rng.integers(0, 2))):
                observation = yield move(str(rng.choice(list(EXITS))))
                if self.goal_sign in observation.split():
                    break
        yield f"submit {self.goal_sign}"


class RoomsFamily:
    """A fixed `width` × `height` map per `map_seed`; start/goal pairs are split into train and held-out."""

    newest_revision: ClassVar[int] = 2

    def __init__(self, width: int, height: int, map_seed: int, revision: int = 1):
        count = width * height
        if not (width > 0 and 4 <= count <= len(WORDS)):
            raise ValueError(f"task.rooms: a map of {width} × {height} rooms; it must have 4 to {len(WORDS)} rooms")
        rng = np.random.default_rng([3, map_seed])
        self._signs = [str(word) for word in rng.choice(WORDS, count, replace=False)]
        self._dirs = [f"r{number}" for number in rng.choice(9000, count, replace=False) + 1000]
        self._doors = _doors(width, height, rng)
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        self._neighbours = None
        if check_revision("rooms", revision, self.newest_revision) > 1:
            pairs = [(a, b) for a, b in pairs if b not in self._doors[a].values()]
            self._neighbours = {
                self._dirs[room]: tuple(self._dirs[behind] for behind in doors.values())
                for room, doors in enumerate(self._doors)
            }
        cut = int(len(pairs) * HELDOUT_SHARE)
        self._pairs = {"heldout": pairs[:cut], "train": pairs[cut:]}
        self._files = {f"{d}/sign": f"room {s}\n".encode() for d, s in zip(self._dirs, self._signs, strict=True)}
        self._symlinks = {
            f"{self._dirs[room]}/{name}": f"../{self._dirs[self._doors[room].get(name, room)]}"
            for room in range(count)
            for name in EXITS
        }

    def make(self, split: Split, index: int) -> RoomsTask:
        pairs = self._pairs[split]
        rng = np.random.default_rng([{"train": 4, "heldout": 5}[split], index])
        start, goal = pairs[int(rng.integers(len(pairs)))]
        return RoomsTask(
            name=f"rooms/{split}/{index}",
            prompt=f"room {self._signs[start]} to room {self._signs[goal]}",
            path=shortest_ways(self._doors.__getitem__, start)[goal],
            goal=self._dirs[goal],
            goal_sign=self._signs[goal],
            neighbours=self._neighbours,
            files=self._files,
            symlinks=self._symlinks,
            setup=f"cd {self._dirs[start]}",
        )


def _doors(width: int, height: int, rng: np.random.Generator) -> list[dict[str, int]]:
    """Returns for each room {exit: room behind it}: a random spanning tree and some extra doors."""
    edges = []
    for room in range(width * height):
        x, y = room % width, room // width
        edges += [(room, room + 1, "e", "w")] if x + 1 < width else []
        edges += [(room, room + width, "s", "n")] if y + 1 < height else []
    doors: list[dict[str, int]] = [{} for _ in range(width * height)]
    component = list(range(width * height))
    for i in rng.permutation(len(edges)):
        a, b, there, back = edges[i]
        joins = component[a] != component[b]
        if joins or rng.random() < OPEN_SHARE:
            doors[a][there], doors[b][back] = b, a
            old, new = component[b], component[a]
            component = [new if c == old else c for c in component]
    return doors
