"""Chat formats and tool-call grammars: the built-in ones, and those of published models.

In: the text of a prompt, a turn, an observation. Out: ids with their writers; and, from the text of a turn, the calls
that it attempts (`calls.py`).
"""

from echo_jax.render.base import Part, Rendered, Renderer
from echo_jax.render.builtin import BuiltinRenderer
from echo_jax.render.chat import FORMATS, ChatRenderer, RenderError
from echo_jax.tokenizer import BytePairs, Tokenizer

__all__ = ["FORMATS", "BuiltinRenderer", "ChatRenderer", "Part", "RenderError", "Rendered", "Renderer", "make_renderer"]


def make_renderer(tokenizer: Tokenizer, format: str, *, grammar: str, thinking: bool, system: str) -> Renderer:
    """Returns the renderer of a format, `builtin` or one of FORMATS.

    Args:
      grammar: of tool calls, a key of calls.GRAMMARS.
      thinking: whether turns start with reasoning, in formats that support it.
      system: the system message; empty: none is added.

    Raises:
      RenderError: the tokenizer does not fit the format, or the format does not support an option.
    """
    if format != "builtin":
        if not isinstance(tokenizer, BytePairs):
            raise RenderError(
                f"config.render.format = {format!r} needs a published model's tokenizer, not a SentencePiece model: "
                "set config.tokenizer.path to that tokenizer, or config.model.weights to the model's weights"
            )
        return ChatRenderer(tokenizer, format, grammar=grammar, thinking=thinking, system=system)
    if isinstance(tokenizer, BytePairs):
        raise RenderError(
            "config.render.format = 'builtin' has symbols that a published tokenizer lacks; choose one of "
            + ", ".join(FORMATS)
        )
    if system or not thinking:
        raise RenderError(
            "config.render.format = 'builtin' does not support config.render.system and thinking = False: remove them"
        )
    return BuiltinRenderer(tokenizer)
