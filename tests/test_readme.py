"""What the README shows of code works as it stands there."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import published_tokenizers
import pytest
from published_model import write_model
from runs import environment
from synthetic import HEAD, TINY, relative_difference, trajectory

from configs import quickstart, rooms, tiny
from echo_jax import echo_loss, pack
from echo_jax.config import default_config, flat
from echo_jax.objective.advantages import advantages_of
from echo_jax.objective.loss import LossOptions, denominators
from echo_jax.objective.weights import Objective, weigh
from echo_jax.render import BuiltinRenderer
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import Machine
from echo_jax.run.trainer import SHOWN
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_family_of_ones_own_is_solved_by_its_script_and_in_no_other_way():
    (code,) = re.findall(r"```python\n(.*?class SumFamily.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 40
    names = {"__name__": "sums"}
    exec(code, names)
    family = names["SumFamily"]()
    jobs = [Job(family.make("heldout", i), group=i, rollout=i) for i in range(8)]
    with Collector(
        BuiltinRenderer(SentencePieces()), Rules(4, 400, 100), Machine(Limits()), tool_threads=2
    ) as collector:
        assert [t.reward for t in collector.scripted(jobs, [True] * 8, 0)] == [1.0] * 8
        assert [t.reward for t in collector.scripted(jobs, [False] * 8, 0)] == [0.0] * 8


def test_the_echo_term_in_a_trainer_of_ones_own_is_the_packages(monkeypatch):
    """The 15 lines, with a model and an optimizer, train the same loss as `echo_loss` on the same sequences."""
    (code,) = re.findall(r"```python\n(import jax, jax.numpy.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 17
    rng = np.random.default_rng(0)
    chosen = [trajectory(rng, 12, rollout=i, reward=float(i % 2)) for i in range(4)]
    params = {name: rng.normal(size=(TINY.vocab_size, 8)).astype(np.float32) for name in ("embedding", "head")}

    def model(params, tokens):
        return jnp.cumsum(params["embedding"][tokens], axis=1)

    monkeypatch.setitem(sys.modules, "yours", types.SimpleNamespace(model=model, optimizer=optax.sgd(0.1)))
    names = {}
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
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


# First words of each command in the README -> the test that runs it as it stands there, or why none does.
COMMANDS = {
    "python3 -m venv .venv": "`.ci/run` sets up with these two commands, but in another folder",
    ".venv/bin/pip install -e '.[test]'": "likewise",
    ".venv/bin/python -m echo_jax.train --config=configs/quickstart.py": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.evaluate --workdir=runs/quickstart --episodes": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.evaluate --workdir=runs/quickstart --trajectories": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.view": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.sweep": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.tasks": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.train --config=configs/pretrained.py:FOLDER": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.export": "test_commands_run_in_order",
    ".venv/bin/python -m echo_jax.compile": "it takes minutes and needs libtpu: run/test_ahead_of_time.py, marked tpu",
    "tpu_scripts/pod.sh": "tpu_scripts/test_pod.py::test_commands_of_the_readme, with a fake gcloud",
    "tpu_scripts/launch.sh": "tpu_scripts/test_pod.py::test_commands_of_the_readme, with a fake gcloud",
    ".venv/bin/python -m pytest": "it runs this test",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_block_is_known():
    """Blocks of commands are in COMMANDS, those of Python have a test here, and one shows what a real run printed."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks if kind != "bash"] == ["", "python", "python"]
    (printed,) = [text for kind, text in blocks if not kind]
    metrics = "  ".join(f"{label} [0-9.]+" for label in SHOWN.values())
    assert re.search(rf"^ECHO  \d+/100  .*  {metrics}$", printed, re.MULTILINE)


def test_every_command_is_run_by_a_test_or_has_a_reason():
    for line in commands():
        assert sum(line.startswith(words) for words in COMMANDS) == 1, line
    for words in COMMANDS:
        assert any(line.startswith(words) for line in commands()), words


def smaller(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the flags that make a config as small as `tiny`."""
    given, small = flat(config), flat(tiny.get_config())
    parts = ("num_steps", "model.", "rollout.", "warm_start.", "pack.", "eval.")
    return [f"--config.{k}={v}" for k, v in small.items() if k.startswith(parts) and v != given[k]]


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    """As they stand in the README, but smaller and in another folder."""
    config = tiny.get_config()
    config.render.format = "template"
    config.warm_start.num_steps, config.rollout.max_tokens, config.rollout.max_turn_tokens = 0, 512, 64
    config.pack.length = 512
    config.tokenizer.path = str(published_tokenizers.write(tmp_path / "tokenizer", "chatml"))
    model = write_model(tmp_path / "model", config)
    few = ["--config.num_steps=1", "--config.rollout.groups=1", "--config.rollout.group_size=2"]
    few += ["--config.rollout.max_turns=2", "--config.rollout.max_turn_tokens=128", "--config.eval.episodes=2"]
    flags = {
        "configs/quickstart.py": smaller(quickstart.get_config()),
        "configs/ablations/observation_weight.py": smaller(rooms.get_config()),
        "configs/pretrained.py": [*few, "--config.eval.transcripts=2"],
    }
    last_step = tiny.get_config().warm_start.num_steps + tiny.get_config().num_steps
    for line in commands():
        if COMMANDS[next(words for words in COMMANDS if line.startswith(words))] != "test_commands_run_in_order":
            continue
        more = next((flags[file] for file in flags if file in line), [])
        line = line.replace("step_000300", f"step_{last_step:06d}").replace("FOLDER", str(model))
        line = re.sub(r"\b(runs/|OUT\b)", rf"{tmp_path}/\1", line).replace(".venv/bin/python", sys.executable)
        done = subprocess.run(
            [*shlex.split(line), *more], cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for made in ("quickstart/DONE", "quickstart/evaluations.jsonl", "observation_weight/results.csv", "NAME/DONE"):
        assert (tmp_path / "runs" / made).exists(), made
    assert (tmp_path / "OUT" / "config.json").exists()


@pytest.mark.slow
def test_the_family_of_ones_own_trains(tmp_path):
    (code,) = re.findall(r"```python\n(.*?class SumFamily.*?)```", README, re.DOTALL)
    (tmp_path / "sums.py").write_text(code)
    command = [sys.executable, "-m", "echo_jax.train", "--config=sums.py", "--workdir=run"]
    longer = ["--config.rollout.max_tokens=128", "--config.pack.length=128"]
    done = subprocess.run(
        [*command, *smaller(default_config()), "--config.rollout.max_turn_tokens=40", *longer],
        cwd=tmp_path,
        env=environment(1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "DONE").exists()
