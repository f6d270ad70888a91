"""Whole runs from published weights: they start from them, train the right parameters, resume, and are exported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import published_tokenizers
import pytest
from published_model import write_model
from safetensors.numpy import load_file, save_file

from configs import tiny
from echo_jax import tokenizer as tokenizers
from echo_jax.learner import parameters
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError
from echo_jax.models import lora
from echo_jax.models.save_pretrained import write_weights
from echo_jax.models.sources import SINGLE, WeightsError
from echo_jax.run.build import build
from echo_jax.run.evaluator import Evaluator
from echo_jax.run.exporter import ExportError, complete, export
from echo_jax.run.lifecycle import train
from echo_jax.system.metrics import read_metrics
from echo_jax.tokenizer import TokenizerError

TARGETS = ("query", "down")
ROOT = Path(__file__).parents[2]


def small(weights: Path, **fields):
    config = tiny.get_config()
    config.num_steps, config.warm_start.num_steps, config.warm_start.batch = 2, 3, 4
    config.model.weights, config.model.vocab_size = str(weights), 0
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("published") / "model", tiny.get_config())


@pytest.fixture(scope="module")
def adapted(weights, tmp_path_factory):
    """Returns (config, workdir) of a finished run that trains adapters on published weights."""
    fields = {"lora.rank": 2, "lora.targets": TARGETS, "optimizer.learning_rate": 1e-2, "checkpoint.every": 4}
    config = small(weights, **fields)
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert train(config, workdir) == 0
    return config, workdir


def restored(config, workdir):
    built = build(config)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return built, parameters.restore(checkpointer, built.learner, built.source)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Returns (config, workdir) of a run on published weights with an embedding of more rows than the tokenizer has
    pieces, whose one step changes nothing."""
    folder = tmp_path_factory.mktemp("untrained")
    config = small(
        resized(write_model(folder / "model", tiny.get_config()), 1344),
        **{"warm_start.num_steps": 0, "num_steps": 1, "rollout.save_every": 1, "optimizer.learning_rate": 0.0},
    )
    config.optimizer.weight_decay = 0.0
    assert train(config, folder / "run") == 0
    return config, folder / "run"


def test_run_starts_from_the_published_weights(untrained, tmp_path):
    config, workdir = untrained
    built, found = restored(config, workdir)
    write_weights(found.params, built.learner.model_config, tmp_path, dtype="float32")
    ours, theirs = load_file(tmp_path / SINGLE), load_file(Path(config.model.weights) / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_run_with_adapters_trains_and_saves_only_them(adapted, weights):
    config, workdir = adapted
    built, found = restored(config, workdir)
    assert found.step == 5
    begun = parameters.begin(built.learner, built.source)
    assert set(found.state.params["layers"]) == {name + part for name in TARGETS for part in (lora.A, lora.B)}
    assert all((x != y).any() for x, y in zip(*map(jax.tree.leaves, (found.state.params, begun[0])), strict=True))
    jax.tree.map(np.testing.assert_array_equal, found.frozen, begun[1])
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(found.state))
    stored = sum(path.stat().st_size for path in (workdir / "checkpoints" / "5" / "state").rglob("*") if path.is_file())
    assert stored < 4 * state_bytes < (weights / SINGLE).stat().st_size
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["policy/sampler_gap_max"] < 1e-4  # the sampler has the adapters too
    assert last["train/gradient_norm"] > 0
    divergences = [record.get("policy/reference_kl") for record in read_metrics(workdir / "metrics.jsonl")]
    assert divergences[3] == pytest.approx(0.0, abs=1e-9)  # RL starts at the reference, adapters included


@pytest.mark.variant  # run/test_lifecycle.py stops a run without adapters, test_old_runs.py resumes one with them
def test_stopped_run_with_adapters_resumes_exactly(adapted, tmp_path):
    """The run as it was when it had saved step 4 of 5."""
    config, workdir = adapted
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "DONE").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    assert train(config, tmp_path / "run") == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5
    ours, theirs = restored(config, tmp_path / "run")[1], restored(config, workdir)[1]
    jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)


