"""Chat formats and the grammars of tool calls: the built-in ones, and those of published models.

In: the text of a prompt, a turn, an observation. Out: ids that know their writer; and from a turn's text, the calls
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
      grammar: of tool calls, of calls.GRAMMARS.
      thinking: whether turns begin with reasoning, where a format knows that.
      system: the system message; empty: none of our own.

    Raises:
      RenderError: the tokenizer does not fit the format, or an option means nothing to it.
    """
    if format != "builtin":
        if not isinstance(tokenizer, BytePairs):
            raise RenderError(
                f"config.render.format = {format!r} is a published model's, the tokenizer is the built-in one or its "
                "like: name the model's own in config.tokenizer.path, or its weights in config.model.weights"
            )
        return ChatRenderer(tokenizer, format, grammar=grammar, thinking=thinking, system=system)
    if isinstance(tokenizer, BytePairs):
        raise RenderError(
            "config.render.format = 'builtin' has symbols that a published tokenizer lacks; choose one of "
            + ", ".join(FORMATS)
        )
    if system or not thinking:
        raise RenderError("config.render.system and thinking = False mean nothing to config.render.format = 'builtin'")
    return BuiltinRenderer(tokenizer)
