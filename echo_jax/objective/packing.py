"""Packs trajectories into rows, first-fit decreasing. The only shift by one is here: afterwards every field describes
the predicted token.

In: trajectories and their weights. Out: a `Batch` of numpy arrays of one fixed shape.
"""

import dataclasses
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


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Returns rows of indices; puts each size, longest first, into the first row where it fits."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, space in enumerate(free) if space >= sizes[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(length)
        rows[row].append(i)
        free[row] -= sizes[i]
    return rows


def pack(
    trajectories: Sequence[Trajectory],
    weights: Sequence[TokenWeights],
    *,
    length: int,
    rows: int,
    micro_batches: int,
    tools: Sequence[str] = (),
) -> Packed:
    """Packs trajectories into `micro_batches` × `rows` rows of `length` predicted tokens.

    A trajectory of n tokens fills n - 1 slots of one row (its first token is never predicted); none is cut or dropped.
    `tools`: the names that `Batch.tool` numbers from 1.

    Raises:
      ValueError: a trajectory has fewer than two tokens or more than a row holds, or the batch is too small for all.
    """
    sizes = [len(t.ids) - 1 for t in trajectories]
    for trajectory, size in zip(trajectories, sizes, strict=True):
        if not 1 <= size <= length:
            raise ValueError(
                f"trajectory of task {trajectory.task} has {size + 1} tokens; "
                f"a row of pack.length = {length} takes 2 to {length + 1}"
            )
    layout = first_fit(sizes, length)
    if len(layout) > micro_batches * rows:
        raise ValueError(
            f"{len(trajectories)} trajectories need {len(layout)} rows of {length} tokens, but the batch has "
            f"{micro_batches} × {rows}"
        )
    batch = batch_lib.empty(micro_batches, rows, length)
    for row, members in enumerate(layout):
        start = 0
        for segment, i in enumerate(members, start=1):
            at = (*divmod(row, rows), slice(start, start + sizes[i]))
            _place(batch, at, segment, trajectories[i], weights[i], tools)
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
        getattr(batch, name)[at] = values[1:]
