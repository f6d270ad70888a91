"""Analytic FLOPs of training, and the peak of a chip: the FLOPs that a model's arithmetic needs, not those executed.

Two FLOPs per weight and token forward, four backward, of which a frozen weight needs two. Recomputation is not counted;
of the experts, only those that a token goes to count. Causal attention: every token with itself and those before it in
its segment.
"""

import math

import jax

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
    one = lambda name: math.prod(model.sizes(name)[name in EXPERT :])  # noqa: E731
    layer = sum(one(name) * (model.experts_per_token if name in EXPERT else 1) for name in model.matrices)
    weights = model.num_layers * layer + model.vocab_size * model.embed_dim
    attention = model.num_layers * 2 * model.num_heads * model.head_dim  # scores, and the weighted sum of values
    if not model.lora.rank:
        return 6.0 * (weights * tokens + attention * pairs)
    adapter = sum(math.prod(model.sizes(name + part)) for name in model.lora.targets for part in (lora.A, lora.B))
    return (4.0 * weights + 6.0 * model.num_layers * adapter) * tokens + 6.0 * attention * pairs


def utilisation(flops_per_second: float, devices: list[jax.Device]) -> float | None:
    """Returns the share of the devices' peak (MFU); None if the peak is unknown."""
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return None if peak is None else flops_per_second / (peak * len(devices))
