"""The built-in chat format, for models trained from scratch.

    <|task|> prompt <|assistant|> bash ls <|end|> <|tool|> output <|note|> exit 2 <|end|> <|assistant|>
    ...

A user's message within the episode is `<|task|> … <|end|>`, like the task, and a system message `<|note|> … <|end|>`.
Control symbols separate all parts. So encoding the parts one by one equals encoding them in one pass, the tokens of a
body decode to exactly that body, and no tool output can imitate a notice of the harness.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from echo_jax.render.base import NO_TOOLS, Part, Rendered
from echo_jax.roles import BODIES, SPEAKERS, Role
from echo_jax.tokenizer import SentencePieces

if TYPE_CHECKING:
    from echo_jax.tools.tool import Tool


class BuiltinRenderer:
    """The built-in format over the SentencePiece tokenizer."""

    opens_reasoning = False
    speakers = tuple(SPEAKERS)

    def __init__(self, tokenizer: SentencePieces):
        self.tokenizer = tokenizer
        self.stop_ids = self.control_ids = (tokenizer.end,)  # calls have no markers, or markers in plain pieces
        self.observation_header = (tokenizer.tool,)
        self._openings = {"tool": tokenizer.tool, "user": tokenizer.task, "system": tokenizer.note}

    def prompt(self, text: str, tools: "Mapping[str, Tool]" = NO_TOOLS) -> Rendered:
        """Ignores `tools`: a model trained from scratch learns them from demonstrations."""
        return self._scaffold(self.tokenizer.task) + self._text(text, Role.PROMPT)

    def generation_prompt(self) -> Rendered:
        return self._scaffold(self.tokenizer.assistant)

    def close_turn(self) -> Rendered:
        return self._scaffold(self.tokenizer.end)

    def action(self, text: str) -> Rendered:
        return self._text(text, Role.ACTION) + Rendered((self.tokenizer.end,), (Role.ACTION,))

    def observation(
        self, parts: Iterable[Part], *, first: bool = True, last: bool = True, speaker: str = "tool"
    ) -> Rendered:
        """Renders every observation of a speaker alike: `first` and `last` have no effect."""
        opening = self._scaffold(self._openings[speaker])
        rendered = opening
        for i, part in enumerate(parts):
            if part.role not in BODIES:
                rendered += self._scaffold(self.tokenizer.note)
            elif i:
                rendered += opening
            rendered += self._text(part.text, part.role)
        return rendered + self._scaffold(self.tokenizer.end)

    def turn_text(self, ids: Iterable[int]) -> str:
        ids = tuple(ids)
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)

    def _text(self, text: str, role: Role) -> Rendered:
        ids = tuple(self.tokenizer.encode(text))
        return Rendered(ids, (role,) * len(ids))

    @staticmethod
    def _scaffold(token: int) -> Rendered:
        return Rendered((token,), (Role.SCAFFOLD,))
