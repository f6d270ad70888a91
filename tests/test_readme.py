"""What the README shows of code works as it stands there."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from synthetic import HEAD, TINY, relative_difference, trajectory

from echo_jax import echo_loss, pack
from echo_jax.objective.advantages import advantages_of
from echo_jax.objective.loss import LossOptions, denominators
from echo_jax.objective.weights import Objective, weigh
from echo_jax.render import BuiltinRenderer
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import Machine
from echo_jax.tasks.task import Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_family_of_ones_own_is_solved_by_its_script_and_in_no_other_way():
    (code,) = re.findall(r"```python\n(.*?class SumFamily.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 20
    names = {"dataclasses": dataclasses, "np": np, "Task": Task, "__name__": "readme"}
    exec(code, names)
    family = names["SumFamily"]()
    jobs = [Job(family.make("heldout", i), group=i, rollout=i) for i in range(8)]
    with Collector(
        BuiltinRenderer(SentencePieces()), Rules(4, 400, 100), Machine(Limits()), tool_threads=2
    ) as collector:
        assert [t.reward for t in collector.scripted(jobs, [True] * 8, 0)] == [1.0] * 8
        assert [t.reward for t in collector.scripted(jobs, [False] * 8, 0)] == [0.0] * 8


def test_the_echo_term_in_a_trainer_of_ones_own_is_the_packages():
    """The 15 lines, with a model and an optimizer, train the same loss as `echo_loss` on the same sequences."""
    (code,) = re.findall(r"```python\n(import jax, jax.numpy.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    rng = np.random.default_rng(0)
    chosen = [trajectory(rng, 12, rollout=i, reward=float(i % 2)) for i in range(4)]
    params = {name: rng.normal(size=(TINY.vocab_size, 8)).astype(np.float32) for name in ("embedding", "head")}

    def model(params, tokens):
        return jnp.cumsum(params["embedding"][tokens], axis=1)

    names = {"model": model, "optimizer": optax.sgd(0.1)}
    exec(code, names)
    ids, role = (np.stack([getattr(t, name) for t in chosen]) for name in ("ids", "role"))
    advantage = advantages_of(chosen)
    value, grads = jax.value_and_grad(names["loss"])(params, ids, role, advantage)

    objective = Objective(observation_weight=0.05, temperature=1.0)
    packed = pack(chosen, weigh(chosen, advantage, objective), length=11, rows=4, micro_batches=1).batch
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), packed)
    # -A log p is the clipped ratio's loss where the policy is the sampler, up to a constant: the gradient is the same.
    options = LossOptions(policy="reinforce", head=HEAD)
    theirs = lambda params: echo_loss(  # noqa: E731
        model(params, batch.tokens), params["head"], batch, denominators(packed), options
    )[0]
    expected, expected_grads = jax.value_and_grad(theirs)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert relative_difference(grads, expected_grads) < 1e-5
    assert np.abs(grads["head"]).max() > 0

    state = names["optimizer"].init(params)
    after, _ = names["step"](params, state, ids, role, advantage)
    assert names["loss"](after, ids, role, advantage) < value


def test_every_file_that_is_linked_exists():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (root / target).exists(), target
