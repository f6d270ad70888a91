"""The interface between the collector and an engine.

An engine decodes many sessions at once. A session is one rollout: the ids that it holds so far, whoever wrote them.
"""

import dataclasses
from typing import Any, Protocol

from jax.sharding import Mesh

from echo_jax.models.transformer import ModelConfig
from echo_jax.rollout.trajectory import Sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """The arguments that every engine gets."""

    graphdef: Any  # of the transformer, see `bind`
    model_config: ModelConfig
    mesh: Mesh  # of training; an engine uses the devices of it that belong to this process
    sessions: int  # rollouts per step of this process, the most that need be open at once
    max_tokens: int  # of one session
    temperature: float  # of a session that is opened without one
    stop_ids: tuple[int, ...]  # any of them ends a turn
    seed: int  # root of the sampling keys
    reserved_bytes: int = 0  # of each device, which others will take while the engine has its memory


class Engine(Protocol):
    """Samples turns, in one thread. To add one, write a class that takes an `EngineSetup` and, as keyword arguments,
    its options; name it in `ENGINES`, or as `module:Class` in `config.rollout.engine`.

    A session's samples depend only on the weights, the seed, its rollout, its temperature and its ids, never on other
    sessions or on time. A session has one turn at a time, so its handle stands for the turn too. Two methods may be
    lacking: `sleep()`, which gives the memory of weights and pool back until the next `set_params`, and `stats()`,
    which returns counts for the metrics; `PagedEngine` has both.
    """

    sessions: int  # number of sessions that can be open at once

    def set_params(self, params: dict, version: int) -> None:
        """Uses these weights from now on. `version`: the step of the run that they come from.

        Raises:
          RuntimeError: a session is open and would mix two policies.
        """
        ...

    def open(self, rollout: int, group: int, temperature: float | None = None) -> int:
        """Starts an empty session and returns its handle.

        Args:
          rollout: global index, the root of the session's sampling keys.
          group: rollouts of one group start with the same prompt.
          temperature: of its samples; None: the setup's. It is only passed for environments with a temperature of
            their own, so an engine that has no such argument serves runs without them.

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
        """Decodes a few tokens; returns {session: turn} for the sessions that finished one."""
        ...

    def close(self, session: int) -> None:
        """Ends a session in any state. `open` may reuse its handle."""
        ...


def sleep(engine: Engine) -> None:
    """Lets an engine give its memory back, if it can; no session may be open."""
    if hasattr(engine, "sleep"):
        engine.sleep()
