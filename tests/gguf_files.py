"""Small GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from echo_jax.models.families import family_of
from echo_jax.models.sources import SINGLE
from echo_jax.models.transformer import ModelConfig
from echo_jax.tokenizer import BytePairs

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_model(
    path: Path,
    folder: Path,
    config: ModelConfig,
    *,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes the safetensors weights of a folder as GGUF, with the given `keys` replaced and `more` tensors added."""
    family = family_of(config)
    writer = gguf.GGUFWriter(path, family)
    said = {
        "block_count": config.num_layers,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "context_length": 128,
    }
    if config.rope_scaling.kind != "none":
        said |= {
            "rope.scaling.type": config.rope_scaling.kind,
            "rope.scaling.factor": config.rope_scaling.factor,
            "rope.scaling.original_context_length": config.rope_scaling.original_length,
        }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (said | dict(keys or {})).items():
        add[type(value)](f"{family}.{key}", value)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if family == "llama" else {}
    for name, values in load_file(folder / SINGLE).items():
        stem, _, kind = name.rpartition(".")
        layer, _, own = stem.removeprefix("model.layers.").partition(".")
        short = NAMES[own if layer.isdigit() else stem]
        if short in heads:  # entries of a head that rotate together are adjacent
            split = values.reshape(heads[short], 2, -1, values.shape[-1])
            values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
        writer.add_tensor(f"blk.{layer}.{short}.{kind}" if layer.isdigit() else f"{short}.{kind}", values)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    return _close(writer, path)


def write_tokenizer(path: Path, tokenizer: BytePairs, definition: Mapping[str, Any], *, pre: str, unused: int) -> Path:
    """Writes the lists of a tokenizer, whose tokenizer.json is `definition`, followed by unused entries."""
    writer = gguf.GGUFWriter(path, "llama")
    special = {a["content"]: a["special"] for a in definition["added_tokens"]}
    names = sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.__getitem__)
    kinds = [{True: 3, False: 4, None: 1}[special.get(name)] for name in names]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names + [f"[PAD{i}]" for i in range(unused)])
    writer.add_token_types(kinds + [5] * unused)
    writer.add_token_merges([own if isinstance(own, str) else " ".join(own) for own in definition["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.end)
    writer.add_bos_token_id(tokenizer.id_of("<|im_start|>") or tokenizer.end)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_chat_template(tokenizer.template)
    return _close(writer, path)


def _close(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
