"""Reads files of published weights, one slice of one tensor at a time.

In: a folder of safetensors (one file, or several with an index), or a GGUF file. Out: the list of tensors, under
transformers' names, and any slice of one as numpy. Nothing stays in memory.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from echo_jax.system import paths
from echo_jax.system.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files of weights in a folder, of which one set is read.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf", "*.h5", "flax_model*.msgpack")
_DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}  # numpy dtype, bytes per number

# Names of a GGUF file -> transformers'.
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# key of a config.json -> key of a GGUF file, after the architecture's prefix
_GGUF_CONFIG = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}

# GGUF keys that change the arithmetic -> the only supported value ("head": the size of a head)
_GGUF_ONLY = {
    "rope.dimension_count": "head",
    "attention.value_length": "head",
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}


class WeightsError(UserError, ValueError):
    """Published weights are unusable; the message names file and tensor."""


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    file: Path


class Slices(Protocol):
    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor, in its dtype."""
        ...


class Source(Protocol):
    tensors: Mapping[str, Tensor]
    config: dict[str, Any]  # keys as in a config.json
    read: str  # the name of the file of weights, or of their index
    unread: tuple[str, ...]  # names of other files of weights beside it, which are not read

    def open(self, name: str) -> AbstractContextManager[Slices]:
        """Opens one tensor; closing it frees its memory."""
        ...


def open_source(path: Path) -> Source:
    """Opens the weights at `path`, reading only their metadata.

    Raises:
      WeightsError: there are no weights, or a file is damaged.
    """
    path = Path(paths.expanded(path))
    if path.suffix == ".gguf":
        return Gguf(path)
    if not path.is_dir():
        missing = f"no weights at {path}: it must be a folder with safetensors, or a .gguf file"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            missing += (
                f". If it is a name on the Hugging Face hub, download it first (pip install huggingface_hub): "
                f"hf download {path} --local-dir {path.name}, and give the folder {path.name}"
            )
        raise WeightsError(missing)
    return Safetensors(path)


class Safetensors:
    """A folder as transformers writes it: config.json, and model.safetensors or its parts with an index."""

    def __init__(self, folder: Path):
        self.config = read_json(folder / "config.json")
        self.tensors: dict[str, Tensor] = {}
        found = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
        index = folder / INDEX
        self.read = INDEX if index.is_file() else SINGLE
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise WeightsError(f"{index} is not an index: it has no weight_map of names and files")
            if (folder / SINGLE).is_file() and SINGLE not in files.values():
                raise WeightsError(
                    f"{folder} has two sets of weights, {SINGLE} and the parts that {INDEX} lists: move one of them "
                    "away. transformers reads the first; earlier versions of echo_jax read the parts"
                )
            for file in sorted(set(files.values())):
                self.tensors |= _header(folder / file)
            for name, file in files.items():
                if name not in self.tensors or self.tensors[name].file.name != file:
                    raise WeightsError(f"{index} places {name} in {file}, which has no such tensor")
        elif (folder / SINGLE).is_file():
            self.tensors = _header(folder / SINGLE)
        else:
            others = ", ".join(sorted(found))
            advice = f"; {others} cannot be read: let transformers save the model anew" if others else ""
            raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}{advice}")
        self.unread = tuple(sorted(found - {SINGLE} - {tensor.file.name for tensor in self.tensors.values()}))

    @contextlib.contextmanager
    def open(self, name) -> Iterator[Slices]:
        with import_safetensors().safe_open(self.tensors[name].file, "np") as file:
            yield file.get_slice(name)