def test_adapters_are_evaluated_on_the_weights_they_were_trained_on(adapted, tmp_path):
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


def test_export_holds_everything_that_a_server_needs(adapted, tmp_path):
    config, workdir = adapted
    said = export(config, workdir, tmp_path / "merged", dtype="bfloat16", adapter=False)
    assert said == f"wrote step 5 of {workdir} to {tmp_path / 'merged'}"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", SINGLE, "tokenizer.model"} == names
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir() if path.name != "tokenizer.model"}
    assert len(modes) == 1
    described = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert described["torch_dtype"] == "bfloat16"
    built, found = restored(config, workdir)
    merged = lora.merged(found.params["layers"], "down", (1,), built.learner.model_config.lora)
    tensors = load_file(tmp_path / "merged" / SINGLE)
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.down_proj.weight"], np.asarray(merged.T.astype("bfloat16"))
    )
    with pytest.raises(ExportError, match="exists; choose another --output"):
        export(config, workdir, tmp_path / "merged", dtype="float32", adapter=False)


def test_export_keeps_the_configuration_of_the_weights(adapted, weights, tmp_path):
    config, workdir = adapted
    (weights / "generation_config.json").write_text('{"top_k": 20}')
    path = weights / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"max_position_embeddings": 4096, "bos_token_id": 7}))
    try:
        export(config, workdir, tmp_path / "out", dtype="float32", adapter=False)
        (weights / "generation_config.json").write_text("[]")
        with pytest.raises(WeightsError, match=r"generation_config\.json does not hold a JSON object"):
            export(config, workdir, tmp_path / "bad", dtype="float32", adapter=False)
    finally:
        path.write_text(whole)
        (weights / "generation_config.json").unlink()
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (described["max_position_embeddings"], described["bos_token_id"]) == (4096, 7)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_k": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoint_without_a_fingerprint_is_refused(adapted, monkeypatch):
    config, workdir = adapted
    plain = Checkpointer.restore
    monkeypatch.setattr(Checkpointer, "restore", lambda *given: (plain(*given)[0], {"step": 5}))
    with pytest.raises(CheckpointError, match="step 5 is of an earlier version"):
        restored(config, workdir)


def test_a_checkpoint_from_before_adapters_existed_is_read(monkeypatch):
    plain = Checkpointer.restore
    monkeypatch.setattr(Checkpointer, "restore", lambda *given: (plain(*given)[0], {"step": 32}))
    _, found = restored(tiny.get_config(), ROOT / "tests" / "fixtures" / "workdirs" / "tiny")
    assert (found.step, found.frozen) == (32, {})


def test_adapters_on_random_weights_cannot_be_exported(tmp_path):
    config = tiny.get_config()
    config.lora.rank = 2
    (tmp_path / "run").mkdir()
    with pytest.raises(ExportError, match=r"rank = 2, config\.model\.weights = '': this run has no adapters"):
        export(config, tmp_path / "run", tmp_path / "out", dtype="float32", adapter=True)


def test_export_of_adapters_is_small(adapted, tmp_path):
    config, workdir = adapted
    export(config, workdir, tmp_path / "half", dtype="bfloat16", adapter=True)
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {str(x.dtype) for x in half.values()} == {"bfloat16"}
    export(config, workdir, tmp_path / "adapter", dtype="float32", adapter=True)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["target_modules"]) == (2, ["q_proj", "down_proj"])
    assert said["base_model_name_or_path"] == config.model.weights
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 64)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 2)
    assert len(tensors) == 2 * 2 * 2


