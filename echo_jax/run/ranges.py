"""What checks of a config share, above all how large its numbers may be: as large as what computes with them can hold.

In: the name and the value of a field. Out: nothing, or a `ConfigError` that names field, value and range.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from echo_jax.system.errors import ConfigError

# Sizes of arrays, and how many of something there are: at most 2^31 - 1. Other integers must fit 64 bits.
SIZES = (
    *("model.", "lora.", "pack.", "rollout.groups", "rollout.group_size", "rollout.max_tokens"),
    *("warm_start.batch", "warm_start.demonstrations", "optimizer."),
)
MOST_STEPS = 2**31 - 1  # what the counters of updates on devices hold
FLOAT32 = ("model.", "lora.", "loss.", "optimizer.", "warm_start.", "rollout.temperature")  # numbers that devices get
MOST_SECONDS = {"sandbox.": 2e6, "system.": 1e9}  # what the operating system's waits take
LEAST_TEMPERATURE = 1e-6  # below, rounding in the logits decides how likely a token seems


def check_integer(name: str, value: int) -> None:
    most = 2**31 - 1 if name.startswith(SIZES) else 2**63 - 1
    if value > most:
        raise ConfigError(f"config.{name} = {value}: it must be at most {most}")


def check_float(name: str, value: float) -> None:
    """Checks a finite number."""
    if name == "rollout.temperature" and 0 < value < LEAST_TEMPERATURE:
        raise ConfigError(
            f"config.{name} = {value}: it must be at least {LEAST_TEMPERATURE:g}; 0.001 already samples the likeliest "
            "token almost always"
        )
    if name in ("optimizer.b1", "optimizer.b2", "optimizer.momentum") and value < 1 <= np.float32(value):
        raise ConfigError(f"config.{name} = {value}: it must be below 1 as a float32 too, such as 0.99999")
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if name.startswith(FLOAT32) and value != 0 and not least <= abs(value) <= most:
        raise ConfigError(
            f"config.{name} = {value}: float32, which computes with it, holds numbers from {least:.2g} to {most:.2g}, "
            "and 0"
        )
    for section, most in MOST_SECONDS.items():
        if name.startswith(section) and name.endswith("_seconds") and value > most:
            raise ConfigError(f"config.{name} = {value}: it must be at most {most:g} seconds")


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in sorted(values.items()))
