"""Shortest paths on a map, for the tasks in which the agent walks."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Place = TypeVar("Place", bound=Hashable)


def shortest_ways(exits: Callable[[Place], Mapping[str, Place]], start: Place) -> dict[Place, tuple[str, ...]]:
    """Returns the names of the exits on a shortest path to each reachable place; among equally short paths, the one
    with the earlier exits. `exits`: place -> {name: place behind it}."""
    ways: dict[Place, tuple[str, ...]] = {start: ()}
    queue = [start]
    for place in queue:
        for name, behind in exits(place).items():
            if behind not in ways:
                ways[behind] = (*ways[place], name)
                queue.append(behind)
    return ways