def _header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file. Its header must be complete, and the file as long as the header says.

    Raises:
      WeightsError: it is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= size else None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is damaged: it has no safetensors header")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            kind, shape, (start, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int for n in (*shape, start, stop)):
                raise ValueError("sizes must be integers")
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} is damaged: its header describes {name} as {str(entry)[:100]}") from error
        if kind not in _DTYPES:
            raise WeightsError(f"{path}: {name} has dtype {kind}, which is not supported, only {', '.join(_DTYPES)}")
        dtype, itemsize = _DTYPES[kind]
        if start < 0 or stop - start != itemsize * math.prod(shape):
            raise WeightsError(f"{path} is damaged: its header places {name} {list(shape)} in bytes {start} to {stop}")
        if (end := 8 + length + stop) > size:
            raise WeightsError(f"{path} is truncated: {name} ends at byte {end}, the file at {size}; fetch it again")
        tensors[name] = Tensor(shape, dtype, path)
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "np"):
            return tensors
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      WeightsError: it cannot be read, or does not hold a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return found


def import_safetensors():
    """Returns the package safetensors, which the core installation does not include."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise WeightsError("published weights need the package safetensors: pip install -e '.[hf]'") from error
    return safetensors


class Gguf:
    """A GGUF file; quantised tensors become float32."""

    unread = ()

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise WeightsError("a GGUF file needs the package gguf: pip install -e '.[hf]'") from error
        self._dequantize, self.read = gguf.dequantize, path.name
        try:
            reader = gguf.GGUFReader(path)
            texts = ("tokenizer.", "general.name", "general.description")
            fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(texts)}
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise WeightsError(f"{path} is damaged: {error}") from error
        self._stored = {self._published(tensor.name): tensor for tensor in reader.tensors}
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            try:
                gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise WeightsError(f"{path}: {tensor.name} has the type {tensor.tensor_type.name}: {error}") from error
        self.tensors = {
            name: Tensor(tuple(int(n) for n in reversed(tensor.shape)), "float32", path)
            for name, tensor in self._stored.items()
        }
        try:
            self.config = self._read_config(fields, path)
        except WeightsError:
            raise
        except (ArithmeticError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} is damaged: a field of its metadata has the wrong type: {error}") from error

    def _published(self, name: str) -> str:
        if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            number, stem, kind = layer.groups()
            return f"model.layers.{number}.{_GGUF_LAYER.get(stem, stem)}.{kind}"
        stem, _, kind = name.rpartition(".")
        return f"{_GGUF_TOP.get(stem, stem)}.{kind}"

    def _read_config(self, fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
        family = fields.get("general.architecture")
        found = {key: fields.get(f"{family}.{gguf_key}") for key, gguf_key in _GGUF_CONFIG.items()}
        config = {"model_type": family} | {key: value for key, value in found.items() if value is not None}
        if embedding := self.tensors.get("model.embed_tokens.weight"):
            config["vocab_size"] = embedding.shape[0]
        if "rms_norm_eps" in config:  # stored as float32
            config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
        config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        if scaling := fields.get(f"{family}.rope.scaling.type"):
            config["rope_scaling"] = {
                "rope_type": scaling,
                "factor": fields.get(f"{family}.rope.scaling.factor"),
                "original_max_position_embeddings": fields.get(f"{family}.rope.scaling.original_context_length"),
            }
        if "rope_freqs.weight" in self._stored:  # Llama 3.1's scaling; the file does not give its parameters
            config["rope_scaling"] = {"rope_type": "llama3, as a table in a GGUF file"}
        if "hidden_size" in config and "num_attention_heads" in config:
            head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
            for key, only in _GGUF_ONLY.items():
                supported = head if only == "head" else only
                if (value := fields.get(f"{family}.{key}", supported)) != supported:
                    raise WeightsError(f"{path}: {family}.{key} = {value} is not supported, only {supported}")
        return config

    @contextlib.contextmanager
    def open(self, name) -> Iterator[Slices]:
        yield self._whole(name)

    def _whole(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        values = self._dequantize(tensor.data, tensor.tensor_type).reshape(self.tensors[name].shape)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and self.config["model_type"] == "llama":
            # GGUF interleaves the two halves of a head that rotate together; this separates them again.
            pairs = values.reshape(self.config[heads], values.shape[0] // self.config[heads] // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values
