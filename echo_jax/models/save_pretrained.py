"""Writes trained weights as a folder that transformers and inference servers load; and adapters, in PEFT's layout.

In: parameters on a mesh. Out: safetensors and their index; for adapters also adapter_config.json. One tensor at a time
comes to the host, which never holds more than the tensors of one file.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from echo_jax.models import lora
from echo_jax.models.families import LAYER_NAMES, Place, published_shape, tensor_names
from echo_jax.models.sources import INDEX, SINGLE, import_safetensors
from echo_jax.models.transformer import LINEAR, MATRICES, ModelConfig

FILE_BYTES = 2 << 30  # of tensors in one file, unless a single tensor is larger


def write_weights(
    params: dict,
    config: ModelConfig,
    folder: Path | None,
    *,
    dtype: str,
    file_bytes: int = FILE_BYTES,
    on_tensor: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the tensors of a model, rounded to `dtype`, with adapters merged into the matrices that they adapt.

    All processes must call it; process 0 writes, the others need no folder.
    """
    files = list(_files(config, np.dtype(jax.numpy.dtype(dtype)).itemsize, file_bytes))
    done, where = 0, {}
    for number, names in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for published, (parameter, index) in names.items():
            layers = params["layers"]
            x = lora.merged(layers, parameter, index, config.lora) if index else params[parameter]
            tensors[published] = to_published(_fetch(x), parameter).astype(jax.numpy.dtype(dtype))
            done += 1
            on_tensor(done)
        where |= dict.fromkeys(names, name)
        _save(tensors, folder, name)
    if len(files) > 1 and jax.process_index() == 0:
        total = sum(np.prod(published_shape(config, p)) for p, _ in tensor_names(config).values())
        size = int(total) * np.dtype(jax.numpy.dtype(dtype)).itemsize
        index = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
        (folder / INDEX).write_text(index, encoding="utf-8")


def _files(config: ModelConfig, itemsize: int, file_bytes: int) -> Iterator[dict[str, Place]]:
    """Yields the tensors of each file."""
    chosen, size = {}, 0
    for name, place in tensor_names(config).items():
        tensor_bytes = int(np.prod(published_shape(config, place.parameter))) * itemsize
        if chosen and size + tensor_bytes > file_bytes:
            yield chosen
            chosen, size = {}, 0
        chosen[name] = place
        size += tensor_bytes
    yield chosen


def write_adapter(params: dict, config: ModelConfig, folder: Path | None, *, base: str, dtype: str) -> None:
    """Writes the adapters alone in PEFT's layout, rounded to `dtype`. All processes must call it, as `write_weights`.

    Args:
      base: the name of the weights that they adapt.
    """
    tensors = {}
    for name in config.lora.targets:
        inputs, module = len(LINEAR[name][0]), LAYER_NAMES[name].removesuffix(".weight")
        for layer in range(config.num_layers):
            stem = f"base_model.model.model.layers.{layer}.{module}"
            a, b = (_fetch(params["layers"][name + part][layer]) for part in (lora.A, lora.B))
            tensors[f"{stem}.lora_A.weight"] = _matrix(a, inputs).astype(jax.numpy.dtype(dtype))
            tensors[f"{stem}.lora_B.weight"] = _matrix(b, 1).astype(jax.numpy.dtype(dtype))
    _save(tensors, folder, "adapter_model.safetensors")
    described: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [LAYER_NAMES[name].split(".")[1] for name in config.lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if jax.process_index() == 0:
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def to_published(x: np.ndarray, parameter: str) -> np.ndarray:
    """Returns a parameter of one layer in the layout of its published tensor; `pretrained.py` does the reverse."""
    if parameter in MATRICES:
        return _matrix(x, len(MATRICES[parameter][0]))
    return x if parameter in ("embedding", "lm_head") else x.reshape(-1)


def _matrix(x: np.ndarray, inputs: int) -> np.ndarray:
    """Returns the matrix [outputs, inputs] of an array whose first `inputs` dimensions are the inputs."""
    return np.ascontiguousarray(x.reshape(int(np.prod(x.shape[:inputs])), -1).T)


def _fetch(x: jax.Array) -> np.ndarray:
    """Brings a whole array to every host."""
    if not x.is_fully_addressable:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec())).addressable_data(0)
    return np.asarray(x)


def _save(tensors: dict[str, np.ndarray], folder: Path | None, name: str) -> None:
    if jax.process_index() == 0:
        import_safetensors().numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
