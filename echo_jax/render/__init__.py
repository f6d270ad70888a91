"""Turns text into ids that know their writer: the built-in chat format.

    <|task|> what the agent reads <|assistant|> bash ls <|end|> <|tool|> output <|note|> exit 2 <|end|> <|assistant|>
    ...

Control symbols stand between all parts, so encoding the parts one by one is the same as encoding them in one pass, a
body's tokens decode to exactly that body, and no tool output can imitate a notice of the harness.
"""

import dataclasses
from collections.abc import Iterable

from echo_jax.roles import Role
from echo_jax.tokenizer import Tokenizer


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


class Renderer:
    """The built-in chat format over a `Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.end
        self.observation_header = (tokenizer.tool,)  # what every observation begins with, and no action should

    def prompt(self, text: str) -> Rendered:
        return self._scaffold(self.tokenizer.task) + self._text(text, Role.PROMPT)

    def generation_prompt(self) -> Rendered:
        """What stands before a turn of the agent."""
        return self._scaffold(self.tokenizer.assistant)

    def close_turn(self) -> Rendered:
        """The close of a turn that was cut off: not sampled, never trained."""
        return self._scaffold(self.tokenizer.end)

    def action(self, text: str) -> Rendered:
        """A demonstrator's turn, stop token included."""
        return self._text(text, Role.ACTION) + Rendered((self.tokenizer.end,), (Role.ACTION,))

    def observation(self, parts: Iterable[Part]) -> Rendered:
        rendered = self._scaffold(self.tokenizer.tool)
        for i, part in enumerate(parts):
            if part.role != Role.OBSERVATION:
                rendered += self._scaffold(self.tokenizer.note)
            elif i:
                rendered += self._scaffold(self.tokenizer.tool)
            rendered += self._text(part.text, part.role)
        return rendered + self._scaffold(self.tokenizer.end)

    def turn_text(self, ids: Iterable[int]) -> str:
        """What the agent wrote in a turn, its stop token left out."""
        ids = tuple(ids)
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] == self.stop_id else ids)

    def _text(self, text: str, role: Role) -> Rendered:
        ids = tuple(self.tokenizer.encode(text))
        return Rendered(ids, (role,) * len(ids))

    @staticmethod
    def _scaffold(token: int) -> Rendered:
        return Rendered((token,), (Role.SCAFFOLD,))
