"""The chat formats of published models.

In: a model's tokenizer. Out: a `Renderer`. The templates come from elsewhere: `qwen3` and `llama_3` from the package
`renderers`, `template` is the Jinja template of the tokenizer. This module asks them for one piece of a conversation at
a time and tracks the writer of every token.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from echo_jax.render.base import NO_TOOLS, Part, Rendered
from echo_jax.render.calls import GRAMMARS, REASONING, describe
from echo_jax.render.marks import Marks
from echo_jax.render.published import Llama3, Qwen3
from echo_jax.render.template import RenderError, Template
from echo_jax.roles import BODIES, SPEAKERS, Role
from echo_jax.tokenizer import BytePairs

if TYPE_CHECKING:
    from echo_jax.tools.tool import Tool

__all__ = ["FORMATS", "ChatRenderer", "RenderError"]

Token = tuple[int, Role]


class Format(Protocol):
    """A published format, rendered one piece of a conversation at a time. The contents of messages carry marks."""

    stop_ids: tuple[int, ...]
    grammar: str  # of the tool calls that the format itself explains to the agent if given tools; "": none
    trims: bool  # whether it strips white space from the ends of prompts

    def prompt(self, messages: list[dict], tools: list[dict] | None, marks: Marks) -> list[Token]: ...

    def generation_prompt(self) -> list[int]: ...

    def answer(self, content: str, marks: Marks, *, first: bool, last: bool, speaker: str) -> list[Token]:
        """Renders one message of role `tool`, `user` or `system`, from after the stop token or after the message before
        it."""
        ...


FORMATS = {"qwen3": Qwen3, "llama_3": Llama3, "template": Template}


class ChatRenderer:
    """A published format over its model's tokenizer.

    A notice of the harness is in brackets, on a separate line: `[exit 2]`.
    """

    def __init__(self, tokenizer: BytePairs, format: str, *, grammar: str, thinking: bool = True, system: str = ""):
        self.tokenizer = tokenizer
        self._format: Format = FORMATS[format](tokenizer, thinking)
        self._grammar, self._system = grammar, system
        self.stop_ids = self._format.stop_ids
        markers = map(tokenizer.id_of, GRAMMARS[grammar].markers)
        self.control_ids = tuple(dict.fromkeys((*self.stop_ids, *filter(tokenizer.is_added, markers))))
        opening = self._format.generation_prompt()
        self._opening = Rendered(tuple(opening), (Role.SCAFFOLD,) * len(opening))
        opened, closed = map(tokenizer.decode(opening).rfind, REASONING)
        self.opens_reasoning = opened > closed
        before = self.observation([Part("a probe of two lines\n" * 2, Role.OBSERVATION)])
        if Role.OBSERVATION not in before.roles:
            raise RenderError(
                "this chat format changes a tool's answer, so its tokens cannot be attributed; choose another"
            )
        header = before.ids[: before.roles.index(Role.OBSERVATION)]
        self.speakers = tuple(filter(self._can_show, SPEAKERS))
        self.observation_header = tuple(i for i in header if tokenizer.is_added(i))[-1:]

    def prompt(self, text: str, tools: "Mapping[str, Tool]" = NO_TOOLS) -> Rendered:
        named = tools if self._format.grammar == self._grammar else {}
        told = [self._system, "" if named or not tools else GRAMMARS[self._grammar].instructions(describe(tools))]
        system = "\n\n".join(filter(None, told))
        marks = Marks([text, system])
        messages = [{"role": "system", "content": self._body(system, marks)}] if system else []
        messages.append({"role": "user", "content": self._body(text, marks)})
        return _rendered(self._format.prompt(messages, describe(named) if named else None, marks))

    def _body(self, text: str, marks: Marks) -> str:
        core = text.strip() if self._format.trims else text
        return marks.body([Part(core, Role.PROMPT)])

    def generation_prompt(self) -> Rendered:
        return self._opening

    def close_turn(self) -> Rendered:
        return Rendered(self.stop_ids[:1], (Role.SCAFFOLD,))

    def action(self, text: str) -> Rendered:
        thought = f"{REASONING[1]}\n\n" if self.opens_reasoning else ""  # a demonstrator acts without reasoning
        ids = (*self.tokenizer.encode_markup(thought + text), self.stop_ids[0])
        return Rendered(ids, (Role.ACTION,) * len(ids))

    def observation(
        self, parts: Iterable[Part], *, first: bool = True, last: bool = True, speaker: str = "tool"
    ) -> Rendered:
        spoken = _spoken(list(parts))
        marks = Marks(part.text for part in spoken)
        return _rendered(self._format.answer(marks.body(spoken), marks, first=first, last=last, speaker=speaker))

    def _can_show(self, speaker: str) -> bool:
        """Returns whether the format takes a message of this speaker after a turn. Many templates have a system message
        only at the start: they raise an exception for another, drop it, or move it there."""
        try:
            self.observation([Part("a probe", SPEAKERS[speaker])], speaker=speaker)
        except RenderError:
            return False
        return True

    def turn_text(self, ids: Iterable[int]) -> str:
        ids = tuple(ids)
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.stop_ids else ids)


def _spoken(parts: list[Part]) -> list[Part]:
    """Returns the parts with each notice in brackets and on a separate line."""
    spoken: list[Part] = []
    for i, part in enumerate(parts):
        if part.role in BODIES:
            spoken.append(part)
            continue
        written = spoken[-1].text if spoken else ""
        before = "\n" if written and not written.endswith("\n") else ""
        after = "\n" if i + 1 < len(parts) else ""
        spoken.append(Part(f"{before}[{part.text}]{after}", part.role))
    return spoken


def _rendered(tokens: list[Token]) -> Rendered:
    return Rendered(tuple(int(i) for i, _ in tokens), tuple(role for _, role in tokens))
