"""Whole runs from published weights: they begin with them, train what they should, resume, and are written out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import tiny
from echo_jax import policy, runtime
from echo_jax.checkpoint import Checkpointer
from echo_jax.evaluate import Evaluator
from echo_jax.export import ExportError, complete, export
from echo_jax.metrics import read_metrics
from echo_jax.models import lora
from echo_jax.models.export import write_weights
from echo_jax.models.families import published_config
from echo_jax.models.sources import SINGLE, WeightsError
from echo_jax.train import train

TARGETS = ("query", "down")


def published(folder: Path, config) -> Path:
    """Writes the weights that seed 7 of a config gives."""
    config = config.copy_and_resolve_references()
    config.seed = 7
    built = runtime.build(config)
    folder.mkdir()
    write_weights(policy.begin(built)[0], built.model_config, folder, dtype="float32")
    (folder / "config.json").write_text(json.dumps(published_config(built.model_config, max_length=64)))
    return folder


def small(weights: Path, **fields):
    config = tiny.get_config()
    config.num_steps, config.warm_start.num_steps, config.warm_start.batch = 2, 3, 4
    config.model.weights, config.model.vocab_size = str(weights), 0
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("published") / "model", tiny.get_config())


@pytest.fixture(scope="module")
def adapted(weights, tmp_path_factory):
    """(config, workdir) of a finished run that trains adapters of published weights."""
    config = small(weights, **{"lora.rank": 2, "lora.targets": TARGETS})
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert train(config, workdir) == 0
    return config, workdir


def restored(config, workdir):
    built = runtime.build(config)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return built, policy.restore(checkpointer, built)


def test_a_run_begins_with_the_published_weights(weights, tmp_path):
    config = small(weights, **{"warm_start.num_steps": 0, "num_steps": 1, "optimizer.learning_rate": 0.0})
    config.optimizer.weight_decay = 0.0
    assert train(config, tmp_path / "run") == 0
    built, found = restored(config, tmp_path / "run")
    write_weights(found.params, built.model_config, tmp_path, dtype="float32")
    ours, theirs = load_file(tmp_path / SINGLE), load_file(weights / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_run_with_adapters_trains_and_keeps_them_alone(adapted, weights):
    config, workdir = adapted
    built, found = restored(config, workdir)
    assert found.step == 5
    begun = policy.begin(built)
    assert set(found.state.params["layers"]) == {name + part for name in TARGETS for part in (lora.A, lora.B)}
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (found.state.params, begun[0])), strict=True))
    jax.tree.map(np.testing.assert_array_equal, found.frozen, begun[1])
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(found.state))
    stored = sum(path.stat().st_size for path in (workdir / "checkpoints" / "5" / "state").rglob("*") if path.is_file())
    assert stored < 4 * state_bytes < (weights / SINGLE).stat().st_size
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["policy/sampler_gap_max"] < 1e-4  # the sampler has the adapters too
    assert last["train/gradient_norm"] > 0


def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not(adapted, tmp_path):
    config, workdir = adapted
    half = config.copy_and_resolve_references()
    half.num_steps = 1
    assert train(half, tmp_path / "run") == 0
    for name in ("config.json", "DONE"):
        (tmp_path / "run" / name).unlink()
    assert train(config, tmp_path / "run") == 0
    ours, theirs = restored(config, tmp_path / "run")[1], restored(config, workdir)[1]
    jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)


def test_adapters_are_evaluated_with_the_weights_that_they_were_trained_on(adapted, tmp_path):
    config, workdir = adapted
    built, found = restored(config, workdir)
    with built.make_collector() as collector:
        evaluator = Evaluator(built, collector, built.make_engine(), workdir)
        again = evaluator(found.params, found.step, episodes=config.eval.episodes)
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert again["eval/observation_ce"] == last["eval/observation_ce"]


def test_adapters_of_other_weights_are_refused(adapted, weights, tmp_path):
    config, workdir = adapted
    tensors = load_file(weights / SINGLE)
    whole = (weights / SINGLE).read_bytes()
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights / SINGLE)
    try:
        with pytest.raises(WeightsError, match=f"{weights} are not those that the adapters of step 5 were trained on"):
            restored(config, workdir)
    finally:
        (weights / SINGLE).write_bytes(whole)


def test_an_export_holds_all_that_a_server_needs(adapted, tmp_path):
    config, workdir = adapted
    said = export(config, workdir, tmp_path / "merged", dtype="bfloat16", adapter=False)
    assert said == f"step 5 of {workdir} is in {tmp_path / 'merged'}"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", SINGLE, "tokenizer.model"} == names
    described = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert described["torch_dtype"] == "bfloat16"
    built, found = restored(config, workdir)
    merged = lora.merge(found.params["layers"], built.model_config.lora)["down"]
    tensors = load_file(tmp_path / "merged" / SINGLE)
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.down_proj.weight"], np.asarray(merged[1].T.astype("bfloat16"))
    )
    with pytest.raises(ExportError, match="exists; choose another --output"):
        export(config, workdir, tmp_path / "merged", dtype="float32", adapter=False)


def test_an_export_of_adapters_is_small(adapted, tmp_path):
    config, workdir = adapted
    export(config, workdir, tmp_path / "adapter", dtype="float32", adapter=True)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["target_modules"]) == (2, ["q_proj", "down_proj"])
    assert said["base_model_name_or_path"] == config.model.weights
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 64)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 2)
    assert len(tensors) == 2 * 2 * 2


def test_an_export_that_fails_leaves_no_folder(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"), complete(tmp_path / "out") as folder:
        fail(folder)
    assert not (tmp_path / "out").exists()
    with complete(tmp_path / "out") as folder:
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.num_layers": 3}, r"another model than config\.model .*:\n  config\.model\.num_layers = 3, there 2"),
        ({"model.vocab_size": 1300}, r"config\.model\.vocab_size = 1300, there 1280"),
        ({"model.qk_norm": True}, r"config\.model\.qk_norm = True, there False"),
    ],
)
def test_weights_of_another_model_are_refused_before_any_work(weights, fields, message):
    with pytest.raises(WeightsError, match=message):
        runtime.build(small(weights, **fields))


def test_weights_of_a_smaller_vocabulary_are_refused(tmp_path):
    config = tiny.get_config()
    weights = published(tmp_path / "model", config)
    tensors = load_file(weights / SINGLE)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000]
    save_file(tensors, weights / SINGLE)
    path = weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 1000}))
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight has 1000 rows, the tokenizer .* has 1280 pieces"):
        runtime.build(small(weights))
