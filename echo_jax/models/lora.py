"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen matrix W acts as W + scale · A B, and only A and B are trained.

In: parameters with adapters, one plain tree. Out: the part that is trained and the part that is not; the tree without
adapters, which acts alike.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

A, B = "_lora_a", "_lora_b"  # behind the name of the matrix that they adapt


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices of each layer have an adapter; `rank` 0: none, and the whole model is trained."""

    rank: int = 0
    alpha: float = 1.0
    targets: tuple[str, ...] = ()  # of transformer.LINEAR

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


NO_ADAPTERS = Lora()


def init_a(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Returns a fresh A, as PEFT draws it; a fresh B is zero, so that training begins with the model as it is."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def split(params: dict) -> tuple[dict, dict]:
    """Returns what is trained and what is frozen: the adapters and the rest or, without adapters, all and nothing."""
    if not any(is_adapter(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        return params, {}
    return _select(params, is_adapter), without(params)


def without(params: dict) -> dict:
    """Returns the parameters that are no adapters."""
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
    """Returns the one tree that `split` took apart."""
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(value, frozen.get(name, {})) if isinstance(value, dict) else value
    return joined


def merged(layers: dict, name: str, index: tuple[int, ...], lora: Lora) -> jax.Array:
    """Returns a parameter of one layer, `index` (layer,), with what its adapter adds, in float32; or as it is if it has
    none, where `index` may go on to an expert."""
    x = layers[name][index]
    if not lora.rank or name not in lora.targets:
        return x
    added = jnp.tensordot(layers[name + A][index], layers[name + B][index], 1, precision="highest")
    return x.astype(jnp.float32) + lora.scale * added
