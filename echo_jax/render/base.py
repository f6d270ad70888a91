"""What every chat format does: text into ids that know their writer, and a sampled turn back into text."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from echo_jax.roles import Role
from echo_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from echo_jax.tools.tool import Tool

NO_TOOLS: Mapping = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Rendered:
    """New tokens of a trajectory and who wrote each."""

    ids: tuple[int, ...]
    roles: tuple[Role, ...]

    def __add__(self, other: "Rendered") -> "Rendered":
        return Rendered(self.ids + other.ids, self.roles + other.roles)


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of an observation with one writer: a body (OBSERVATION) or a notice of the harness."""

    text: str
    role: Role


class Renderer(Protocol):
    """A trajectory is what these give, one behind the other, with sampled turns between: none is encoded again."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # any of them ends a sampled turn
    observation_header: tuple[int, ...]  # what every observation has before its body, and no action should have

    def prompt(self, text: str, tools: "Mapping[str, Tool]" = NO_TOOLS) -> Rendered:
        """The task and, where a format does so, a description of the agent's tools."""
        ...

    def generation_prompt(self) -> Rendered:
        """What stands before a turn of the agent."""
        ...

    def close_turn(self) -> Rendered:
        """The close of a turn that was cut off: not sampled, never trained."""
        ...

    def action(self, text: str) -> Rendered:
        """A demonstrator's turn, stop token included."""
        ...

    def observation(self, parts: Iterable[Part], *, first: bool = True, last: bool = True) -> Rendered:
        """One answer to a turn. `first`, `last`: whether it is of those that the turn gets."""
        ...

    def turn_text(self, ids: Iterable[int]) -> str:
        """What the agent wrote in a turn, its stop token left out."""
        ...
