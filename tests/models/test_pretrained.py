"""Published weights round-trip bit for bit on any mesh; an error names whatever does not fit, before work starts."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import gguf_files
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import SPARSE, TINY, initial

from configs import tiny
from echo_jax.models import lora
from echo_jax.models.families import FamilyError, family_of, model_fields, published_config, tensor_names
from echo_jax.models.pretrained import check_fields, check_tensors, fields_of, load_params
from echo_jax.models.rope import RopeScaling
from echo_jax.models.save_pretrained import write_weights
from echo_jax.models.sources import INDEX, SINGLE, Slices, WeightsError, open_source
from echo_jax.models.transformer import ModelConfig, init_adapters
from echo_jax.system.sharding import make_mesh

LLAMA3 = RopeScaling("llama3", factor=8.0, original_length=64)
YARN = RopeScaling("yarn", factor=4.0, original_length=64, attention_factor=1.2)
FAMILIES = {
    "llama": TINY,
    "llama, untied": dataclasses.replace(TINY, tie_embeddings=False, rope_scaling=LLAMA3),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, tie_embeddings=False, rope_scaling=YARN),
    "qwen3_moe": SPARSE,
}
MESHES = {"one device": (1, 1, 1), "fsdp and tensor": (1, 2, 2), "data": (2, 2, 1)}


def write(config: ModelConfig, folder: Path, *, mesh=(1, 1, 1), **options) -> dict:
    """Writes random weights of a model in the published layout; returns them."""
    params = random_params(config, make_mesh(*mesh))
    folder.mkdir(exist_ok=True)
    write_weights(params, config, folder, **{"dtype": "float32"} | options)
    (folder / "config.json").write_text(json.dumps(published_config(config, max_length=128)))
    return params


def test_a_folder_with_two_sets_of_weights_is_refused(tmp_path):
    write(TINY, tmp_path, file_bytes=5000)
    assert open_source(tmp_path).unread == ()
    parts = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    index = json.loads(parts[INDEX])["weight_map"]
    (tmp_path / SINGLE).write_bytes(next(iter(parts[name] for name in index.values())))
    with pytest.raises(WeightsError, match=f"two sets of weights, {SINGLE} and the parts that {INDEX} lists: move one"):
        open_source(tmp_path)
    (tmp_path / SINGLE).unlink()
    assert open_source(tmp_path).read == INDEX


def test_one_file_with_an_index_is_one_set(tmp_path):
    write(TINY, tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(open_source(tmp_path).tensors, SINGLE)}))
    assert open_source(tmp_path).unread == ()


OTHERS = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model-00001-of-00003.safetensors"),
    *("adapter_model.safetensors", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.Q4_0.gguf"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_other_files_of_weights_are_named(tmp_path, other):
    write(TINY, tmp_path)
    (tmp_path / other).write_bytes(b"?")
    (tmp_path / "training_args.bin").write_bytes(b"?")  # no weights
    source = open_source(tmp_path)
    assert (source.read, source.unread) == (SINGLE, (other,))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(WeightsError, match=f"has neither {SINGLE} nor {INDEX}; {other} cannot be read"):
        open_source(tmp_path)


def random_params(config: ModelConfig, mesh) -> dict:
    """Like `init_params`, but no two numbers are equal, in norms and biases too."""
    params = initial(config, mesh)[1]
    rng = np.random.default_rng(0)
    noisy = lambda x: np.asarray(x) + rng.normal(size=x.shape).astype(x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(noisy(x), x.sharding), params)


def read(config: ModelConfig, folder: Path, mesh=(1, 1, 1)) -> dict:
    source = open_source(folder)
    check_tensors(source, folder, config)
    return load_params(source, config, make_mesh(*mesh))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        pytest.param(
            config,
            mesh,
            id=f"{family}-{where}",
            marks=[] if family == "qwen3_moe" and where == "fsdp and tensor" else pytest.mark.variant,
        )
        for family, config in FAMILIES.items()
        for where, mesh in MESHES.items()
    ],
)
def test_written_weights_are_read_back_bit_for_bit(tmp_path, config, mesh):
    params = write(config, tmp_path, mesh=mesh, file_bytes=5000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found = read(config, tmp_path, mesh)
    assert_same(found, params)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, params)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_published_matrix_is_transposed_with_adjacent_heads(tmp_path, config):
    params = jax.device_get(write(config, tmp_path))
    tensors = load_file(tmp_path / SINGLE)
    heads, size = config.num_heads, config.head_dim
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert query.shape == (heads * size, config.embed_dim)
    np.testing.assert_array_equal(query[size : 2 * size], params["layers"]["query"][1][:, 1].T)
    out = tensors["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(out[:, size : 2 * size], params["layers"]["attention_out"][1][1].T)
    if config.num_experts:
        expert, down = "model.layers.0.mlp.experts.3.down_proj.weight", params["layers"]["expert_down"][0][3]
        np.testing.assert_array_equal(tensors["model.layers.0.mlp.gate.weight"], params["layers"]["router"][0].T)
    else:
        expert, down = "model.layers.0.mlp.down_proj.weight", params["layers"]["down"][0]
    np.testing.assert_array_equal(tensors[expert], down.T)
    assert ("lm_head.weight" in tensors) is not config.tie_embeddings


def test_parameters_may_be_bfloat16_in_memory_and_in_the_file(tmp_path):
    params = write(TINY, tmp_path, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    assert_same(read(dataclasses.replace(TINY, param_dtype="bfloat16"), tmp_path), rounded)
    assert_same(read(TINY, tmp_path), jax.tree.map(lambda x: x.astype("float32"), rounded))


def test_adapters_are_not_part_of_published_weights(tmp_path):
    params = write(TINY, tmp_path)
    adapted = dataclasses.replace(TINY, lora=lora.Lora(rank=2, alpha=4.0, targets=("query", "down")))
    assert_same(read(adapted, tmp_path), params)
    adapters = init_adapters(adapted, 0, make_mesh(1, 1, 1))
    assert set(adapters["layers"]) == {"query_lora_a", "query_lora_b", "down_lora_a", "down_lora_b"}


def test_process_reads_only_the_slices_of_its_devices_one_tensor_at_a_time(tmp_path):
    write(TINY, tmp_path)
    source = open_source(tmp_path)
    sizes, plain = [], source.open

    class Counted(NamedTuple):
        name: str
        tensor: Slices

        def __getitem__(self, index):
            values = self.tensor[index]
            sizes.append((self.name, values.size))
            return values

    @contextlib.contextmanager
    def counted(name):
        with plain(name) as tensor:
            yield Counted(name, tensor)

    source.open = counted
    load_params(source, TINY, make_mesh(2, 2, 2))
    assert sum(size for _, size in sizes) == sum(np.prod(tensor.shape) for tensor in source.tensors.values())
    assert max(size for name, size in sizes if "q_proj" in name) == TINY.embed_dim * 32 / 4


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_config_json_round_trips(config):
    fields = model_fields(json.loads(json.dumps(published_config(config, max_length=128))))
    scaling = RopeScaling(**fields.pop("rope_scaling"))
    assert dataclasses.replace(config, **fields, rope_scaling=scaling) == config


def test_old_and_new_rope_keys_are_equivalent():
    old = published_config(dataclasses.replace(TINY, rope_scaling=LLAMA3), max_length=128)
    new = {k: v for k, v in old.items() if not k.startswith("rope_")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert model_fields(new) == model_fields(old)
    named = old | {"rope_scaling": {"type": old["rope_scaling"]["rope_type"], **old["rope_scaling"]}}
    assert model_fields(named) == model_fields(old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported, only llama, qwen2, qwen3, qwen3_moe"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be an integer above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be an integer above 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x' must be a finite number above 0"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "qwen3_moe"}, "lacks moe_intermediate_size, num_experts, num_experts_per_tok"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "factor = 'x' must be a finite number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1e400}}, "beta_fast = inf must be a finite"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta = \[1\] must be a finite number above 0"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 must be a finite number above 0"),
        ({"rms_norm_eps": 1e400}, "rms_norm_eps = inf must be a finite number above 0"),
        ({"layer_types": 5}, "layer_types = 5 is not supported"),
        ({"layer_types": [["x"]]}, "layer_types = .* is not supported"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported, only none, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, "lacks factor"),
    ],
)
def test_unsupported_config_json_is_refused(tmp_path, changes, message):
    write(TINY, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(WeightsError, match=message) as raised:
        fields_of(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_model_that_matches_no_family_cannot_be_published():
    with pytest.raises(FamilyError, match="qkv_bias = True with qk_norm = True"):
        family_of(dataclasses.replace(TINY, qkv_bias=True, qk_norm=True))


def test_every_field_that_contradicts_the_weights_is_listed(tmp_path):
    write(TINY, tmp_path)
    model = tiny.get_config().model
    model.update({name: value for name, value in fields_of(tmp_path).items() if name != "rope_scaling"})
    assert check_fields(open_source(tmp_path), tmp_path, model) == TINY.vocab_size
    model.vocab_size = 0
    assert check_fields(open_source(tmp_path), tmp_path, model) == TINY.vocab_size
    model.num_layers, model.rope_theta = 3, 5.0
    with pytest.raises(WeightsError) as raised:
        check_fields(open_source(tmp_path), tmp_path, model)
    assert "config.model.num_layers = 3, but the weights have 2" in str(raised.value)
    assert "config.model.rope_theta = 5.0, but the weights have 10000.0" in str(raised.value)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    write(TINY, tmp_path)

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((32, 15), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    edit(tmp_path, change)
    with pytest.raises(WeightsError) as raised:
        read(TINY, tmp_path)
    message = str(raised.value)
    assert "model.layers.1.mlp.up_proj.weight is missing; it should have the shape [32, 16]" in message
    assert f"{SINGLE}: model.layers.0.mlp.gate_proj.weight has the shape [32, 15], not [32, 16]" in message
    assert f"{SINGLE}: model.layers.0.self_attn.q_proj.bias is not a tensor of this model" in message


def test_tied_head_stored_as_a_copy_is_ignored(tmp_path):
    params = write(TINY, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same(read(TINY, tmp_path), params)


def test_head_that_differs_from_a_tied_embedding_is_refused(tmp_path):
    write(TINY, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}))
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but"):
        read(TINY, tmp_path)


def test_rope_frequencies_in_old_files_are_ignored(tmp_path):
    params = write(TINY, tmp_path)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit(tmp_path, lambda tensors: tensors.update(frequencies))
    assert_same(read(TINY, tmp_path), params)


def test_index_states_the_total_number_of_bytes(tmp_path):
    write(TINY, tmp_path, file_bytes=5000, dtype="bfloat16")
    total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(2 * int(np.prod(tensor.shape)) for tensor in open_source(tmp_path).tensors.values())


def test_truncated_file_is_named_with_its_first_lost_tensor(tmp_path):
    write(TINY, tmp_path, file_bytes=5000)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=rf"{path} is truncated: model\..* ends at byte \d+, the file at {kept}"):
            open_source(tmp_path)
    for kept in (0, 5, 20):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=f"{path} is damaged"):
            open_source(tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match=f"{path} cannot be read"):
        open_source(tmp_path)


def test_wrong_index_is_named(tmp_path):
    write(TINY, tmp_path, file_bytes=5000)
    index = tmp_path / INDEX
    index_content = json.loads(index.read_text())
    name, *_ = index_content["weight_map"]
    index_content["weight_map"][name] = sorted(set(index_content["weight_map"].values()))[-1]
    index.write_text(json.dumps(index_content))
    with pytest.raises(WeightsError, match=f"{INDEX} places {name} in .*, which has no such tensor"):
        open_source(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    write(TINY, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": np.zeros(16, np.int8)}))
    with pytest.raises(WeightsError, match=r"norm\.weight has dtype I8, which is not supported, only F32, BF16, F16"):
        open_source(tmp_path)


def test_path_without_weights_is_named(tmp_path):
    with pytest.raises(
        WeightsError, match=r"hf download Qwen/Qwen3-0\.6B --local-dir Qwen3-0\.6B, and give the folder"
    ):
        open_source(Path("Qwen/Qwen3-0.6B"))
    with pytest.raises(
        WeightsError, match=r"no weights at .*none: it must be a folder with safetensors, or a .gguf file$"
    ):
        open_source(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=f"has neither {SINGLE} nor {INDEX}"):
        open_source(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match=r"x\.gguf is damaged"):
        open_source(tmp_path / "x.gguf")
    with pytest.raises(WeightsError, match=r"y\.gguf cannot be read"):
        open_source(tmp_path / "y.gguf")


GGUF = {
    "llama": dataclasses.replace(TINY, norm_eps=1.25e-5),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(
        TINY, qk_norm=True, tie_embeddings=False, rope_scaling=RopeScaling("yarn", factor=4.0, original_length=64)
    ),
}


@pytest.mark.parametrize("config", GGUF.values(), ids=GGUF)
def test_gguf_file_yields_the_same_weights(tmp_path, config):
    params = write(config, tmp_path)
    path = gguf_files.write_model(tmp_path / "x.gguf", tmp_path, config)
    assert fields_of(path) == fields_of(tmp_path)
    assert open_source(path).config["max_position_embeddings"] == 128
    assert_same(read(config, path, MESHES["fsdp and tensor"]), params)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count = 4 is not supported, only 8"),
        ({"attention.sliding_window": 64}, "sliding_window = 64"),
        ({"attention.value_length": 16}, "value_length = 16 is not supported, only 8"),
        ({"rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast = 16.0"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "has the wrong type"),
        ({"block_count": "x"}, "num_hidden_layers = 'x' must be an integer"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    ],
)
def test_unsupported_gguf_file_is_refused(tmp_path, keys, message):
    write(TINY, tmp_path)
    with pytest.raises(WeightsError, match=message):
        fields_of(gguf_files.write_model(tmp_path / "x.gguf", tmp_path, TINY, keys=keys))


def test_a_gguf_file_of_integers_is_refused(tmp_path):
    write(TINY, tmp_path)
    more = {"output.weight": np.zeros((64, 16), np.int32)}
    with pytest.raises(WeightsError, match=r"output\.weight has the type I32"):
        open_source(gguf_files.write_model(tmp_path / "x.gguf", tmp_path, TINY, more=more))


def test_a_gguf_file_whose_rope_scaling_is_a_table_is_refused(tmp_path):
    write(TINY, tmp_path)
    more = {"rope_freqs.weight": np.ones(TINY.head_dim // 2, np.float32)}
    path = gguf_files.write_model(tmp_path / "x.gguf", tmp_path, TINY, more=more)
    with pytest.raises(WeightsError, match="'llama3, as a table in a GGUF file' is not supported"):
        fields_of(path)


def test_old_and_new_expert_keys_are_equivalent():
    published = published_config(SPARSE, max_length=128)
    new = {key: value for key, value in published.items() if key != "num_experts"} | {"num_local_experts": 6}
    assert model_fields(new) == model_fields(published)
    assert model_fields(published)["normalize_experts"] is True
    without = {key: value for key, value in published.items() if key != "norm_topk_prob"}
    assert model_fields(without)["normalize_experts"] is False


def test_old_rope_scaling_key_takes_precedence_over_the_new_one():
    published = published_config(dataclasses.replace(TINY, rope_scaling=YARN, rope_theta=7.0), max_length=128)
    both = published | {"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert model_fields(both) == model_fields(published)


def test_yarn_without_an_attention_factor_writes_none(tmp_path):
    scaling = dataclasses.replace(YARN, attention_factor=0.0)
    published = published_config(dataclasses.replace(TINY, rope_scaling=scaling), max_length=128)["rope_scaling"]
    assert "attention_factor" not in published


def test_missing_config_json_keys_have_the_published_defaults(tmp_path):
    published = published_config(dataclasses.replace(TINY, num_kv_heads=TINY.num_heads), max_length=128)
    for gone in ("head_dim", "rope_theta", "num_key_value_heads"):
        fields = model_fields({key: value for key, value in published.items() if key != gone})
        assert fields == model_fields(published | {gone: None})
        if gone == "head_dim":
            assert fields["head_dim"] == TINY.embed_dim // TINY.num_heads
        else:
            assert fields == model_fields(published)
    assert model_fields(published | {"rope_theta": None})["rope_theta"] == 10_000.0
    assert model_fields(published | {"rope_scaling": {"rope_type": "none"}}) == model_fields(published)


def test_config_may_add_a_rope_scaling_to_a_model_without_one(tmp_path):
    write(TINY, tmp_path)
    model = tiny.get_config().model
    model.update({name: value for name, value in fields_of(tmp_path).items() if name != "rope_scaling"})
    model.rope_scaling.update(kind="yarn", factor=4.0)
    assert check_fields(open_source(tmp_path), tmp_path, model) == TINY.vocab_size
    path = tmp_path / "config.json"
    scaled = published_config(dataclasses.replace(TINY, rope_scaling=YARN), max_length=128)
    path.write_text(json.dumps(scaled))
    with pytest.raises(WeightsError, match=r"config\.model\.rope_scaling = "):
        check_fields(open_source(tmp_path), tmp_path, model)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "config.json does not hold a JSON object"),
        ("config.json", "null", "config.json does not hold a JSON object"),
        (INDEX, "[]", f"{INDEX} does not hold a JSON object"),
        (INDEX, "{}", f"{INDEX} is not an index"),
        (INDEX, '{"weight_map": {"model.norm.weight": 3}}', f"{INDEX} is not an index"),
        (SINGLE, '{"a": 1}', "its header describes a as 1"),
        (SINGLE, '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', "its header describes a as"),
        (SINGLE, '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "its header describes a as"),
        (
            SINGLE,
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            r"its header places a \[2\] in bytes 0 to 4",
        ),
        (SINGLE, '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', r"places a \[1\] in bytes -4 to 0"),
        (SINGLE, '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', r"a has dtype \['F32'\]"),
        (SINGLE, '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "its header describes a as"),
        (SINGLE, '{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', "its header describes a as"),
        (SINGLE, '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "is damaged"),  # trailing bytes
        (SINGLE, "[]", "has no safetensors header"),
        (SINGLE, "[" * 100_000, "has no safetensors header"),
        ("config.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, text, message):
    write(TINY, tmp_path)
    text = len(text).to_bytes(8, "little") + text.encode() + bytes(8) if name == SINGLE else text.encode()
    (tmp_path / name).write_bytes(text)
    with pytest.raises(WeightsError, match=message) as raised:
        open_source(tmp_path)
    assert str(tmp_path / name) in str(raised.value)


def test_tensor_names_cover_all_tensors():
    assert len(tensor_names(TINY)) == 2 + 2 * 9
    assert len(tensor_names(FAMILIES["qwen2"])) == 2 + 2 * 12
    assert len(tensor_names(FAMILIES["qwen3"])) == 3 + 2 * 11
    assert len(tensor_names(SPARSE)) == 2 + 2 * (8 + 1 + 3 * SPARSE.num_experts)
