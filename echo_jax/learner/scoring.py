"""How well a policy predicts what the tools write: cross-entropy of observations in given trajectories.

In: parameters and trajectories, whoever made them. Out: cross-entropy, accuracy and count of tokens per class and per
tool. Where the transcripts come from another policy this is the world-model evaluation of ECHO (arXiv 2605.24517,
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
    """Scores trajectories under the parameters that it is given."""

    def __init__(self, learner: Learner, peers: Peers):
        self.longest = learner.config.pack.length + 1  # tokens of a trajectory that can be scored
        self._learner, self._peers = learner, peers
        every_class = dataclasses.replace(learner.head_options(), score_all=True)
        self._score = make_score(learner.graphdef, learner.mesh, every_class, learner.tools)

    def __call__(self, params, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Returns {"ce": nats a token, "accuracy", "tokens"} of the bodies; with a suffix, of other classes
        (`ce_truncation`) and of the bodies that one tool wrote (`ce_tool_bash`). All processes of a run give the same
        trajectories, and each scores its share.

        Raises:
          TrajectoryError: none has a token that a tool wrote, or one is longer than a packed row.
        """
        sums = None
        for start in range(0, len(trajectories), AT_ONCE):
            for micro in self._micro_batches(trajectories[start : start + AT_ONCE]):
                more = self._score(params, micro)
                sums = more if sums is None else add_sums(sums, more)
        metrics = finish_metrics(sums) if sums is not None else {}
        if "observation/ce" not in metrics:
            raise TrajectoryError(f"{len(trajectories)} trajectories have no token that a tool wrote: nothing to score")
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
        own = peers.share(trajectories)
        weights = weigh(own, np.zeros(len(own)), Objective(observation_weight=1.0, temperature=1.0))
        most = packing.capacity(learner.share(len(trajectories)), longest, rows=rows, length=length)
        packed = packing.pack(own, weights, length=length, rows=rows, micro_batches=most, tools=learner.tools)
        for i in range(max(peers.gather(packed.micro_batches, "packed trajectories"))):
            micro = to_mesh(jax.tree.map(lambda x, i=i: x[i : i + 1], packed.batch), learner.mesh)
            yield jax.tree.map(lambda x: x[0], micro)


def compare(score: Scorer, params, trajectories: Sequence[Trajectory], seed: int) -> dict[str, float]:
    """Returns `eval/observation_…` of saved trajectories and three readings of it.

    `_shuffled`: the actions of each turn exchanged between trajectories, so that they say nothing of what follows; a
    model of the world loses by it, a model of typical outputs does not. `_shuffled_gap` is the loss, over the same
    tokens (a trajectory that gets too long by the exchange is left out of both). `_train`, `_heldout` and `_gap`
    (held-out minus train) by the split in the tasks' names, where both are there.
    """
    metrics = {f"eval/observation_{name}": value for name, value in score(params, trajectories).items()}
    pairs = zip(trajectories, shuffle_actions(trajectories, seed), strict=True)
    fitting = [pair for pair in pairs if len(pair[1].ids) <= score.longest]
    if fitting:
        own, shuffled = (score(params, side)["ce"] for side in zip(*fitting, strict=True))
        metrics |= {"eval/observation_ce_shuffled": shuffled, "eval/observation_ce_shuffled_gap": shuffled - own}
    by_split: dict[str, list[Trajectory]] = {"train": [], "heldout": []}
    for trajectory in trajectories:
        for split, own in by_split.items():
            if f"/{split}/" in trajectory.task and np.isin(trajectory.role[1:], Role.OBSERVATION).any():
                own.append(trajectory)
    if all(by_split.values()):
        ce = {split: score(params, own)["ce"] for split, own in by_split.items()}
        metrics |= {f"eval/observation_ce_{split}": value for split, value in ce.items()}
        metrics["eval/observation_ce_gap"] = ce["heldout"] - ce["train"]
    return metrics


def shuffle_actions(trajectories: Sequence[Trajectory], seed: int) -> list[Trajectory]:
    """Returns the trajectories with the actions of turn k taken from another trajectory's turn k (its own where no
    other has such a turn). All else stays, so the same observations are scored."""
    rng = np.random.default_rng(seed)
    turns = [turn_of(t) for t in trajectories]
    donors: dict[tuple[int, int], tuple[int, int]] = {}  # (trajectory, turn) -> where its actions come from
    for k in range(1, max((turn[-1] for turn in turns), default=0) + 1):
        having = rng.permutation([i for i, turn in enumerate(turns) if turn[-1] >= k]).tolist()
        donors |= {(i, k): (other, k) for i, other in zip(having, having[1:] + having[:1], strict=True)}
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
