"""ECHO on JAX: policy gradient on action tokens plus next-token cross-entropy on tool output, in one forward pass.

To build your own trainer: `from echo_jax import Role, echo_loss, fused_logprobs, pack`. Importing the package loads
nothing else; each name imports its module on first access.
"""

import importlib

# name -> the module that defines it
_EXPORTS = {
    "Role": "echo_jax.roles",
    "echo_loss": "echo_jax.objective.loss",
    "fused_logprobs": "echo_jax.kernels.fused_logprobs",
    "pack": "echo_jax.objective.packing",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'echo_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
