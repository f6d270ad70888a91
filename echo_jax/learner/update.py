"""One optimizer update (or several passes) on a set of trajectories: pack, score, step.

In: a train state and trajectories with their weights. Out: the next state, and the step's metrics.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from echo_jax.learner.learner import Learner
from echo_jax.learner.optimizer import updates_made
from echo_jax.learner.step import TrainState, make_logprobs, make_term_gradients, make_term_values, make_train_step
from echo_jax.models import lora
from echo_jax.models.flops import train_flops, utilisation
from echo_jax.objective.advantages import Pool, alone
from echo_jax.objective.batch import TERMS, Batch, to_mesh
from echo_jax.objective.control import Control
from echo_jax.objective.loss import MAXIMA, LossOptions, Mean, Sums, add_sums, finish_metrics, is_count
from echo_jax.objective.weights import TokenWeights
from echo_jax.rollout.trajectory import Trajectory


class UpdateError(RuntimeError):
    """Loss or gradient norm is not finite; the given state was donated and is lost."""


class Updated(NamedTuple):
    state: TrainState
    metrics: dict[str, float]
    observation_factor: float  # on lambda, from the controller


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one phase of a run, compiled once."""

    learner: Learner
    options: LossOptions
    schedule: optax.Schedule  # the learning rate of each update, counted from 0
    passes: int = 1  # over each batch
    mini_batches: int = 1  # updates in a pass, each on a part of the rollouts
    recompute: bool = False  # recompute the old log-probs of the ratio under the policy before the update
    reference: dict | None = None  # trained parameters of the policy that the KL refers to
    frozen: dict = dataclasses.field(default_factory=dict)  # parameters that are not trained
    control: Control | None = None  # of the ratio of the two terms

    @functools.cached_property
    def _train_step(self):
        learner = self.learner
        optimizer = learner.make_optimizer(self.schedule)
        return make_train_step(learner.graphdef, learner.abstract_state(), optimizer, learner.mesh, self.options)

    @functools.cached_property
    def _logprobs(self):
        return make_logprobs(self.learner.graphdef, self.learner.mesh, self.options.head)

    @functools.cached_property
    def _term_gradients(self):
        return make_term_gradients(self.learner.graphdef, self.learner.mesh, self.options)

    @functools.cached_property
    def _term_values(self):
        return make_term_values(self.learner.graphdef, self.learner.mesh, self.options)

    def __call__(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        weights: Sequence[TokenWeights],
        *,
        at_most: int,
        compare_gradients: bool = False,
        order: Sequence[int] = (0,),
        pool: Pool = alone,
        observation_factor: float = 1.0,
    ) -> Updated:
        """Trains on at most `at_most` rollouts; donates `state`.

        Each of several processes passes its share of the trajectories, with weights of the whole update; all get the
        metrics of the whole update.

        Args:
          order: root of the draw that deals the rollouts out to mini-batches.
          pool: joins the processes if each has a share of the rollouts; only mini-batches need it.
          observation_factor: that of the last update, where there is a controller.

        Raises:
          UpdateError: loss or gradient norm is not finite.
        """
        start = time.perf_counter()
        at_most = self.learner.share_of_part(at_most, self.mini_batches)
        batches = [
            self._put(state, *part, at_most=at_most)
            for part in deal(trajectories, weights, self.mini_batches, order, pool)
        ]
        norms, held = {}, {}
        if compare_gradients or (self.control and self.control.measure == "gradients"):
            found = jax.device_get(self._term_gradients(state.params, self.frozen, batches[0]))
            norms = {name: float(value) for name, value in found.items()}
        if self.control:
            batches, observation_factor, held = self._controlled(state, batches, norms, observation_factor)
        made = updates_made(state.opt_state)
        sums = []
        for _ in range(self.passes):
            of_pass = []
            for batch in batches:
                state, of_batch = self._train_step(state, self.frozen, batch)
                of_pass.append(of_batch)
            sums.append(of_pass)
        metrics = mean_of_passes([finish_metrics(sum_of_pass(of_pass)) for of_pass in jax.device_get(sums)])
        updates = range(made, made + self.passes * len(batches))
        metrics["train/learning_rate"] = float(np.mean([self.schedule(i) for i in updates]))
        loss, norm = metrics["loss/total"], metrics["train/gradient_norm"]
        if not math.isfinite(loss + norm):
            raise UpdateError(f"loss {loss}, gradient norm {norm}")
        metrics |= held
        if compare_gradients:
            norms["observation/gradient_norm"] *= observation_factor if self.control else 1.0
            metrics |= norms
            if norms["policy/gradient_norm"] > 0:
                metrics["loss/gradient_ratio"] = norms["observation/gradient_norm"] / norms["policy/gradient_norm"]
        seconds = time.perf_counter() - start
        metrics |= {"time/train": seconds, "train/tokens_per_second": metrics["pack/tokens"] / seconds}
        metrics |= self._speed(metrics["pack/tokens"], metrics["pack/pairs"], seconds)
        return Updated(state, metrics, observation_factor)

    def _put(self, state: TrainState, trajectories, weights, *, at_most: int) -> Batch:
        """Packs trajectories and puts them on the mesh, with the log-probs that the loss refers to."""
        packed = self.learner.pack(trajectories, weights, at_most=at_most)
        batch = to_mesh(packed.batch, self.learner.mesh)
        if self.recompute:
            batch = batch.replace(old_logprob=self._logprobs(lora.join(state.params, self.frozen), batch))
        if self.reference is not None:
            batch = batch.replace(reference_logprob=self._logprobs(lora.join(self.reference, self.frozen), batch))
        return batch

    def _controlled(
        self, state: TrainState, batches: list[Batch], norms: dict[str, float], factor: float
    ) -> tuple[list[Batch], float, dict[str, float]]:
        """Returns the mini-batches with the controller's factor on lambda, that factor, and metrics. It measures the
        first of them. `norms`: of the terms' gradients there."""
        if self.control.measure == "gradients":
            measures = {term: norms[f"{term}/gradient_norm"] for term in TERMS}
        else:
            found = jax.device_get(self._term_values(state.params, self.frozen, batches[0]))
            measures = {term: abs(float(value)) for term, value in found.items()}
        factor = self.control.factor(factor, **measures)
        metrics = {"loss/observation_factor": factor}
        if measures["policy"] > 0:
            metrics["loss/held_ratio"] = factor * measures["observation"] / measures["policy"]
        times = lambda batch: batch.replace(observation_weight=batch.observation_weight * np.float32(factor))  # noqa: E731
        return [times(batch) for batch in batches], factor, metrics

    def _speed(self, tokens: float, pairs: float, seconds: float) -> dict[str, float]:
        """Returns the analytic FLOP/s on real tokens and, if the devices' peak is known, their share of it."""
        done = self.passes * train_flops(self.learner.model_config, tokens, pairs) / seconds
        share = utilisation(done, list(self.learner.mesh.devices.flat))
        return {"train/flops_per_second": done} | ({} if share is None else {"train/mfu": share})


