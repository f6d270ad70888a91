"""The interface of chat formats: text to ids with their writers, and a sampled turn back to text."""

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
    """New tokens of a trajectory and the writer of each."""

    ids: tuple[int, ...]
    roles: tuple[Role, ...]

    def __add__(self, other: "Rendered") -> "Rendered":
        return Rendered(self.ids + other.ids, self.roles + other.roles)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an observation with one writer: a body (a role of BODIES) or a notice of the harness."""

    text: str
    role: Role


class Renderer(Protocol):
    """Renders the pieces of a trajectory. A trajectory is these pieces, one after the other, with sampled turns
    between; no piece is encoded again."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # any of them ends a sampled turn
    # Ids that end a turn, or that open or close a call. A marker that the tokenizer spells in plain pieces is none: in
    # the grammar `plain`, and with a tokenizer without such tokens, only what ends a turn counts.
    control_ids: tuple[int, ...]
    observation_header: tuple[int, ...]  # ids before the body of every observation, which no action should contain
    speakers: tuple[str, ...]  # whose turns the format can show within a conversation, of SPEAKERS
    opens_reasoning: bool  # whether the generation prompt ends within reasoning, which a turn must close before it acts

    def prompt(self, text: str, tools: "Mapping[str, Tool]" = NO_TOOLS) -> Rendered:
        """Renders the task and, if the format does so, a description of the agent's tools."""
        ...

    def generation_prompt(self) -> Rendered:
        """Renders the opening of an agent's turn."""
        ...

    def close_turn(self) -> Rendered:
        """Renders the end of a turn that was cut off; it is not sampled and never trained."""
        ...

    def action(self, text: str) -> Rendered:
        """Renders a demonstrator's turn, stop token included."""
        ...

    def observation(
        self, parts: Iterable[Part], *, first: bool = True, last: bool = True, speaker: str = "tool"
    ) -> Rendered:
        """Renders one answer to a turn.

        Args:
          first, last: whether it is the first or last of that turn's answers.
          speaker: whose turn it is in the format, a key of SPEAKERS. Only a sole answer can be another's than a tool's.
        """
        ...

    def turn_text(self, ids: Iterable[int]) -> str:
        """Returns the text of an agent's turn, without its stop token."""
        ...
