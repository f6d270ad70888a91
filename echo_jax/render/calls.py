"""The grammars of tool calls: the text of a turn -> the calls that it attempts, valid or not, and back.

`plain`, for small models: `NAME argument`, one call per turn; if a tool needs several arguments, all but the last take
one line each. `json`, as Qwen and Hermes write calls: any number of
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, none inside reasoning; strings inside a call may hold these
tags. `llama`, as in Llama 3: one bare object.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jsonschema

if TYPE_CHECKING:
    from echo_jax.tools.tool import Tool


@dataclasses.dataclass(frozen=True)
class Call:
    """An attempt that can run."""

    tool: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """An attempt that cannot run."""

    status: str  # one of MALFORMED
    message: str  # shown to the agent


REASONING = ("<think>", "</think>")
MALFORMED = (
    "no_call",
    "unclosed",
    "invalid_json",
    "missing_name",
    "unknown_tool",
    "invalid_arguments",
    "too_many_calls",
)
MAX_CALLS = 64  # of a turn; each gets an observation, also when a policy repeats one token thousands of times


class Grammar(Protocol):
    no_call: str  # of MALFORMED: the status of a turn that does not try to call a tool
    markers: tuple[str, ...]  # what opens or closes a call, where a tokenizer may have a token for it

    def parse(self, text: str, tools: "Mapping[str, Tool]") -> list[Call | Malformed]:
        """Returns the attempts of a turn, in order; at least one. `tools`: the agent's tools, by name."""
        ...

    def write(self, call: Call, tools: "Mapping[str, Tool]") -> str:
        """Returns a turn that makes this call."""
        ...

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Returns the text that tells an agent how to call `tools`, which are described as for a chat template."""
        ...


def parse(
    grammar: str, text: str, tools: "Mapping[str, Tool]", *, in_reasoning: bool = False
) -> list["Call | Malformed"]:
    """Returns the attempts of a turn, in order; at least one. Those beyond MAX_CALLS count as one that cannot run.

    Args:
      grammar: a key of GRAMMARS.
      in_reasoning: whether the chat format has begun the turn with `<think>`. What the turn drafts before `</think>` is
        then no call.
    """
    if in_reasoning:
        _, closed, text = text.partition(REASONING[1])
        if not closed:
            return [Malformed("no_call", f"no tool call: the reasoning does not end with {REASONING[1]}")]
        text = text.lstrip()
    attempts = GRAMMARS[grammar].parse(text, tools)
    if len(attempts) > MAX_CALLS:
        more = f"{len(attempts)} calls in a turn, of which the first {MAX_CALLS} ran"
        attempts = [*attempts[:MAX_CALLS], Malformed("too_many_calls", more)]
    return attempts


def said(text: str, *, in_reasoning: bool = False) -> str:
    """Returns what a turn says to others: its text without reasoning. `in_reasoning`: see `parse`."""
    opened = REASONING[0] if in_reasoning else ""
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", opened + text, flags=re.DOTALL).strip()


class Plain:
    no_call = "unknown_tool"  # the first word names no tool
    markers = ()

    def parse(self, text, tools):
        name, _, rest = text.partition(" ")
        if name not in tools:
            return [_unknown(tools)]
        needed = tools[name].parameters["required"]
        values = rest.split("\n", len(needed) - 1)
        if len(values) < len(needed):
            return [Malformed("invalid_arguments", f"{name} needs {', '.join(needed)}, a line each")]
        return [Call(name, dict(zip(needed, values, strict=True)))]

    def write(self, call, tools):
        return f"{call.tool} " + "\n".join(call.arguments[name] for name in tools[call.tool].parameters["required"])

    def instructions(self, tools):
        lines = [
            f"{tool['function']['name']} {' '.join(map(str.upper, tool['function']['parameters']['required']))}: "
            f"{tool['function']['description']}"
            for tool in tools
        ]
        return "Act by writing one call of a tool and nothing else:\n" + "\n".join(lines)


class Json:
    no_call = "no_call"
    markers = ("<tool_call>", "</tool_call>")
    # Reasoning, which is skipped (up to the end, if it is left open), or the start of an attempt at a call.
    _STARTS = re.compile(r"<think>.*?(?:</think>|\Z)|(?P<call><tool_call>)", re.DOTALL)
    _END = re.compile(r"(?P<close></tool_call>)|(?=<tool_call>)|\Z")
    _SPACE = re.compile(r"[ \t\n\r]*")

    def parse(self, text, tools):
        attempts, at = [], 0
        while start := self._STARTS.search(text, at):
            at = start.end()
            if start["call"]:
                end = self._END.search(text, self._after_object(text, at))
                attempts.append(self._checked(text[at : end.start()], bool(end["close"]), tools))
                at = end.end()
        return attempts or [Malformed("no_call", "no tool call")]

    def _after_object(self, text: str, start: int) -> int:
        """Returns where the JSON value that begins at `start` ends, so that tags in its strings end no call; `start`,
        if there is none."""
        try:
            return json.JSONDecoder().raw_decode(text, self._SPACE.match(text, start).end())[1]
        except (ValueError, RecursionError):
            return start

    def write(self, call, tools):
        body = json.dumps({"name": call.tool, "arguments": dict(call.arguments)}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    def instructions(self, tools):
        return (
            "You may call these tools, described in <tools></tools>:\n<tools>\n"
            + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            + "\n</tools>\nFor each call write its name and arguments as a JSON object in <tool_call></tool_call>:\n"
            '<tool_call>\n{"name": <name>, "arguments": <object of arguments>}\n</tool_call>'
        )

    def _checked(self, body: str, closed: bool, tools: "Mapping[str, Tool]") -> Call | Malformed:
        if not closed:
            return Malformed("unclosed", "a tool call without </tool_call>")
        try:
            return _object(body, "arguments", tools)
        except RecursionError:
            return Malformed("invalid_json", "invalid JSON: nested too deeply")


class Llama:
    """One call per turn: `{"name": …, "parameters": {…}}` and nothing else, as Llama 3's template asks."""

    no_call = "no_call"
    markers = ("<|python_tag|>",)  # Llama 3.1 may start a call with it

    def parse(self, text, tools):
        text = text.lstrip().removeprefix(self.markers[0]).lstrip()
        if not text.startswith("{"):
            return [Malformed("no_call", "no tool call")]
        try:
            return [_object(text, "parameters", tools)]
        except RecursionError:
            return [Malformed("invalid_json", "invalid JSON: nested too deeply")]

    def write(self, call, tools):
        return json.dumps({"name": call.tool, "parameters": dict(call.arguments)}, ensure_ascii=False)

    def instructions(self, tools):
        return (
            "Call one of these functions with a JSON object of its name and parameters, and nothing else:\n"
            '{"name": <name>, "parameters": <object of parameters>}\n'
            + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        )


def _object(text: str, key: str, tools: "Mapping[str, Tool]") -> Call | Malformed:
    """Parses one call, an object with its arguments under `key`."""
    try:
        call = json.loads(text)
    except ValueError as error:
        return Malformed("invalid_json", f"invalid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Malformed("missing_name", "a tool call is an object with a name")
    name, arguments = call["name"], call.get(key, {})
    if name not in tools:
        return _unknown(tools)
    error = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(tools[name].parameters).iter_errors(arguments)
    )
    if error is not None:
        return Malformed("invalid_arguments", f"{name}: {error.message[:200]}")
    return Call(name, arguments)


GRAMMARS: dict[str, Grammar] = {"plain": Plain(), "json": Json(), "llama": Llama()}


def _unknown(tools: "Mapping[str, Tool]") -> Malformed:
    return Malformed("unknown_tool", f"unknown tool; there are: {' '.join(tools)}")


def describe(tools: "Mapping[str, Tool]") -> list[dict]:
    """Returns the descriptions of tools in the form for chat templates."""
    return [
        {"type": "function", "function": {"name": name, "description": t.description, "parameters": t.parameters}}
        for name, t in tools.items()
    ]
