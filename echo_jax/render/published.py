"""The formats of the package `renderers` (PrimeIntellect, Apache-2.0), rendered one piece of a conversation at a time.

The package tells the message of each token and whether it is content; our stamps tell which part of the content.
"""

from collections.abc import Sequence
from typing import Any

from echo_jax.render.marks import Marks, Stamped
from echo_jax.render.template import RenderError
from echo_jax.roles import Role
from echo_jax.tokenizer import BytePairs

Token = tuple[int, Role]


class _Adapter:
    """Adapts our tokenizer to `renderers`; stamps the ids that it encodes."""

    unk_token_id = None

    def __init__(self, tokenizer: BytePairs, marks: Marks):
        self._tokenizer, self._marks = tokenizer, marks
        self.name_or_path = ""
        self.eos_token_id = tokenizer.end

    def __call__(self, text: str, **_: Any) -> dict[str, list]:
        ids, starts = self._marks.encode(self._tokenizer, text)
        return {"input_ids": ids, "offset_mapping": [(start, start + 1) for start in starts]}

    def encode(self, text: str, **_: Any) -> list[int]:
        return self._marks.encode(self._tokenizer, text)[0]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return self._tokenizer.decode(ids)

    def convert_tokens_to_ids(self, name: str) -> int | None:
        return self._tokenizer.id_of(name)


class _Published:
    """A format of `renderers`; subclasses implement `_make`."""

    grammar: str
    trims: bool

    def __init__(self, tokenizer: BytePairs, thinking: bool):
        self._tokenizer, self._thinking = tokenizer, thinking
        try:
            renderer = self._make(self._adapter(_NONE))
        except ImportError as error:
            raise RenderError("this chat format needs the package renderers: pip install -e '.[hf]'") from error
        except (AssertionError, TypeError) as error:
            raise RenderError(f"the tokenizer lacks a token of this chat format: {error}") from error
        self.stop_ids = tuple(renderer.get_stop_token_ids())
        question = [{"role": "user", "content": "x"}]
        asked = renderer.render_ids(question)
        self._opening = [int(i) for i in renderer.render_ids(question, add_generation_prompt=True)[len(asked) :]]

    def _make(self, tokenizer: _Adapter):
        raise NotImplementedError

    def _adapter(self, marks: Marks) -> _Adapter:
        return _Adapter(self._tokenizer, marks)

    def prompt(self, messages, tools, marks):
        rendered = self._make(self._adapter(marks)).render(messages, tools=tools)
        return _attributed(rendered.token_ids, rendered.is_content)

    def generation_prompt(self):
        return self._opening

    def answer(self, content, marks, *, first, last, speaker):
        """Renders the text after a stop token, with empty messages before and after this one if there are others."""
        empty = {"role": "tool", "content": ""}
        messages = [empty] * (not first) + [{"role": speaker, "content": content}] + [empty] * (not last)
        rendered = self._make(self._adapter(marks)).bridge_to_next_turn(self._opening, [self.stop_ids[0]], messages)
        if rendered is None:
            raise RenderError(f"this chat format does not accept a message of role {speaker} after a turn")
        message = 0 if first else 1
        indices = rendered.message_indices
        end = len(indices) - indices[::-1].index(message)
        start = len(self._opening) + 1 if first else indices.index(message)
        return _attributed(rendered.token_ids[start:end], rendered.is_content[start:end])


def _attributed(ids: Sequence[int], is_content: Sequence[bool]) -> list[Token]:
    """Returns tokens with their writers. Content without a stamp, such as the quotes around a JSON string, belongs to
    the nearest part."""
    stamps = [i.role if isinstance(i, Stamped) else None for i in ids]
    known = [k for k, stamp in enumerate(stamps) if stamp is not None]
    tokens = []
    for k, (token, content) in enumerate(zip(ids, is_content, strict=True)):
        if not content:
            tokens.append((int(token), Role.SCAFFOLD))
        elif stamps[k] is not None:
            tokens.append((int(token), stamps[k]))
        else:
            nearest = stamps[min(known, key=lambda other, k=k: abs(other - k))] if known else Role.OBSERVATION
            tokens.append((int(token), nearest))
    return tokens


_NONE = Marks(())


class Qwen3(_Published):
    grammar, trims = "json", False

    def _make(self, tokenizer):
        from renderers.configs import Qwen3RendererConfig
        from renderers.qwen3 import Qwen3Renderer

        # "all": a user's message does not remove earlier thinking, which stays in the context.
        return Qwen3Renderer(tokenizer, Qwen3RendererConfig(enable_thinking=self._thinking, thinking_retention="all"))


class Llama3(_Published):
    grammar, trims = "llama", True

    def __init__(self, tokenizer, thinking):
        if not thinking:
            raise RenderError("config.render.format = 'llama_3' does not support config.render.thinking = False")
        super().__init__(tokenizer, thinking)

    def _make(self, tokenizer):
        from renderers.llama_3 import Llama3Renderer

        return Llama3Renderer(tokenizer)
