"""Laws of compiling ahead of time: its counts, its errors, and that the programs of a run compile for a TPU."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import qwen3_8b, qwen3_30b_a3b, tiny
from echo_jax.config import ConfigError
from echo_jax.learner.learner import _check_experts, build_learner
from echo_jax.models.flops import train_flops, utilisation
from echo_jax.run import ahead_of_time
from echo_jax.run.resident import CHIPS, GIB
from echo_jax.system import hlo
from echo_jax.system.sharding import make_mesh

ROOT = Path(__file__).parents[2]


def test_collectives_are_found_with_their_kind_size_and_loops():
    mesh = make_mesh(1, 8, 1)
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def step(weights, x):
        def layer(i, x):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weights[i], on(None, None)))

        return jnp.sum(jax.lax.fori_loop(0, 5, layer, x))

    arguments = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=on(None, "fsdp", None)),
        jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=on("fsdp", None)),
    )
    text = jax.jit(step).lower(*arguments).compile().as_text()
    found = hlo.collectives(text)
    assert [(c.bytes, c.elements, c.depth) for c in found if c.kind == "all-gather"] == [(64 * 64 * 4, 64 * 64, 1)]
    assert [(c.bytes, c.depth) for c in found if c.kind == "all-reduce"] == [(4, 0)]
    counts = ahead_of_time.by_kind(text)
    assert counts["all-gather"] == {"number": 1, "bytes": 16384, "bytes_in_loops": 16384, "largest_bytes": 16384}
    assert counts["all-reduce"]["bytes_in_loops"] == 0


@pytest.mark.parametrize(
    ("result", "size"),
    [("f32[8,128]{1,0}", 4096), ("(bf16[4]{0}, u32[], pred[100]{0})", 100), ("f8e4m3fn[10]", 10), ("f32[]", 4)],
)
def test_the_size_of_a_result_is_its_largest_arrays(result, size):
    assert hlo.largest_array(result)[0] == size


def test_flops_by_hand():
    """Qwen3-8B has 8,190,735,360 parameters, of which the embedding's 0.62e9 are looked up, not multiplied."""
    learner = build_learner(qwen3_8b.get_config(), 1280, jax.devices()[:1])
    weights = sum(x.size for x in jax.tree.leaves(learner.abstract_params))
    assert weights == 8_190_735_360
    multiplied = weights - 151_936 * 4096 - (2 * 36 + 1) * 4096 - 36 * 2 * 128  # without embedding and norms
    assert train_flops(learner.model_config, 100, 0) == 6 * 100 * multiplied
    assert train_flops(learner.model_config, 0, 10) == 6 * 10 * 36 * 2 * 32 * 128


def test_flops_of_a_mixture_of_experts_by_hand():
    """Qwen3-30B-A3B has 30,532,122,624 parameters, of which a token meets 3.0e9 in matmuls."""
    learner = build_learner(qwen3_30b_a3b.get_config(), 1280, jax.devices()[:1])
    assert sum(x.size for x in jax.tree.leaves(learner.abstract_params)) == 30_532_122_624
    attention, router, expert = 2048 * (2 * 32 + 2 * 4) * 128, 2048 * 128, 3 * 2048 * 768
    assert train_flops(learner.model_config, 100, 0) == 600 * (48 * (attention + router + 8 * expert) + 151_936 * 2048)


def test_experts_on_tpus_need_a_jax_that_groups_their_gradient(monkeypatch):
    config, chip = tiny.get_config(), types.SimpleNamespace(platform="tpu")
    for version, experts, rank, refused in (
        ((0, 11, 9), 4, 0, True), ((0, 12), 4, 0, False), ((0, 11, 9), 0, 0, False), ((0, 11, 9), 4, 8, False),
    ):  # fmt: skip
        monkeypatch.setattr(jax, "__version_info__", version)
        config.model.num_experts, config.lora.rank = experts, rank
        with pytest.raises(ConfigError, match="num_experts = 4: on TPUs jax") if refused else contextlib.nullcontext():
            _check_experts(config, [chip])


def test_utilisation_is_a_share_of_all_devices_peak_if_known():
    class Chip:
        device_kind = "TPU v5 lite"

    assert utilisation(197e12, [Chip()] * 4) == 0.25
    assert utilisation(1.0, jax.devices()) is None


def test_fsdp_zero_takes_the_remaining_devices():
    config = tiny.get_config()
    config.model.num_kv_heads = 2
    config.mesh.update(data=2, fsdp=0, tensor=2)
    config.pack.rows = 0
    learner = build_learner(config, 1280, jax.devices())
    assert (dict(learner.mesh.shape), learner.rows) == ({"data": 2, "fsdp": 2, "tensor": 2}, 4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mesh.fsdp": 5}, "pack.rows = 2 is not divisible by mesh.data * mesh.fsdp = 5"),
        ({"mesh.fsdp": 64}, "needs 64 devices, but only 8 are available"),
        ({"mesh.tensor": 2}, "num_kv_heads = 1 is not divisible by mesh.tensor = 2"),
        ({"mesh.tensor": 2, "model.num_kv_heads": 2, "model.vocab_size": 1281}, "vocabulary = 1281"),
        ({"model.vocab_size": 12}, "vocab_size = 12 is less than the tokenizer's 1280"),
    ],
)
def test_size_that_cannot_be_sharded_is_an_error_with_both_numbers(fields, named):
    config = tiny.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=named.replace("*", r"\*")):
        build_learner(config, 1280, jax.devices())


