"""What the collector asks of an engine, and what it gets.

An engine decodes many sessions at once. A session is one rollout: the ids that it holds so far, whoever wrote them.
"""

import dataclasses
from typing import Any, Protocol

from jax.sharding import Mesh

from echo_jax.models.transformer import ModelConfig
from echo_jax.rollout.trajectory import Sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """What every engine is made from."""

    graphdef: Any  # of the transformer, see `bind`
    model_config: ModelConfig
    mesh: Mesh  # of the training; an engine uses those of its devices that belong to this process
    sessions: int  # rollouts of one step that this process samples: more need not be open at once
    max_tokens: int  # of one session
    temperature: float
    stop_ids: tuple[int, ...]  # any of them ends a turn
    seed: int  # root of the sampling keys


class Engine(Protocol):
    """Samples turns. One thread uses it. To add one, write a class that takes an `EngineSetup` and, as keyword
    arguments, its options; name it in `ENGINES`, or as `module:Class` in `config.rollout.engine`.

    What a session samples depends on the weights, the seed, its rollout and its ids alone, never on other sessions or
    on time.
    """

    sessions: int  # how many can be open at once

    def set_params(self, params: dict, version: int) -> None:
        """Uses these weights from here on. `version`: the step of the run that they come from.

        Raises:
          RuntimeError: a session is open, and would mix two policies.
        """
        ...

    def open(self, rollout: int, group: int) -> int:
        """Starts an empty session and returns its handle.

        Args:
          rollout: global index, the root of the session's sampling keys.
          group: rollouts of one group begin with the same prompt.

        Raises:
          RuntimeError: `sessions` are open already.
        """
        ...

    def extend(self, session: int, ids: tuple[int, ...], max_new: int) -> None:
        """Appends known ids to a session and asks for a turn of at most `max_new` tokens, which `step` returns.

        Raises:
          ValueError: the session is still sampling, or the ids and the turn do not fit into `max_tokens`.
        """
        ...

    @property
    def busy(self) -> bool:
        """Whether a session is sampling."""
        ...

    def step(self) -> dict[int, Sampled]:
        """Decodes for a while; returns {session: its turn} for those that finished one."""
        ...

    def close(self, session: int) -> None:
        """Ends a session, whatever it is doing. Its handle may be given out again."""
        ...
