"""Which task comes when: a pure function of the split, the seed and a global index, so a run resumes at any step."""

import math
from collections.abc import Mapping

import grain

from echo_jax.tasks import FAMILIES
from echo_jax.tasks.task import Family, Split

TASKS_PER_SEED = 10**9  # train tasks of seed s have the indices from s × this; no two seeds share one


def make_families(names: Mapping[str, float], parameters: Mapping[str, Mapping]) -> dict[str, Family]:
    """Returns the named families. `parameters`: {family: {field: value}}.

    Raises:
      ValueError: a name is unknown, no weight is above 0, or a family cannot be made with its parameters.
    """
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown or not names:
        raise ValueError(f"task.mixture names {unknown or 'no family'}; choose from {', '.join(FAMILIES)}")
    if min(names.values()) < 0 or not 0 < sum(names.values()) < math.inf:
        raise ValueError(f"task.mixture = {dict(names)}: weights must not be negative, and one must be above 0")
    return {name: FAMILIES[name](**parameters.get(name, {})) for name in names}


def task_stream(
    mixture: Mapping[str, float], families: Mapping[str, Family], *, split: Split, seed: int
) -> grain.MapDataset:
    """Returns an endless random-access dataset of tasks, the families interleaved by weight.

    Held-out tasks are the same for every seed.
    """
    first = seed * TASKS_PER_SEED if split == "train" else 0
    names = sorted(name for name, weight in mixture.items() if weight > 0)
    streams = [
        grain.MapDataset.range(TASKS_PER_SEED).map(lambda i, make=families[name].make: make(split, first + int(i)))
        for name in names
    ]
    return grain.MapDataset.mix(streams, [mixture[name] for name in names]) if len(names) > 1 else streams[0]