def array_sizes(text):
    """Returns the number of elements of the largest array of each instruction."""
    return [hlo.largest_array(line.split("=")[1].split("(")[0])[1] for line in text.splitlines() if " = " in line]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "echo_jax.compile", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(
            ["--config=configs/tiny.py", "--topology=v5litepod-16"], "a chip of v4, v5e", marks=pytest.mark.variant
        ),
        pytest.param(["--topology=v5e:2x2"], "set either --config, or --table", marks=pytest.mark.variant),
        (["--table=configs/none.py", "--topology=v5e:2x2"], "config file configs/none.py does not exist"),
    ],
)
def test_compile_error_is_one_line(arguments, named):
    result = run(*arguments)
    assert result.returncode == 1
    assert named in result.stderr or "TPU compiler is missing" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.variant) for shape in ((1, 8, 1), (4, 2, 1)))]
)
def test_small_step_forms_no_logits_and_gathers_no_head_in_a_loop_and_no_stack_of_layers(shape):
    """On CPU devices; below, the TPU's partitioner compiles a large step."""
    config = tiny.get_config()
    config.model.update(num_layers=16, num_heads=4, num_kv_heads=2, embed_dim=32, ffn_dim=128)
    config.mesh.update(data=shape[0], fsdp=shape[1], tensor=shape[2])
    config.pack.rows, config.loss.kl_weight = 8, 0.0
    config.loss.token_block, config.loss.vocab_block = 16, 256
    learner = build_learner(config, 1280, jax.devices())
    text = ahead_of_time.lower_train_step(learner).compile().as_text()
    found = hlo.collectives(text)
    head, layer = 1280 * 32, 32 * 128
    assert any(c.depth for c in found)
    assert all(c.elements <= 2 * layer < head for c in found if c.depth)  # parts of one layer, never the head
    assert all(c.elements < 16 * layer for c in found if c.kind == "all-gather")
    rows = 8 // (shape[0] * shape[1])
    assert max(array_sizes(text)) < rows * 64 * 1280


@pytest.mark.tpu
def test_the_programs_of_a_run_compile_for_tpu_and_are_described():
    fits = run("--table=configs/tiny.py", "--topology=v5e:2x2")
    assert fits.returncode == 1
    assert "has 1 chips, but v5e:2x2 has 4" in fits.stderr
    mesh = ["--config.mesh.fsdp=0", "--config.pack.rows=0", "--topology=v5e:2x2"]
    splash = ["--config.model.attention=splash", "--config.model.head_dim=128", "--config.pack.length=512"]
    for arguments in (mesh, [*mesh, *splash]):
        result = run("--config=configs/tiny.py", *arguments)
        assert result.returncode == 0, result.stderr
        described = json.loads(result.stdout)
        assert described["fits"]
        assert described["train_fits"]
        assert described["resident"]["update"] > described["peak_bytes"]  # beside the reference of the KL
        assert described["resident"]["transfer"] < described["resident"]["sampling"]
        assert set(described["programs"]) == {"train_step", "bring", "prefill", "decode", "copy"}
        assert described["sampler"]["sessions"] == described["sampler"]["sessions_a_step"] > 0
        assert described["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
        assert 0 < described["argument_bytes"] < described["peak_bytes"] < described["hbm_bytes"] == 16 * 2**30
        assert described["collectives"]
    shape = run("--config=configs/tiny.py", "--topology=v5e:3x5x7")
    assert (shape.returncode, "Traceback" in shape.stderr) == (1, False)
    assert "v5e:3x5x7" in shape.stderr


@pytest.mark.tpu
def test_a_run_whose_pool_holds_no_session_does_not_fit_though_its_update_does(monkeypatch):
    """With adapters, whose frozen weights a program of their own brings."""
    config = tiny.get_config()
    config.mesh.fsdp = config.pack.rows = 0
    config.lora.rank = 4
    fits = ahead_of_time.compile_run(config, "v5e:2x2")
    assert fits["fits"]
    assert {"bring_frozen", "bring"} <= set(fits["programs"])
    small = dataclasses.replace(CHIPS["v5e"], usable=(fits["resident"]["update"] + 1024) / GIB)
    monkeypatch.setitem(CHIPS, "v5e", small)
    monkeypatch.setattr(ahead_of_time, "kept_bytes", lambda learner: fits["resident"]["update"])
    described = ahead_of_time.compile_run(config, "v5e:2x2")
    assert described["train_fits"]
    assert not described["fits"]
    assert described["sampler"]["sessions"] == described["sampler"]["sessions_at_most"] == 0
    assert described["resident"]["sampling"] > described["usable_bytes"]
    assert "decode" not in described["programs"]


@pytest.mark.tpu
def test_no_logits_no_head_in_a_loop_and_no_whole_stack_of_layers_is_gathered():
    """A model of Qwen3-8B's widths with four layers, on 16 chips."""
    config = qwen3_8b.get_config()
    config.model.num_layers = 4
    config.pack.length = config.rollout.max_tokens = 2048
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead_of_time, "by_kind", texts.append)
        ahead_of_time.compile_train_step(ahead_of_time.learner_on(config, "v5e:4x4"))
    (text,) = texts
    model = config.model
    found = hlo.collectives(text)
    layer = model.embed_dim * model.ffn_dim  # the largest matrix of a layer
    assert found
    assert max(c.elements for c in found) < 4 * layer
    head = model.vocab_size * model.embed_dim
    assert all(c.elements < head // 8 for c in found if c.depth)
    assert max(array_sizes(text)) < 2048 * model.vocab_size