def deal(
    trajectories: Sequence[Trajectory],
    weights: Sequence[TokenWeights],
    parts: int,
    order: Sequence[int],
    pool: Pool = alone,
) -> list[tuple[list[Trajectory], list[TokenWeights]]]:
    """Deals rollouts, with all their branches, out to parts whose numbers of rollouts, over all processes, differ by
    one at most. A part has the same rollouts however many processes share them, and no part has none: of fewer
    rollouts than `parts` each is a part.

    Args:
      order: root of the draw; one part keeps the order as it is.
    """
    if parts == 1:
        return [(list(trajectories), list(weights))]
    own = dict.fromkeys((t.group, t.rollout) for t in trajectories)
    rollouts = sorted((group, rollout) for group, rollout in pool([list(rollout) for rollout in own]))
    parts = max(min(parts, len(rollouts)), 1)
    places = np.random.default_rng(order).permutation(len(rollouts))
    part_of = {rollouts[i]: place % parts for place, i in enumerate(places)}
    dealt = [([], []) for _ in range(parts)]
    for trajectory, weight in zip(trajectories, weights, strict=True):
        chosen = dealt[part_of[trajectory.group, trajectory.rollout]]
        chosen[0].append(trajectory)
        chosen[1].append(weight)
    return dealt


def sum_of_pass(of_batches: Sequence[Sums]) -> Sums:
    """Joins the metric sums of the mini-batches of a pass: counts add up, losses and norms are means."""
    if len(of_batches) == 1:
        return of_batches[0]
    joined = jax.device_get(functools.reduce(add_sums, of_batches))
    is_mean = lambda name, value: not (isinstance(value, Mean) or name in MAXIMA or is_count(name))  # noqa: E731
    return {name: value / len(of_batches) if is_mean(name, value) else value for name, value in joined.items()}


def mean_of_passes(passes: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over the passes over a batch; the sampler's mismatch is that of the first, before which no pass
    changed the policy."""
    first = passes[0]
    mean = {name: float(np.mean([metrics[name] for metrics in passes])) for name in first}
    mismatch = ("policy/sampler_gap", "policy/sampler_gap_max", "policy/mismatch_kl")
    return mean | {name: first[name] for name in mismatch if name in first}