def test_adapters_name_their_base_by_an_absolute_path(adapted, tmp_path, monkeypatch):
    config, workdir = adapted
    base = Path(config.model.weights)
    shutil.copytree(workdir, tmp_path / "run")
    for folder, given in ((base.parent, base.name), (base, "."), (tmp_path, f"~/{base.name}")):
        monkeypatch.setenv("HOME", str(base.parent))
        monkeypatch.chdir(folder)
        relative = config.copy_and_resolve_references()
        relative.model.weights = given
        path = tmp_path / "run" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model.weights": given}))
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        export(relative, tmp_path / "run", output, dtype="float32", adapter=True)
        said = json.loads((output / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(base)


def test_failed_export_leaves_no_folder(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"), complete(tmp_path / "out") as folder:
        fail(folder)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("")
    with pytest.raises(ExportError, match=r"out\.tmp exists: another export is running or was killed"):
        complete(tmp_path / "out").__enter__()
    assert (tmp_path / "out.tmp" / "mine").exists()
    shutil.rmtree(tmp_path / "out.tmp")

    def taken(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(OSError, match="not empty"), complete(tmp_path / "out") as folder:
        taken(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with complete(tmp_path / "another") as folder:
        assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.num_layers": 3},
            r"a different model than config\.model .*:\n  config\.model\.num_layers = 3, but the weights have 2",
        ),
        ({"model.vocab_size": 1300}, r"config\.model\.vocab_size = 1300, but the weights have 1280"),
        ({"model.qk_norm": True}, r"config\.model\.qk_norm = True, but the weights have False"),
    ],
)
def test_weights_of_another_model_are_refused_before_any_work(weights, fields, message):
    with pytest.raises(WeightsError, match=message):
        build(small(weights, **fields))


def resized(weights: Path, rows: int) -> Path:
    tensors = load_file(weights / SINGLE)
    tensors["model.embed_tokens.weight"] = np.resize(tensors["model.embed_tokens.weight"], (rows, 32))
    save_file(tensors, weights / SINGLE)
    path = weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": rows}))
    return weights


def test_embedding_may_have_more_rows_than_the_tokenizer_has_pieces(untrained):
    config, workdir = untrained
    saved = workdir / "rollouts" / "step_000001.jsonl.gz"
    replaying = config.copy_and_resolve_references()
    replaying.rollout.replay = str(saved)
    assert build(replaying).replay
    shown = subprocess.run([sys.executable, "-m", "echo_jax.view", f"--trajectories={saved}"], capture_output=True)
    assert (shown.returncode, shown.stderr) == (0, b"")


def test_tokenizer_must_match_the_weights(tmp_path):
    weights = write_model(tmp_path / "model", tiny.get_config())
    own = shutil.copyfile(weights / "tokenizer.model", tmp_path / "own.model")
    assert tokenizers.find(own, weights).vocab_size == 1280
    other = str(published_tokenizers.write(tmp_path / "other", "qwen3"))
    with pytest.raises(TokenizerError, match=rf"{other} has a different vocabulary from the tokenizer of {weights}: '"):
        build(small(weights, **{"tokenizer.path": other}))
    (weights / "tokenizer.model").unlink()
    build(small(weights, **{"tokenizer.path": str(own)}))
    with pytest.raises(TokenizerError, match=rf"{weights} has neither tokenizer\.json nor tokenizer\.model"):
        build(small(weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("none", "no weights at PATH: .*"),
        pytest.param("mamba", "PATH: model_type = 'mamba' is not supported, only .*", marks=pytest.mark.variant),
    ],
)
def test_unusable_weights_give_one_message(tmp_path, weights, message):
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    save_file({"x": np.zeros(1, np.float32)}, folder / SINGLE)
    command = [sys.executable, "-m", "echo_jax.train", f"--config=configs/pretrained.py:{tmp_path / weights}"]
    ended = subprocess.run([*command, f"--workdir={tmp_path}/w"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    place, said = (
        r"error: configs/pretrained\.py:\d+: WeightsError: ",
        message.replace("PATH", str(tmp_path / weights)),
    )
    assert re.fullmatch(rf"{place}{said}\n", ended.stderr)
    assert not (tmp_path / "w").exists()


def test_weights_of_a_smaller_vocabulary_are_refused(tmp_path):
    weights = resized(write_model(tmp_path / "model", tiny.get_config()), 1000)
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight has 1000 rows, but the tokenizer .* has 1280 pieces"):
        build(small(weights))
