"""Rotary position embedding, and the ways in which published models stretch it to longer contexts.

In: a head's size, a base, a scaling. Out: the frequencies, computed on the host; queries and keys, rotated by them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

# kind -> the fields of `RopeScaling` that it uses
SCALINGS = {
    "none": (),
    "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model reaches `factor` times the context that it was trained with; see config.py for the fields."""

    kind: str = "none"  # of SCALINGS
    factor: float = 1.0
    original_length: int = 8192
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: from `factor`


NO_SCALING = RopeScaling()


class Rope(NamedTuple):
    frequency: np.ndarray  # f32 [K / 2], radians per token
    factor: float  # multiplies the rotated vectors


def frequencies(head_dim: int, theta: float, scaling: RopeScaling = NO_SCALING) -> Rope:
    """Returns the frequencies of arXiv 2104.09864, scaled."""
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling.kind == "llama3":
        return Rope(_llama3(plain, scaling).astype(np.float32), 1.0)
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
        return Rope(_yarn(plain, theta, scaling).astype(np.float32), factor)
    return Rope(plain.astype(np.float32), 1.0)


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's scaling: stretches waves longer than the old context, keeps short ones, and blends those between."""
    turns = scaling.original_length * frequency / (2 * math.pi)  # within the old context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - unscaled) * frequency / scaling.factor + unscaled * frequency


def _yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN's scaling (arXiv 2309.00071, eq. 17 to 19), with the bounds rounded outwards as in its authors' code."""
    head_dim = 2 * len(frequency)

    def index(turns: float) -> float:  # of the frequency that makes this many turns within the old context
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), head_dim - 1)
    stretched = np.clip((np.arange(len(frequency)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return stretched * frequency / scaling.factor + (1.0 - stretched) * frequency


def rotate(x, positions, rope: Rope):
    """Rotates x [..., H, K] by positions [...], in f32; pairs entry i with entry i + K / 2 (halves convention)."""
    angle = positions[..., None, None].astype(jnp.float32) * rope.frequency
    sin, cos = jnp.sin(angle) * rope.factor, jnp.cos(angle) * rope.factor
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
