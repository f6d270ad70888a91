"""Analytic FLOPs of training, bytes of sampling, and the peak of a chip: what arithmetic needs, not what is done.

Two FLOPs per weight and token forward, four backward, of which a frozen weight needs two. Recomputation is not counted;
of the experts, only those that a token goes to count. Causal attention: every token with itself and those before it in
its segment.
"""

import math

import jax
import jax.numpy as jnp

from echo_jax.models import lora
from echo_jax.models.transformer import EXPERT, ModelConfig

# bf16 FLOP/s by `jax.Device.device_kind`; TPUs from cloud.google.com/tpu/docs, GPUs from NVIDIA's data sheets (dense)
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def train_flops(model: ModelConfig, tokens: float, pairs: float) -> float:
    """Returns the FLOPs of forward and backward over `tokens`, with `pairs` of a token and a token it attends to."""
    weights, adapter = _multiplied(model)
    attention = model.num_layers * 2 * model.num_heads * model.head_dim  # scores, and the weighted sum of values
    if not model.lora.rank:
        return 6.0 * (weights * tokens + attention * pairs)
    return (4.0 * weights + 6.0 * adapter) * tokens + 6.0 * attention * pairs


def decode_bytes(model: ModelConfig, tokens: float) -> float:
    """Returns the least bytes to read for one more token in each of any number of sequences that hold `tokens` in all:
    every weight that multiplies once, every key and value once. Of a mixture of experts, those of one sequence, as if
    all chose the same. Norms, biases and the looked-up rows of the embedding do not count."""
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim * tokens
    return (sum(_multiplied(model)) + cached) * jnp.dtype(model.compute_dtype).itemsize


def _multiplied(model: ModelConfig) -> tuple[int, int]:
    """Returns the number of weights that multiply a token, without the adapters' and of the adapters."""
    one = lambda name: math.prod(model.sizes(name)[name in EXPERT :])  # noqa: E731
    layer = sum(one(name) * (model.experts_per_token if name in EXPERT else 1) for name in model.matrices)
    targets = model.lora.targets if model.lora.rank else ()
    adapter = sum(math.prod(model.sizes(name + part)) for name in targets for part in (lora.A, lora.B))
    return model.num_layers * layer + model.vocab_size * model.embed_dim, model.num_layers * adapter


def utilisation(flops_per_second: float, devices: list[jax.Device]) -> float | None:
    """Returns the share of the devices' peak (MFU); None if the peak is unknown."""
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return None if peak is None else flops_per_second / (peak * len(devices))
