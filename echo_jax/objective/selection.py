"""Which observation tokens are trained, and how much each counts before normalisation: the paper's O'.

In: all trajectories of an update. Out: for each a weight per token. Every rule only takes away; none looks at a model.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from echo_jax.objective.advantages import Pool, alone
from echo_jax.render.calls import MALFORMED
from echo_jax.roles import ENVIRONMENT_CLASSES, Role
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system import named
from echo_jax.system.errors import UserError

# (trajectory, bool [T] of its tokens that would be trained) -> bool [T] of those that are.
ObservationFilter = Callable[[Trajectory, np.ndarray], np.ndarray]


class SelectionError(UserError, ValueError):
    """A rule cannot be applied to these trajectories."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rules; the defaults are the paper's (arXiv 2605.24517): every body token, nothing else."""

    class_weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"body": 1.0})
    tool_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # a tool that is not named has 1
    keep: ObservationFilter | None = None  # the user's own, see `find_filter`
    top_entropy: float = 1.0  # share of the turns, by the mean entropy of their actions, whose observations are trained
    dedupe: bool = False  # an observation repeated within a group is trained once


def select(
    trajectories: Sequence[Trajectory], selection: Selection, kept: np.ndarray, pool: Pool = alone
) -> list[np.ndarray]:
    """Returns f32 [T] >= 0 for each trajectory; zeros for those not `kept` (bool [R]), which decide nothing for others.

    `pool`: where the trajectories are one process's share of an update.

    Raises:
      SelectionError: a rule needs what was not recorded, or the user's filter returns something else than a mask.
    """
    weights = [_class_and_tool(t, selection) * own for t, own in zip(trajectories, kept, strict=True)]
    if selection.keep is not None:
        for t, weight in zip(trajectories, weights, strict=True):
            weight *= _filtered(t, weight > 0, selection.keep)
    if selection.top_entropy < 1.0:
        _keep_after_uncertain_turns(trajectories, weights, kept, selection.top_entropy, pool)
    if selection.dedupe:
        _train_repetitions_once(trajectories, weights, pool)
    return weights


def find_filter(name: str, options: Mapping[str, Any]) -> ObservationFilter | None:
    """Returns the function that "module:function" names, with its options as keyword arguments; None for an empty name.

    Raises:
      ConfigError: there is none, or it does not take these options.
    """
    if not name:
        return None
    field = "loss.observation_filter"
    found = named.find(name, {}, field)
    named.check_callable(found, name, field)
    named.check_options(found, options, f"{field}_options", given=2)
    return functools.partial(found, **options) if options else found


def parsed_well(trajectory: Trajectory, *, min_valid_calls: float, clean: bool) -> bool:
    """Whether a rollout is of the quality asked for: the share of its attempts that a tool took (or a submission), and,
    if `clean`, no turn that was cut off and no call left open."""
    calls = trajectory.calls
    invalid = sum(calls.get(status, 0) for status in MALFORMED)
    valid = (len(trajectory.attempts) - invalid) / max(len(trajectory.attempts), 1)
    return valid >= min_valid_calls and not (clean and "unclosed" in calls)


def turn_of(trajectory: Trajectory) -> np.ndarray:
    """Returns int [T]: the number of the turn that each token belongs to or follows, from 1; 0 before the first."""
    action = trajectory.role == Role.ACTION
    return np.cumsum(action & ~np.concatenate([[False], action[:-1]]))


def _class_and_tool(trajectory: Trajectory, selection: Selection) -> np.ndarray:
    by_role = np.zeros(len(Role), np.float32)
    for name, weight in selection.class_weights.items():
        by_role[ENVIRONMENT_CLASSES[name]] = weight
    by_tool = np.asarray([1.0, *(selection.tool_weights.get(name, 1.0) for name in trajectory.tools)], np.float32)
    return by_role[trajectory.role] * by_tool[trajectory.tool]


def _filtered(trajectory: Trajectory, mask: np.ndarray, keep: ObservationFilter) -> np.ndarray:
    kept = keep(trajectory, mask.copy())
    if not isinstance(kept, np.ndarray) or kept.dtype != bool or kept.shape != mask.shape:
        got = f"{kept.dtype} {kept.shape}" if isinstance(kept, np.ndarray) else type(kept).__name__
        raise SelectionError(
            f"the observation filter returned {got} for {trajectory.task}; it must be bool {mask.shape}"
        )
    if (kept & ~mask).any():
        raise SelectionError(f"the observation filter selects more than it was given, for {trajectory.task}")
    return kept


def _keep_after_uncertain_turns(trajectories, weights, kept, share: float, pool: Pool) -> None:
    """Keeps observations after the actions of highest mean entropy, `share` of all turns and what equals the last of
    them (PaW, arXiv 2606.02388)."""
    turns = [turn_of(t) for t in trajectories]
    entropies = {}
    for i, (t, turn) in enumerate(zip(trajectories, turns, strict=True)):
        if not kept[i]:
            continue
        action = t.role == Role.ACTION
        if np.isnan(t.entropy[action]).any():
            raise SelectionError(
                f"selection by entropy needs the sampler's entropies, and {t.task} has none: it was written by a "
                "script or saved without them; set loss.top_entropy = 1.0"
            )
        for k in range(1, turn[-1] + 1):
            entropies[i, k] = float(t.entropy[action & (turn == k)].mean())
    everywhere = sorted(pool(list(entropies.values())), reverse=True)
    if not everywhere:
        return
    threshold = everywhere[math.ceil(share * len(everywhere)) - 1]
    for (i, k), entropy in entropies.items():
        if entropy < threshold:
            weights[i][turns[i] == k] = 0.0


def _train_repetitions_once(trajectories, weights, pool: Pool) -> None:
    """Of the same observation in a group, the first is trained: in the order of rollouts, then of turns."""
    found = []  # [group, rollout, branch and turn, digest] and where it is
    for i, t in enumerate(trajectories):
        turn = turn_of(t)
        for k in range(turn[-1] + 1):
            own = (turn == k) & (weights[i] > 0)
            own[: t.shared] = False  # trained in another branch, where it is seen
            if own.any():
                digest = hashlib.sha256(t.ids[own].tobytes() + t.tool[own].tobytes()).hexdigest()
                found.append(([t.group, t.rollout, t.shared, k, digest], (i, own)))
    first: dict[tuple, list] = {}
    for entry in sorted(pool([entry for entry, _ in found])):
        first.setdefault((entry[0], entry[-1]), entry)
    for entry, (i, own) in found:
        if first[entry[0], entry[-1]] == entry:
            first[entry[0], entry[-1]] = []  # trained here; not in another with the same place, as a replay may have
        else:
            weights[i][own] = 0.0
