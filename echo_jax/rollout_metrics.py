"""What a set of rollouts looks like, in numbers.

In: trajectories. Out: the metrics under `rollout/` and `eval/`.
"""

import collections
from collections.abc import Sequence

import numpy as np

from echo_jax.calls import MALFORMED
from echo_jax.roles import Role
from echo_jax.tools.sandbox import Status
from echo_jax.trajectory import Trajectory


def imagined_observations(trajectories: Sequence[Trajectory], header: tuple[int, ...]) -> float:
    """Returns the share of action tokens that spell the header of an observation: the policy writes what only the
    environment should."""
    actions = imitated = 0
    for t in trajectories:
        action = t.role == Role.ACTION
        actions += int(action.sum())
        places = len(t.ids) - len(header) + 1
        if places > 0:
            window = np.arange(places)[:, None] + np.arange(len(header))
            imitated += len(header) * int((action[window] & (t.ids[window] == header)).all(axis=1).sum())
    return imitated / max(actions, 1)


def rollout_metrics(trajectories: Sequence[Trajectory], prefix: str, header: tuple[int, ...]) -> dict[str, float]:
    """Returns what a set of rollouts looks like; rewards are averaged over those that were scored. `header`: the ids
    that an observation begins with."""
    scored = [t.reward for t in trajectories if t.scored]
    statuses = collections.Counter(attempt.status for t in trajectories for attempt in t.attempts)
    groups: dict[int, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.scored:
            groups.setdefault(trajectory.group, []).append(trajectory.reward)
    metrics = {
        "turns": float(np.mean([t.turns for t in trajectories])),
        "tokens": float(np.mean([len(t.ids) for t in trajectories])),
        "submitted": len(trajectories),
        "accepted": len(scored),
        "rejected": len(trajectories) - len(scored),  # faults of the machine
        "imagined_observations": imagined_observations(trajectories, header),
    }
    if scored:
        metrics["solve_rate"] = float(np.mean([reward >= 1.0 for reward in scored]))
        metrics["reward"] = float(np.mean(scored))
        if len(scored) > len(groups):  # else no group has two to compare
            metrics["mixed_groups"] = float(np.mean([len(set(rewards)) > 1 for rewards in groups.values()]))
    for status in (*Status, *MALFORMED, "submit"):
        metrics[f"calls_{status}"] = statuses[status]
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
