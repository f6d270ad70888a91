"""Which observation tokens are trained, and their weights before normalisation: the paper's O'.

In: all trajectories of an update. Out: a weight per token for each. Every rule only removes tokens, and none runs a
model.
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
from echo_jax.system import named, user_code
from echo_jax.system.errors import UserError

# (trajectory, bool [T] of the tokens to be trained) -> bool [T] of those that remain.
ObservationFilter = Callable[[Trajectory, np.ndarray], np.ndarray]


class SelectionError(UserError, ValueError):
    """A rule cannot be applied to these trajectories."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rules; the defaults are the paper's (arXiv 2605.24517): every body token, nothing else."""

    class_weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"body": 1.0})
    tool_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # default 1 per tool
    keep: ObservationFilter | None = None  # the user's filter, see `find_filter`
    top_entropy: float = 1.0  # share of turns, those of highest mean action entropy, whose observations are trained
    dedupe: bool = False  # train an observation only once if it repeats within a group


def select(
    trajectories: Sequence[Trajectory], selection: Selection, included: np.ndarray, pool: Pool = alone
) -> list[np.ndarray]:
    """Returns f32 [T] >= 0 for each trajectory; zeros for those not `included` (bool [R]), which the rules ignore.

    `pool`: joins the processes if each has a share of the update.

    Raises:
      SelectionError: a rule needs data that was not recorded, or the user's filter does not return a mask.
    """
    weights = [_class_and_tool(t, selection) * keep for t, keep in zip(trajectories, included, strict=True)]
    if selection.keep is not None:
        for t, weight in zip(trajectories, weights, strict=True):
            weight *= _filtered(t, weight > 0, selection.keep)
    if selection.top_entropy < 1.0:
        _keep_after_uncertain_turns(trajectories, weights, included, selection.top_entropy, pool)
    if selection.dedupe:
        _train_repetitions_once(trajectories, weights, pool)
    return weights


def find_filter(name: str, options: Mapping[str, Any]) -> ObservationFilter | None:
    """Returns the function that "module:function" names, with its options as keyword arguments; None for an empty name.

    Raises:
      ConfigError: the function does not exist, or does not take these options.
    """
    if not name:
        return None
    field = "loss.observation_filter"
    found = named.find(name, {}, field)
    named.check_callable(found, name, field)
    named.check_options(found, options, f"{field}_options", given=2)
    return functools.partial(found, **options) if options else found


def parsed_well(trajectory: Trajectory, *, min_valid_calls: float, clean: bool) -> bool:
    """Returns whether at least the share `min_valid_calls` of a rollout's attempts were valid (a tool ran them, or they
    submitted) and, if `clean`, whether no turn was cut off and no call left open."""
    calls = trajectory.calls
    invalid = sum(calls.get(status, 0) for status in MALFORMED)
    valid = (len(trajectory.attempts) - invalid) / max(len(trajectory.attempts), 1)
    return valid >= min_valid_calls and not (clean and "unclosed" in calls)


def turn_of(trajectory: Trajectory) -> np.ndarray:
    """Returns int [T]: the turn, from 1, that each token belongs to or follows; 0 before the first turn."""
    action = trajectory.role == Role.ACTION
    return np.cumsum(action & ~np.concatenate([[False], action[:-1]]))


def _class_and_tool(trajectory: Trajectory, selection: Selection) -> np.ndarray:
    by_role = np.zeros(len(Role), np.float32)
    for name, weight in selection.class_weights.items():
        by_role[ENVIRONMENT_CLASSES[name]] = weight
    by_tool = np.asarray([1.0, *(selection.tool_weights.get(name, 1.0) for name in trajectory.tools)], np.float32)
    return by_role[trajectory.role] * by_tool[trajectory.tool]


def _filtered(trajectory: Trajectory, mask: np.ndarray, keep: ObservationFilter) -> np.ndarray:
    with user_code.calling(f"the observation filter {named.name_of(keep)} on a rollout of task {trajectory.task}"):
        narrowed = keep(trajectory, mask.copy())
    if not isinstance(narrowed, np.ndarray) or narrowed.dtype != bool or narrowed.shape != mask.shape:
        got = f"{narrowed.dtype} {narrowed.shape}" if isinstance(narrowed, np.ndarray) else type(narrowed).__name__
        raise SelectionError(
            f"the observation filter returned {got} for {trajectory.task}; it must be bool {mask.shape}"
        )
    if (narrowed & ~mask).any():
        raise SelectionError(
            f"the observation filter returned tokens outside its mask for {trajectory.task}; it may only remove tokens"
        )
    return narrowed


def _keep_after_uncertain_turns(trajectories, weights, included, share: float, pool: Pool) -> None:
    """Keeps observations after the `share` of all turns whose actions have the highest mean entropy, ties at the
    threshold included (PaW, arXiv 2606.02388)."""
    turns = [turn_of(t) for t in trajectories]
    entropies = {}
    for i, (t, turn) in enumerate(zip(trajectories, turns, strict=True)):
        if not included[i]:
            continue
        action = t.role == Role.ACTION
        if np.isnan(t.entropy[action]).any():
            raise SelectionError(
                f"selection by entropy needs the sampler's entropies, but {t.task} has none: it was written by a "
                "script or saved without them; set loss.top_entropy = 1.0"
            )
        for k in range(1, turn[-1] + 1):
            entropies[i, k] = float(t.entropy[action & (turn == k)].mean())
    all_entropies = sorted(pool(list(entropies.values())), reverse=True)
    if not all_entropies:
        return
    threshold = all_entropies[math.ceil(share * len(all_entropies)) - 1]
    for (i, k), entropy in entropies.items():
        if entropy < threshold:
            weights[i][turns[i] == k] = 0.0


def _train_repetitions_once(trajectories, weights, pool: Pool) -> None:
    """Trains only the first of equal observations in a group, in the order of rollouts, then of turns."""
    found = []  # ([group, rollout, shared tokens, turn, digest], (trajectory, mask))
    for i, t in enumerate(trajectories):
        turn = turn_of(t)
        for k in range(turn[-1] + 1):
            tokens = (turn == k) & (weights[i] > 0)
            tokens[: t.shared] = False  # an earlier branch already trains these
            if tokens.any():
                digest = hashlib.sha256(t.ids[tokens].tobytes() + t.tool[tokens].tobytes()).hexdigest()
                found.append(([t.group, t.rollout, t.shared, k, digest], (i, tokens)))
    first: dict[tuple, list] = {}
    for entry in sorted(pool([entry for entry, _ in found])):
        first.setdefault((entry[0], entry[-1]), entry)
    for entry, (i, tokens) in found:
        if first[entry[0], entry[-1]] == entry:
            first[entry[0], entry[-1]] = []  # train this one, but no later duplicate with the same key, as in a replay
        else:
            weights[i][tokens] = 0.0
