"""The published models that transformer.py supports: their config.json, and the names of their tensors.

In: a config.json, or the same keys read from a GGUF file, as a dictionary. Out: fields of `config.model`; and back.
Tensor names are those of transformers: `model.layers.0.self_attn.q_proj.weight`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from echo_jax.models.rope import NO_SCALING, SCALINGS, RopeScaling
from echo_jax.models.transformer import BIASED, EXPERT, MATRICES, ModelConfig
from echo_jax.system.errors import UserError

# `qkv_bias`, `qk_norm` and `num_experts` tell the families apart.
FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": True},
}
SPARSE = ("qwen3_moe",)  # families with experts
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# config.model field -> its key in config.json
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_EXPERTS = {  # added or replaced in a model with experts
    "ffn_dim": "moe_intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
}
_ROPE = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_ODD_ROPE = {"mscale": None, "mscale_all_dim": None, "truncate": True}  # settings of yarn variants -> plain value
# Keys that change the arithmetic -> the only supported value
_UNSUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": None,
}
_NUMBERS = ("rms_norm_eps",)  # the other sizes are integers

_LINEAR_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    **{name: f"{module}.weight" for name, module in _LINEAR_NAMES.items()},
    **{f"{name}_bias": f"{_LINEAR_NAMES[name]}.bias" for name in BIASED},
}
TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


class Place(NamedTuple):
    """Where a published tensor belongs: a whole parameter, one layer of it, or one expert of a layer."""

    parameter: str
    index: tuple[int, ...] = ()  # (), (layer,) or (layer, expert)


class FamilyError(UserError, ValueError):
    """transformer.py does not support a published model; the message says why."""


def family_of(config: ModelConfig) -> str:
    """Returns the published family whose arithmetic matches this config.

    Raises:
      FamilyError: no family matches.
    """
    for family, features in FAMILIES.items():
        alike = all(getattr(config, name) == value for name, value in features.items())
        if alike and (family in SPARSE) == bool(config.num_experts):
            return family
    raise FamilyError(
        f"no published family has qkv_bias = {config.qkv_bias} with qk_norm = {config.qk_norm} and num_experts = "
        f"{config.num_experts}; the supported families are "
        + ", ".join(f"{name} ({features}{', experts' * (name in SPARSE)})" for name, features in FAMILIES.items())
    )


def model_fields(published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `config.model` that a config.json determines, `rope_scaling` as a dictionary.

    Raises:
      FamilyError: a key is missing, or has a value that transformer.py does not support.
    """
    family = published.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise FamilyError(f"model_type = {family!r} is not supported, only {', '.join(FAMILIES)}")
    for key, supported in _UNSUPPORTED.items():
        if (value := published.get(key, supported)) not in (supported, None):
            raise FamilyError(f"{key} = {value!r} is not supported, only {supported!r}")
    kinds = published.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise FamilyError(f"layer_types = {kinds!r} is not supported, only full_attention")
    published = {key: value for key, value in published.items() if value is not None}
    published = {"num_key_value_heads": published.get("num_attention_heads")} | published
    if "num_local_experts" in published:  # the key that transformers 5 writes
        published = {"num_experts": published["num_local_experts"]} | published
    sizes = _sizes(family)
    if missing := [key for key in sizes.values() if published.get(key) is None]:
        raise FamilyError(f"its configuration lacks {', '.join(missing)}")
    for key in (*sizes.values(), "head_dim", "max_position_embeddings"):
        _check_number(key, published.get(key, 1), whole=key not in _NUMBERS)
    fields = {"num_experts": 0, "experts_per_token": 0} | {field: published[key] for field, key in sizes.items()}
    fields["normalize_experts"] = bool(published.get("norm_topk_prob", False)) if family in SPARSE else True
    fields["head_dim"] = published.get("head_dim", fields["embed_dim"] // fields["num_heads"])
    fields["tie_embeddings"] = bool(published.get("tie_word_embeddings", False))
    # transformers 5 keeps base and scaling together in rope_parameters, but the old rope_scaling takes precedence.
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        values = published.get(key, {})
        if not isinstance(values, dict):
            raise FamilyError(f"{key} = {values!r} is not an object")
        values = {name: value for name, value in values.items() if value is not None}
        rope |= values | ({"rope_type": values["type"]} if "type" in values and "rope_type" not in values else {})
    theta = rope.get("rope_theta", published.get("rope_theta", 10_000.0))
    _check_number("rope_theta", theta, whole=False)
    fields["rope_theta"] = float(theta)
    fields["rope_scaling"] = dataclasses.asdict(_scaling(rope, published.get("max_position_embeddings")))
    return fields | FAMILIES[family]


def _check_number(key: str, value: Any, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise FamilyError(f"{key} = {value!r} must be {'an integer' if whole else 'a finite number'} above 0")


def _sizes(family: str) -> dict[str, str]:
    return _SIZES | _EXPERTS if family in SPARSE else _SIZES


def _scaling(rope: Mapping[str, Any], length: int | None) -> RopeScaling:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "none"):
        return NO_SCALING
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise FamilyError(f"rope scaling of type {kind!r} is not supported, only {', '.join(SCALINGS)}")
    if odd := {key: rope[key] for key, plain in _ODD_ROPE.items() if rope.get(key, plain) != plain}:
        raise FamilyError(f"rope scaling with {odd} is not supported")
    given = {field: rope.get(_ROPE[field]) for field in SCALINGS[kind]}
    given["original_length"] = given["original_length"] or length
    given = {field: value for field, value in given.items() if value is not None}
    if missing := {"factor", "original_length"} - given.keys():
        raise FamilyError(f"its rope scaling lacks {', '.join(sorted(_ROPE[field] for field in missing))}")
    for field, value in given.items():
        _check_number(_ROPE[field], value, whole=False)
    types = {field.name: field.type for field in dataclasses.fields(RopeScaling)}
    return RopeScaling(kind=kind, **{field: types[field](value) for field, value in given.items()})


def published_config(config: ModelConfig, *, max_length: int) -> dict[str, Any]:
    """Returns the config.json of a model; `model_fields` turns it back into the same fields."""
    family = family_of(config)
    published = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{key: getattr(config, field) for field, key in _sizes(family).items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "rope_theta": config.rope_theta,
    }
    if family in SPARSE:
        published |= {"norm_topk_prob": config.normalize_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if config.rope_scaling.kind != "none":
        scaling = config.rope_scaling
        fields = [f for f in SCALINGS[scaling.kind] if f != "attention_factor" or scaling.attention_factor]
        published["rope_scaling"] = {
            "rope_type": scaling.kind,
            **{_ROPE[field]: getattr(scaling, field) for field in fields},
        }
    return published


def tensor_names(config: ModelConfig) -> dict[str, Place]:
    """Returns published name -> place for all tensors of a model."""
    top = {TOP_NAMES[name]: Place(name) for name in TOP_NAMES if name != "lm_head" or not config.tie_embeddings}
    biases = BIASED if config.qkv_bias else ()
    norms = ("attention_norm", "ffn_norm", *(("query_norm", "key_norm") if config.qk_norm else ()))
    parameters = (*norms, *config.matrices, *(f"{name}_bias" for name in biases))
    return top | {
        f"model.layers.{layer}.{LAYER_NAMES[name].format(*expert)}": Place(name, (layer, *expert))
        for layer in range(config.num_layers)
        for name in parameters
        for expert in ([(i,) for i in range(config.num_experts)] if name in EXPERT else [()])
    }


def published_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter's published tensor; for a matrix, [outputs, inputs]."""
    sizes = config.sizes(name)[name in EXPERT :]
    if name not in MATRICES:
        return sizes if name in ("embedding", "lm_head") else (math.prod(sizes),)
    split = len(MATRICES[name][0])
    return (math.prod(sizes[split:]), math.prod(sizes[:split]))
