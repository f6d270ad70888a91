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
from echo_jax.learner.step import TrainState, make_logprobs, make_term_gradients, make_train_step
from echo_jax.models import lora
from echo_jax.models.flops import train_flops, utilisation
from echo_jax.objective.batch import to_mesh
from echo_jax.objective.loss import LossOptions, finish_metrics
from echo_jax.objective.weights import TokenWeights
from echo_jax.rollout.trajectory import Trajectory


class UpdateError(RuntimeError):
    """Loss or gradient norm is not finite; the given state was donated and is lost."""


class Updated(NamedTuple):
    state: TrainState
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one phase of a run, compiled once."""

    learner: Learner
    options: LossOptions
    schedule: optax.Schedule  # the learning rate of each update, counted from 0
    passes: int = 1  # updates on each batch
    recompute: bool = False  # recompute the old log-probs of the ratio under the policy before the update
    reference: dict | None = None  # trained parameters of the policy that the KL refers to
    frozen: dict = dataclasses.field(default_factory=dict)  # parameters that are not trained

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

    def __call__(
        self,
        state: TrainState,
        trajectories: Sequence[Trajectory],
        weights: Sequence[TokenWeights],
        *,
        at_most: int,
        compare_gradients: bool = False,
    ) -> Updated:
        """Trains on at most `at_most` trajectories; donates `state`.

        Each of several processes passes its share of the trajectories, with weights of the whole update; all get the
        metrics of the whole update.

        Raises:
          UpdateError: loss or gradient norm is not finite.
        """
        start = time.perf_counter()
        packed = self.learner.pack(trajectories, weights, at_most=at_most)
        batch = to_mesh(packed.batch, self.learner.mesh)
        if self.recompute:
            batch = batch.replace(old_logprob=self._logprobs(lora.join(state.params, self.frozen), batch))
        if self.reference is not None:
            batch = batch.replace(reference_logprob=self._logprobs(lora.join(self.reference, self.frozen), batch))
        norms = jax.device_get(self._term_gradients(state.params, self.frozen, batch)) if compare_gradients else {}
        made = updates_made(state.opt_state)
        sums = []
        for _ in range(self.passes):
            state, pass_sums = self._train_step(state, self.frozen, batch)
            sums.append(pass_sums)
        metrics = mean_of_passes([finish_metrics(pass_sums) for pass_sums in jax.device_get(sums)])
        metrics["train/learning_rate"] = float(np.mean([self.schedule(made + i) for i in range(self.passes)]))
        loss, norm = metrics["loss/total"], metrics["train/gradient_norm"]
        if not math.isfinite(loss + norm):
            raise UpdateError(f"loss {loss}, gradient norm {norm}")
        metrics |= {name: float(value) for name, value in norms.items()}
        if norms and norms["policy/gradient_norm"] > 0:
            metrics["loss/gradient_ratio"] = float(norms["observation/gradient_norm"] / norms["policy/gradient_norm"])
        seconds = time.perf_counter() - start
        metrics |= {"time/train": seconds, "train/tokens_per_second": metrics["pack/tokens"] / seconds}
        metrics |= self._speed(metrics["pack/tokens"], metrics["pack/pairs"], seconds)
        return Updated(state, metrics)

    def _speed(self, tokens: float, pairs: float, seconds: float) -> dict[str, float]:
        """Returns the analytic FLOP/s on real tokens and, if the devices' peak is known, their share of it."""
        done = self.passes * train_flops(self.learner.model_config, tokens, pairs) / seconds
        share = utilisation(done, list(self.learner.mesh.devices.flat))
        return {"train/flops_per_second": done} | ({} if share is None else {"train/mfu": share})


def mean_of_passes(passes: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over the updates on one batch; the sampler's mismatch is that of the first, before any of them
    changed the policy."""
    first = passes[0]
    mean = {name: float(np.mean([metrics[name] for metrics in passes])) for name in first}
    mismatch = ("policy/sampler_gap", "policy/sampler_gap_max", "policy/mismatch_kl")
    return mean | {name: first[name] for name in mismatch if name in first}
