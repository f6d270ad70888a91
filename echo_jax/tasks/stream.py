"""The order of tasks: a pure function of the split, the seed and a global index, so a run resumes at any step."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain

from echo_jax.config import FIRST_SPARE, TASKS_PER_SEED, environments
from echo_jax.system import named, user_code
from echo_jax.system.errors import ConfigError
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.task import Family, Split, Task


def make_families(mixture: Mapping[str, float], sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Family]:
    """Returns {entry: its family} for the entries of a mixture.

    Args:
      mixture: entry -> weight.
      sections: entry -> the parameters of its family. `family` names it: "module:Class" or a key of FAMILIES; without
        `family`, the entry's name does. The `revision` 0 of a built-in family is its newest.

    Raises:
      ConfigError: a family does not exist, no weight is above 0, or a family does not take its parameters.
    """
    if not mixture:
        raise ConfigError(f"config.task.mixture is empty; choose from {', '.join(FAMILIES)}")
    if min(mixture.values()) < 0 or not 0 < sum(mixture.values()) < math.inf:
        raise ConfigError(
            f"config.task.mixture = {dict(mixture)}: no weight may be negative, and at least one must be above 0"
        )
    families = {}
    for name in mixture:
        parameters = dict(sections.get(name, {}))
        family = parameters.pop("family", name)
        field = f"task.{name}.family" if family != name else "task.mixture"
        make = named.find(family, FAMILIES, field)
        named.check_callable(make, family, field)
        named.check_options(make, parameters, f"task.{name}")
        if family in FAMILIES and parameters.get("revision") == 0:
            parameters["revision"] = make.newest_revision
        try:
            families[name] = make(**parameters)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not hasattr(families[name], "make"):
            raise ConfigError(f"config.{field} = {family!r} has no method make(split, index), which a family needs")
    return families


def task_stream(
    mixture: Mapping[str, float], families: Mapping[str, Family], *, split: Split, seed: int
) -> grain.MapDataset:
    """Returns an endless random-access dataset of tasks, the families interleaved by weight.

    Held-out tasks are the same for every seed.
    """
    first = seed * TASKS_PER_SEED if split == "train" else 0
    return _mixed(mixture, lambda name: functools.partial(_make, name, families[name], split, first))


def spare_tasks(families: Mapping[str, Family], *, seed: int) -> Callable[[str, int], Task]:
    """Returns (entry, index) -> a train task of this entry that the first FIRST_SPARE tasks of `task_stream` never
    are."""
    first = seed * TASKS_PER_SEED + FIRST_SPARE
    return lambda entry, index: _make(entry, families[entry], "train", first, index)


def environment_stream(mixture: Mapping[str, float]) -> grain.MapDataset:
    """Returns, at each index of `task_stream`, the entry of the mixture that the task comes from."""
    return _mixed(mixture, lambda name: lambda _: name)


def _mixed(mixture: Mapping[str, float], make: Callable[[str], Callable[[int], Any]]) -> grain.MapDataset:
    names = environments(mixture)
    streams = [grain.MapDataset.range(TASKS_PER_SEED).map(make(name)) for name in names]
    return grain.MapDataset.mix(streams, [mixture[name] for name in names]) if len(names) > 1 else streams[0]


def _make(name: str, family: Family, split: Split, first: int, index: int) -> Task:
    index = first + int(index)
    with user_code.calling(f"environment {name}: make({split!r}, {index})"):
        return family.make(split, index)
