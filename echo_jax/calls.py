"""The grammars of tool calls: the text of a turn -> the calls that it attempts, well or not, and back.

`plain`, for small models: `NAME argument`, one call a turn; where a tool needs several arguments, all but the last take
one line each. `json`, as Qwen and Hermes write them: any number of
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, none inside reasoning.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jsonschema

from echo_jax.tools import TOOLS


@dataclasses.dataclass(frozen=True)
class Call:
    """One attempt that can run."""

    tool: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Malformed:
    """One attempt that cannot run."""

    status: str  # one of MALFORMED
    message: str  # what the agent is told


MALFORMED = ("no_call", "unclosed", "invalid_json", "missing_name", "unknown_tool", "invalid_arguments")


class Grammar(Protocol):
    def parse(self, text: str, tools: Collection[str]) -> list[Call | Malformed]:
        """Returns the attempts of a turn, in order; at least one. `tools`: the names that exist here."""
        ...

    def write(self, call: Call) -> str:
        """Returns a turn that makes this call."""
        ...


class Plain:
    def parse(self, text, tools):
        name, _, rest = text.partition(" ")
        if name not in tools:
            return [_unknown(tools)]
        needed = TOOLS[name].parameters["required"]
        values = rest.split("\n", len(needed) - 1)
        if len(values) < len(needed):
            return [Malformed("invalid_arguments", f"{name} needs {', '.join(needed)}, a line each")]
        return [Call(name, dict(zip(needed, values, strict=True)))]

    def write(self, call):
        return f"{call.tool} " + "\n".join(call.arguments[name] for name in TOOLS[call.tool].parameters["required"])


class Json:
    # Reasoning, which is passed over (all that follows, if it is left open), or an attempt at a call.
    _PARTS = re.compile(
        r"<think>.*?(?:</think>|\Z)|<tool_call>(?P<body>.*?)(?:(?P<close></tool_call>)|(?=<tool_call>)|\Z)", re.DOTALL
    )

    def parse(self, text, tools):
        found = [part for part in self._PARTS.finditer(text) if part["body"] is not None]
        return [self._checked(part, tools) for part in found] or [Malformed("no_call", "no tool call")]

    def write(self, call):
        body = json.dumps({"name": call.tool, "arguments": dict(call.arguments)}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    def _checked(self, part: re.Match, tools: Collection[str]) -> Call | Malformed:
        try:
            return self._attempt(part, tools)
        except RecursionError:
            return Malformed("invalid_json", "invalid JSON: nested too deeply")

    def _attempt(self, part: re.Match, tools: Collection[str]) -> Call | Malformed:
        if not part["close"]:
            return Malformed("unclosed", "a tool call without </tool_call>")
        try:
            call = json.loads(part["body"])
        except ValueError as error:
            return Malformed("invalid_json", f"invalid JSON: {error}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return Malformed("missing_name", "a tool call is an object with a name")
        name, arguments = call["name"], call.get("arguments", {})
        if name not in tools:
            return _unknown(tools)
        error = jsonschema.exceptions.best_match(
            jsonschema.Draft202012Validator(TOOLS[name].parameters).iter_errors(arguments)
        )
        if error is not None:
            return Malformed("invalid_arguments", f"{name}: {error.message[:200]}")
        return Call(name, arguments)


GRAMMARS: dict[str, Grammar] = {"plain": Plain(), "json": Json()}


def _unknown(tools: Collection[str]) -> Malformed:
    return Malformed("unknown_tool", f"unknown tool; there are: {' '.join(tools)}")
