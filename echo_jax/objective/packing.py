"""Packs trajectories into rows, first-fit decreasing. The only shift by one is here: afterwards every field describes
the predicted token.

In: trajectories and their weights. Out: a `Batch` of numpy arrays of one fixed shape.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from echo_jax.objective import batch as batch_lib
from echo_jax.objective.batch import Batch
from echo_jax.objective.weights import TokenWeights
from echo_jax.rollout.trajectory import Trajectory, renumbered


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch and the number of its micro-batches in use."""

    batch: Batch  # [M, B, T], M the fixed capacity
    micro_batches: int  # those in use; the step loops over these only


def capacity(trajectories: int, max_tokens: int, *, rows: int, length: int) -> int:
    """Returns the number of micro-batches that suffice for `trajectories` trajectories of at most `max_tokens` each.

    First fit leaves at most one row less than half full, so two rows always hold more than one row's worth. This bound
    keeps the shape of the batch, and with it the compiled step, the same for a whole run.
    """
    worst_rows = min(trajectories, 2 * trajectories * max_tokens // length + 1)
    return -(-worst_rows // rows)


def first_fit(units: Sequence[Sequence[int]], length: int, rows: int) -> list[list[tuple[int, int]]]:
    """Returns rows of (unit, member), for each of them in order; every `rows` rows are a micro-batch.

    Puts each member, longest first, into the first row where it fits. The members of a unit of several go into one
    micro-batch, the first where all of them fit.

    Args:
      units: the sizes of each unit's members, at most `length` each.

    Raises:
      ValueError: a unit needs more than a micro-batch.
    """
    layout: list[list[tuple[int, int]]] = []
    free: list[int] = []

    def places(sizes: Sequence[int], first: int, last: float) -> list[int] | None:
        """Returns a row from `first` to before `last` for each size, in order; None if they do not all fit."""
        space, found = free[:], []
        for size in sizes:
            row = next((r for r in range(first, len(space)) if space[r] >= size), max(first, len(space)))
            if row >= last:
                return None
            space += [length] * (row + 1 - len(space))
            space[row] -= size
            found.append(row)
        return found

    for unit in sorted(range(len(units)), key=lambda unit: -max(units[unit])):
        members = sorted(range(len(units[unit])), key=lambda member: -units[unit][member])
        sizes = [units[unit][member] for member in members]
        if len(sizes) == 1:
            found = places(sizes, 0, math.inf)
        else:
            micro_batches = range(0, len(free) + rows, rows)
            found = next(filter(None, (places(sizes, first, first + rows) for first in micro_batches)), None)
        if found is None:
            raise ValueError(
                f"a rollout's {len(sizes)} branches of {sum(sizes)} tokens need more than the {rows} rows of {length} "
                "tokens of a micro-batch, which they must share: raise pack.rows or pack.length"
            )
        for member, size, row in zip(members, sizes, found, strict=True):
            while row >= len(free):
                layout.append([])
                free.append(length)
            layout[row].append((unit, member))
            free[row] -= size
    return layout


def pack(
    trajectories: Sequence[Trajectory],
    weights: Sequence[TokenWeights],
    *,
    length: int,
    rows: int,
    micro_batches: int,
    tools: Sequence[str] = (),
    first_row: int = 0,
) -> Packed:
    """Packs trajectories into `micro_batches` × `rows` rows of `length` predicted tokens.

    A trajectory of n tokens fills n - 1 slots of one row (its first token is never predicted); none is cut or dropped.
    The branches of a rollout share a micro-batch.

    Args:
      tools: the names that `Batch.tool` numbers from 1.
      first_row: rows of a micro-batch that other processes pack before these.

    Raises:
      ValueError: a trajectory has fewer than two tokens or more than a row holds, a rollout needs more than a
        micro-batch, or the batch is too small for all.
    """
    sizes = [len(t.ids) - 1 for t in trajectories]
    for trajectory, size in zip(trajectories, sizes, strict=True):
        if not 1 <= size <= length:
            raise ValueError(
                f"trajectory of task {trajectory.task} has {size + 1} tokens; "
                f"a row of pack.length = {length} takes 2 to {length + 1}"
            )
    rollouts: dict[tuple[int, int], list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        rollouts.setdefault((trajectory.group, trajectory.rollout), []).append(i)
    units = list(rollouts.values())
    layout = first_fit([[sizes[i] for i in unit] for unit in units], length, rows)
    if len(layout) > micro_batches * rows:
        raise ValueError(
            f"{len(trajectories)} trajectories need {len(layout)} rows of {length} tokens, but the batch has "
            f"{micro_batches} × {rows}"
        )
    batch = batch_lib.empty(micro_batches, rows, length)
    numbers: dict[int, int] = {}  # unit -> number of its rollout: one plus its first slot in the micro-batch
    for row, members in enumerate(layout):
        start = 0
        micro, row_of_micro = divmod(row, rows)
        for segment, (unit, member) in enumerate(members, start=1):
            i = units[unit][member]
            at = (micro, row_of_micro, slice(start, start + sizes[i]))
            _place(batch, at, segment, trajectories[i], weights[i], tools)
            batch.rollout[at] = numbers.setdefault(unit, 1 + (first_row + row_of_micro) * length + start)
            start += sizes[i]
    return Packed(batch, micro_batches=-(-len(layout) // rows))


def _place(
    batch: Batch, at: tuple, segment: int, trajectory: Trajectory, weights: TokenWeights, tools: Sequence[str]
) -> None:
    batch.tokens[at] = trajectory.ids[:-1]
    batch.targets[at] = trajectory.ids[1:]
    batch.segment_ids[at] = segment
    batch.positions[at] = np.arange(len(trajectory.ids) - 1)
    batch.role[at] = trajectory.role[1:]
    batch.tool[at] = renumbered(trajectory, tools)[1:]
    batch.sampler_logprob[at] = batch.old_logprob[at] = trajectory.logprob[1:]
    for name, values in vars(weights).items():
        if name != "denominators":
            getattr(batch, name)[at] = values[1:]
    for term, parts in weights.denominators.items():
        batch.denominators[term][at] = parts[1:]
