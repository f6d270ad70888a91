"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W acts as W + scale · A B, and only A and B are trained.

In: parameters with adapters, one plain tree. Out: the trained part and the frozen part; parameters with their adapters
merged in, which act alike.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

A, B = "_lora_a", "_lora_b"  # suffixes to the name of the adapted matrix


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices of each layer have an adapter. With `rank` 0 none has, and the whole model is trained."""

    rank: int = 0
    alpha: float = 1.0
    targets: tuple[str, ...] = ()  # of transformer.LINEAR

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


NO_ADAPTERS = Lora()


def init_a(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Draws an initial A as PEFT does. An initial B is zero, so that training starts from the unchanged model."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def split(params: dict) -> tuple[dict, dict]:
    """Returns (trained, frozen) parameters: the adapters and the others or, without adapters, all and none."""
    if not any(is_adapter(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        return params, {}
    return _select(params, is_adapter), without(params)


def without(params: dict) -> dict:
    """Returns the parameters without the adapters."""
    return _select(params, lambda name: not is_adapter(name))


def _select(tree: dict, keep: Callable[[str], bool]) -> dict:
    chosen = {}
    for name, value in tree.items():
        if not isinstance(value, dict):
            if keep(name):
                chosen[name] = value
        elif below := _select(value, keep):
            chosen[name] = below
    return chosen


def join(trained: dict, frozen: dict) -> dict:
    """Inverts `split`: returns the one tree."""
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(value, frozen.get(name, {})) if isinstance(value, dict) else value
    return joined


def merged(layers: dict, name: str, index: tuple[int, ...], lora: Lora) -> jax.Array:
    """Returns a parameter of one layer, `index` (layer,), with its adapter merged in, in float32. Returns a parameter
    without an adapter unchanged; `index` may then also be (layer, expert)."""
    x = layers[name][index]
    if not lora.rank or name not in lora.targets:
        return x
    added = jnp.tensordot(layers[name + A][index], layers[name + B][index], 1, precision="highest")
    return x.astype(jnp.float32) + lora.scale * added
