"""How well a policy predicts tool output: cross-entropy of observations in given trajectories.

In: parameters and trajectories from any source. Out: cross-entropy, accuracy and count of tokens per class and per
tool. On transcripts of another policy this is the world-model evaluation of ECHO (arXiv 2605.24517,
fig. 3).
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from echo_jax.learner.learner import Learner
from echo_jax.learner.step import make_score
from echo_jax.objective import packing
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.loss import add_sums, finish_metrics
from echo_jax.objective.selection import turn_of
from echo_jax.objective.weights import Objective, weigh
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import DTYPES, Trajectory, TrajectoryError
from echo_jax.system.peers import Peers

AT_ONCE = 512  # trajectories packed together


class Scorer:
    """Scores trajectories under given parameters."""

    def __init__(self, learner: Learner, peers: Peers):
        self.longest = learner.config.pack.length + 1  # tokens of the longest trajectory that can be scored
        self._learner, self._peers = learner, peers
        every_class = dataclasses.replace(learner.head_options(), score_all=True)
        self._score = make_score(learner.graphdef, learner.mesh, every_class, learner.tools)

    def __call__(self, params, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Returns {"ce": nats per token, "accuracy", "tokens"} of the bodies; names with a suffix are for other classes
        (`ce_truncation`) or for the bodies that one tool wrote (`ce_tool_bash`). All processes of a run pass the same
        trajectories, and each scores its share.

        Raises:
          TrajectoryError: no trajectory has a token that a tool wrote, or one is longer than a packed row.
        """
        sums = None
        for start in range(0, len(trajectories), AT_ONCE):
            for micro in self._micro_batches(trajectories[start : start + AT_ONCE]):
                more = self._score(params, micro)
                sums = more if sums is None else add_sums(sums, more)
        metrics = finish_metrics(sums) if sums is not None else {}
        if "observation/ce" not in metrics:
            raise TrajectoryError(
                f"nothing to score: none of {len(trajectories)} trajectories has a token that a tool wrote"
            )
        found = {name.removeprefix("observation/"): value for name, value in metrics.items()}
        return {name: value for name, value in found.items() if name.startswith(("ce", "accuracy", "tokens"))}

    def _micro_batches(self, trajectories: Sequence[Trajectory]):
        learner, peers = self._learner, self._peers
        rows, length = learner.own_rows, learner.config.pack.length
        longest = max(len(t.ids) for t in trajectories)
        if longest > self.longest:
            raise TrajectoryError(
                f"a trajectory has {longest} tokens; a row of config.pack.length = {length} takes {self.longest}"
            )
        share = peers.share(trajectories)
        weights = weigh(share, np.zeros(len(share)), Objective(observation_weight=1.0, temperature=1.0))
        most = packing.capacity(learner.share(len(trajectories)), longest, rows=rows, length=length)
        packed = packing.pack(share, weights, length=length, rows=rows, micro_batches=most, tools=learner.tools)
        for i in range(max(peers.gather(packed.micro_batches, "packed trajectories"))):
            micro = to_mesh(jax.tree.map(lambda x, i=i: x[i : i + 1], packed.batch), learner.mesh)
            yield jax.tree.map(lambda x: x[0], micro)


def compare(score: Scorer, params, trajectories: Sequence[Trajectory], seed: int) -> dict[str, float]:
    """Returns `eval/observation_…` of saved trajectories and three further readings of it.

    `_shuffled`: after exchanging the actions of each turn between trajectories, so that they do not predict what
    follows. That hurts a model of the world, but not a model of typical outputs. `_shuffled_gap`: the increase, over
    the same tokens (trajectories that the exchange makes too long are left out of both). `_train`, `_heldout` and
    `_gap` (held-out minus train): by the split in the tasks' names, if both splits occur.
    """
    metrics = {f"eval/observation_{name}": value for name, value in score(params, trajectories).items()}
    pairs = zip(trajectories, shuffle_actions(trajectories, seed), strict=True)
    fitting = [pair for pair in pairs if len(pair[1].ids) <= score.longest]
    if fitting:
        original, shuffled = (score(params, side)["ce"] for side in zip(*fitting, strict=True))
        metrics |= {"eval/observation_ce_shuffled": shuffled, "eval/observation_ce_shuffled_gap": shuffled - original}
    by_split: dict[str, list[Trajectory]] = {"train": [], "heldout": []}
    for trajectory in trajectories:
        for split, members in by_split.items():
            if f"/{split}/" in trajectory.task and np.isin(trajectory.role[1:], Role.OBSERVATION).any():
                members.append(trajectory)
    if all(by_split.values()):
        ce = {split: score(params, members)["ce"] for split, members in by_split.items()}
        metrics |= {f"eval/observation_ce_{split}": value for split, value in ce.items()}
        metrics["eval/observation_ce_gap"] = ce["heldout"] - ce["train"]
    return metrics


def shuffle_actions(trajectories: Sequence[Trajectory], seed: int) -> list[Trajectory]:
    """Returns the trajectories with the actions of turn k taken from turn k of another trajectory, if another has such
    a turn. Everything else stays, so the same observations are scored."""
    rng = np.random.default_rng(seed)
    turns = [turn_of(t) for t in trajectories]
    donors: dict[tuple[int, int], tuple[int, int]] = {}  # (trajectory, turn) -> where its actions come from
    for k in range(1, max((turn[-1] for turn in turns), default=0) + 1):
        members = rng.permutation([i for i, turn in enumerate(turns) if turn[-1] >= k]).tolist()
        donors |= {(i, k): (other, k) for i, other in zip(members, members[1:] + members[:1], strict=True)}
    action_of = lambda i, k: (turns[i] == k) & (trajectories[i].role == Role.ACTION)  # noqa: E731
    shuffled = []
    for i, t in enumerate(trajectories):
        pieces = [(t, turns[i] == 0)]
        for k in range(1, turns[i][-1] + 1):
            other, turn = donors[i, k]
            pieces += [(trajectories[other], action_of(other, turn)), (t, (turns[i] == k) & (t.role != Role.ACTION))]
        arrays = {name: np.concatenate([getattr(source, name)[mask] for source, mask in pieces]) for name in DTYPES}
        shuffled.append(dataclasses.replace(t, **arrays))
    return shuffled
