"""Sampling: an engine decodes many sessions of a policy at once.

In: the new ids of each session. Out: sampled ids, their log-probs, entropies and policy versions. `interface.py`
defines an engine. To add one, write a class and a line in `ENGINES`, or name it as `module:Class` in
`config.rollout.engine`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from echo_jax.config import ConfigError
from echo_jax.rollout.engine.interface import Engine, EngineSetup
from echo_jax.rollout.engine.paged import PagedEngine
from echo_jax.system import named

__all__ = ["ENGINES", "Engine", "EngineSetup", "find_engine"]

ENGINES: dict[str, Callable[..., Engine]] = {"paged": PagedEngine}


def find_engine(name: str, options: Mapping[str, Any]) -> Callable[..., Engine]:
    """Returns the class or function that makes an engine from an `EngineSetup` and these options.

    Raises:
      ConfigError: the engine does not exist, or does not take these options.
    """
    if name == "dense":
        raise ConfigError("config.rollout.engine = 'dense': the paged engine took its place, set 'paged'")
    make = named.find(name, ENGINES, "rollout.engine")
    named.check_callable(make, name, "rollout.engine")
    named.check_options(make, options, "rollout.engine_options", given=1)
    return make
