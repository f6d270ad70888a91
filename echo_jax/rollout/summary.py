"""Statistics of a set of rollouts.

In: trajectories. Out: a `Summary` of each, for processes to exchange; and, from all summaries, the metrics under
`rollout/` and `eval/`.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from math import comb

import numpy as np

from echo_jax.render.calls import MALFORMED
from echo_jax.roles import Role
from echo_jax.rollout.episode import Outcome
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.peers import Peers
from echo_jax.tools.sandbox import Status


@dataclasses.dataclass(frozen=True)
class Summary:
    """The data of one rollout that the metrics need."""

    group: int
    environment: str
    scored: bool
    broken: bool  # see `Outcome`
    reward: float
    solved: bool
    turns: int
    tokens: int
    actions: int  # number of action tokens
    imagined: int  # action tokens that spell the header of an observation
    calls: dict[str, int]  # status -> attempts

    @classmethod
    def of(cls, t: Trajectory, header: tuple[int, ...]) -> "Summary":
        """`header`: the ids that start an observation."""
        return cls(
            group=t.group,
            environment=t.environment,
            scored=t.scored,
            broken=t.outcome == Outcome.BROKEN,
            reward=t.reward,
            solved=t.solved,
            turns=t.turns,
            tokens=len(t.ids),
            actions=int((t.role == Role.ACTION).sum()),
            imagined=_imagined(t, header),
            calls=dict(collections.Counter(attempt.status for attempt in t.attempts)),
        )


def summaries(trajectories: Sequence[Trajectory], header: tuple[int, ...], peers: Peers) -> list[Summary]:
    """Returns the summaries of the rollouts of all processes."""
    local = [dataclasses.asdict(Summary.of(t, header)) for t in trajectories]
    return [Summary(**fields) for fields in peers.join(local, "summaries of rollouts")]


def _imagined(t: Trajectory, header: tuple[int, ...]) -> int:
    """Returns how many action tokens spell `header`, which only the environment should write."""
    places = len(t.ids) - len(header) + 1
    if places < 1:
        return 0
    window = np.arange(places)[:, None] + np.arange(len(header))
    action = t.role == Role.ACTION
    return len(header) * int((action[window] & (t.ids[window] == header)).all(axis=1).sum())


PER_ENVIRONMENT = (
    *("submitted", "rejected", "solve_rate", "reward", "mixed_groups", "turns", "tokens", "imagined_observations"),
    "pass_at_",
)  # beginnings of names


def rollout_metrics(
    rollouts: Sequence[Summary], prefix: str, environments: Sequence[str] = (), *, samples: int = 0
) -> dict[str, float]:
    """Returns metrics of a set of rollouts; averages rewards over the scored ones.

    Args:
      environments: the entries of the task mixture. If there are several, each has metrics of its own too.
      samples: rollouts per task, the most for pass@k; 0: none.
    """
    metrics = _metrics(rollouts, samples)
    for environment in environments if len(environments) > 1 else ():
        if members := [r for r in rollouts if r.environment == environment]:
            found = _metrics(members, samples)
            chosen = [name for name in found if name.startswith(PER_ENVIRONMENT)]
            metrics |= {f"{name}_env_{environment}": found[name] for name in chosen}
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def pass_rates(rollouts: Sequence[Summary], k: int) -> list[float]:
    """Returns, for each task with k scored rollouts or more, the chance that one of k solves it, without bias:
    1 - C(n - c, k) / C(n, k), if c of n did (Codex, arXiv 2107.03374, eq. 1)."""
    tasks: dict[int, list[bool]] = {}
    for rollout in rollouts:
        if rollout.scored:
            tasks.setdefault(rollout.group, []).append(rollout.solved)
    return [1.0 - comb(len(s) - sum(s), k) / comb(len(s), k) for s in tasks.values() if len(s) >= k]


def _metrics(rollouts: Sequence[Summary], samples: int) -> dict[str, float]:
    scored = [r.reward for r in rollouts if r.scored]
    statuses = sum((collections.Counter(r.calls) for r in rollouts), collections.Counter())
    groups: dict[int, list[float]] = {}
    for rollout in rollouts:
        if rollout.scored:
            groups.setdefault(rollout.group, []).append(rollout.reward)
    metrics = {
        "turns": float(np.mean([r.turns for r in rollouts])),
        "tokens": float(np.mean([r.tokens for r in rollouts])),
        "imagined_observations": sum(r.imagined for r in rollouts) / max(sum(r.actions for r in rollouts), 1),
        "submitted": len(rollouts),
        "accepted": len(scored),
        "broken": sum(r.broken for r in rollouts),
        "rejected": len(rollouts) - len(scored),  # not scored
    }
    if scored:
        metrics["solve_rate"] = float(np.mean([r.solved for r in rollouts if r.scored]))
        metrics["reward"] = float(np.mean(scored))
        if len(scored) > len(groups):  # else no group has two scores to compare
            metrics["mixed_groups"] = float(np.mean([len(set(rewards)) > 1 for rewards in groups.values()]))
    for k in (2**i for i in range(samples.bit_length())):  # 1, 2, 4, … up to `samples`
        if rates := pass_rates(rollouts, k):
            metrics[f"pass_at_{k}"] = float(np.mean(rates))
    for status in (*Status, *MALFORMED, "submit"):
        metrics[f"calls_{status}"] = statuses[status]
    return metrics


PUBLISHED = ("decode", "prefill", "again", "shared", "evictions")


def engine_metrics(processes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns metrics of what the engines of all processes counted, as `PagedEngine.stats` describes; sums of what
    another engine counts; none without counts."""
    if not all(processes):
        return {}
    total = {name: sum(counts[name] for counts in processes) for name in processes[0]}
    if not {*PUBLISHED, "peak_pages"} <= total.keys():
        return {f"engine/{name}": count for name, count in total.items()}
    idle = {name: count for name, count in total.items() if name.startswith("idle_")}
    rows = total["decode"] + sum(idle.values())
    return {
        "engine/rows_idle": sum(idle.values()) / max(rows, 1),
        **{f"engine/rows_{name}": count / max(rows, 1) for name, count in idle.items()},
        **{f"engine/{name}": total[name] for name in PUBLISHED},
        "engine/pages": max(counts["peak_pages"] for counts in processes),
    }
