"""A tokenizer's chat template in Jinja, run as in `transformers` (ChatML and the like).

A piece of a conversation is the difference between two texts that the template renders: a short conversation with the
piece, and one without. A template whose pieces do not add up is refused when the renderer is made.
"""

import json
from typing import Any

from echo_jax.render.base import Part
from echo_jax.render.marks import Marks
from echo_jax.roles import Role
from echo_jax.system.errors import UserError
from echo_jax.tokenizer import BytePairs

Token = tuple[int, Role]


class RenderError(UserError, ValueError):
    """A chat format cannot be used with this tokenizer or these options."""


class Template:
    """The tokenizer's template. It describes the tools if it takes any; otherwise the system message does.

    Messages are never cut. If the template would cut them (for example at `</think>`), it gets only the marks of the
    messages, and their texts are inserted afterwards.
    """

    def __init__(self, tokenizer: BytePairs, thinking: bool):
        self._tokenizer = tokenizer
        if not thinking:
            raise RenderError("config.render.format = 'template' does not support config.render.thinking = False")
        if not tokenizer.template:
            raise RenderError("config.render.format = 'template', but the tokenizer has no chat template")
        environment = _environment()
        from jinja2 import TemplateError, meta

        try:
            self._template = environment.from_string(tokenizer.template)
            names = meta.find_undeclared_variables(environment.parse(tokenizer.template))
        except TemplateError as error:
            raise RenderError(f"the tokenizer's chat template is not valid Jinja: {error}") from error
        self.grammar = "json" if "tools" in names and "<tool_call>" in tokenizer.template else ""
        self._role = self._answering_role()
        self.trims = " x " not in self._text([{"role": "user", "content": " x "}])
        marks = Marks(())
        after = self._conversation([""], marks)
        stop = tokenizer.starts_with_added(after[self._turn_end(after, marks) :])
        if stop is None:
            raise RenderError("the tokenizer's chat template does not end the agent's turn with a special token")
        self._stop = stop
        self.stop_ids = tuple(dict.fromkeys((tokenizer.id_of(stop), tokenizer.end, *tokenizer.ends)))
        asked, ready = (self._text([_USER], generation=generation) for generation in (False, True))
        if not ready.startswith(asked) or len(ready) == len(asked):
            raise RenderError("the tokenizer's chat template adds no generation prompt")
        self._opening = self._encode(ready[len(asked) :], marks)
        self._check()

    def prompt(self, messages, tools, marks):
        return self._encode(self._marked_text(messages, marks, tools=tools), marks)

    def generation_prompt(self):
        return [token for token, _ in self._opening]

    def answer(self, content, marks, *, first, last, speaker):
        if speaker != "tool":
            text = self._conversation([content], marks, speaker)
            return self._encode(text[self._turn_end(text, marks) + len(self._stop) :], marks)
        before = [] if first else [""]
        whole = self._conversation([*before, content], marks)
        longer = self._conversation([*before, content, ""], marks)
        end = len(whole) if last else self._cut(whole, longer)
        text = whole if last else longer
        if first:
            start = self._turn_end(text, marks) + len(self._stop)
        else:
            start = self._cut(self._conversation(before, marks), text)
        return self._encode(text[start:end], marks)

    def _conversation(self, answers: list[str], marks: Marks, speaker: str = "tool") -> str:
        """Returns the text of a question, a turn of the agent, and these answers to it."""
        turn = {"role": "assistant", "content": marks.body([Part("x", Role.ACTION)])}
        role = self._role if speaker == "tool" else speaker
        return self._marked_text([_USER, turn, *({"role": role, "content": answer} for answer in answers)], marks)

    def _turn_end(self, text: str, marks: Marks) -> int:
        """Returns where the agent's turn of a `_conversation` ends, before the stop token."""
        turn = marks.body([Part("x", Role.ACTION)])
        if turn not in text:
            raise RenderError("the tokenizer's chat template changes a turn of the agent")
        return text.index(turn) + len(turn)

    def _cut(self, shorter: str, longer: str) -> int:
        """Returns the length of the common prefix, cut back if it ends inside an added token."""
        pairs = enumerate(zip(shorter, longer, strict=False))
        cut = next((i for i, (a, b) in pairs if a != b), min(len(shorter), len(longer)))
        for start in range(max(0, cut - 64), cut):
            name = self._tokenizer.starts_with_added(longer[start:])
            if name is not None and start + len(name) > cut:
                return start
        return cut

    def _marked_text(self, messages: list[dict], marks: Marks, *, tools: list[dict] | None = None) -> str:
        text, written = self._text(messages, tools=tools), "".join(message["content"] for message in messages)
        if marks.of(text) == marks.of(written):
            return text
        bare = [m | {"content": marks.of(m["content"]) or m["content"]} for m in messages]
        text = self._text(bare, tools=tools)
        if marks.of(text) != marks.of(written):
            raise RenderError("the tokenizer's chat template drops or moves parts of messages")
        return marks.fill(text, "".join(m["content"] for m in messages if marks.of(m["content"])))

    def _text(self, messages: list[dict], *, tools: list[dict] | None = None, generation: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=generation,
                **{name: self._tokenizer.name_of(name) for name in ("bos_token", "eos_token", "pad_token")},
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RenderError(f"the tokenizer's chat template fails on a conversation: {error}") from error

    def _encode(self, text: str, marks: Marks) -> list[Token]:
        ids, _ = marks.encode(self._tokenizer, text)
        return [(int(i), Role.SCAFFOLD if i.role is None else i.role) for i in ids]

    def _answering_role(self) -> str:
        """Returns the role that carries a tool's answer: `tool`, or `user` if the template does not support that."""
        why = "it drops the answer"
        for role in ("tool", "user"):
            self._role = role
            try:
                if "probe" in self._conversation(["probe"], Marks(())):
                    return role
            except RenderError as error:
                why = str(error)
        raise RenderError(
            f"the tokenizer's chat template accepts no answer to a turn, neither of role tool nor of role user: {why}"
        )

    def _check(self) -> None:
        """Raises `RenderError` unless the pieces of a conversation add up to the whole."""
        marks = Marks(())
        answers = [marks.body([Part(text, Role.OBSERVATION)]) for text in ("a", "b c", "")]
        whole = self._conversation(answers, marks)
        end = self._turn_end(whole, marks) + len(self._stop)
        pieces = []
        for i, answer in enumerate(answers):
            pieces += self.answer(answer, marks, first=i == 0, last=i == len(answers) - 1, speaker="tool")
        if pieces != self._encode(whole[end:], marks):
            raise RenderError(
                "the tokenizer's chat template renders one answer to a turn differently depending on the others"
            )


_USER = {"role": "user", "content": "x"}


def _environment():
    """Returns Jinja as `transformers` sets it up, but without `strftime_now`: prompts must not depend on the date."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise RenderError("chat templates need the package jinja2: pip install -e '.[hf]'") from error

    class Generation(Extension):
        """Ignores `{% generation %}` around the agent's text, whose extent is known here without it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str):
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
