"""Whole runs with a controller of lambda and mini-batches go on where they stopped, bit for bit."""

import numpy as np
import pytest
from runs import comparable
from synthetic import varied

from configs import tiny
from echo_jax.learner.update import Update
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.run import lifecycle
from echo_jax.run.build import build
from echo_jax.run.trainer import Trainer
from echo_jax.system.metrics import read_metrics


class Killed(BaseException):
    """Ends a run at once, as kill -9 would: nothing is saved."""


@pytest.mark.slow
def test_the_controllers_factor_and_the_mini_batches_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    config = tiny.get_config()
    config.num_steps, config.warm_start.num_steps, config.checkpoint.every = 2, 0, 1
    config.eval.update(episodes=1, transcripts=1)
    config.rollout.update(groups=2, group_size=6, replay=str(tmp_path / "saved.jsonl.gz"))
    config.loss.update(observation_target_ratio=0.3, observation_target_gain=0.5)
    config.optimizer.update(mini_batches=2, updates_per_batch=2)
    learner = build(tiny.get_config()).learner
    saved = [t for t in varied() if t.scored and t.policy_version >= 0 and t.group != 9]  # each has an advantage
    trajectory_lib.save(tmp_path / "saved.jsonl.gz", saved, vocab_size=learner.vocab_size)

    whole = tmp_path / "whole"
    assert lifecycle.train(config, whole) == 0
    records = read_metrics(whole / "metrics.jsonl")
    factors = [record["loss/observation_factor"] for record in records if "loss/observation_factor" in record]
    assert factors[0] != 1.0  # so the next step differs if this is forgotten
    weights = [record["loss/observation_weight"] for record in records if "loss/observation_factor" in record]
    np.testing.assert_allclose(weights, np.multiply(factors, config.loss.observation_weight), rtol=1e-6)

    updates, finish, call = [], Trainer._finish_step, Update.__call__

    def finish_and_die(self, *arguments):
        finish(self, *arguments)
        if self.step == 1:
            self.checkpointer.wait()
            raise Killed

    def counted(self, state, *arguments, **options):
        made = int(state.step)
        found = call(self, state, *arguments, **options)
        updates.append(int(found.state.step) - made)
        return found

    monkeypatch.setattr(Update, "__call__", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_step", finish_and_die)
        with pytest.raises(Killed):
            lifecycle.train(config, tmp_path / "killed")
    assert lifecycle.train(config, tmp_path / "killed") == 0
    assert updates == [4, 4]  # two passes over two mini-batches
    assert comparable(tmp_path / "killed") == comparable(whole)
