"""The tools that an agent may call, and the sandbox that they run in.

In: a call of a tool. Out: its capped output and status. A task names the tools of its agent; `submit` is always
included. To add a tool, write a class like those in this folder and add a line to `TOOLS`, or name it in
`config.tools`.
"""

from collections.abc import Mapping
from typing import Any

from echo_jax.system import named
from echo_jax.system.errors import ConfigError
from echo_jax.tools.files import Edit, Read, Write
from echo_jax.tools.go import Go
from echo_jax.tools.shell import Bash, Python, Sqlite
from echo_jax.tools.submit import Submit
from echo_jax.tools.tool import Tool

TOOLS: dict[str, Tool] = {
    "bash": Bash(),
    "python": Python(),
    "sqlite": Sqlite(),
    "read": Read(),
    "write": Write(),
    "edit": Edit(),
    "go": Go(),
    "submit": Submit(),
}


def make_tools(added: Mapping[str, Any]) -> dict[str, Tool]:
    """Returns the built-in tools and, after them in order of name, those that `config.tools` adds.

    Args:
      added: name -> "module:Class", or {"tool": "module:Class", **its keyword arguments}.

    Raises:
      ConfigError: a name is taken, or its class is not a tool.
    """
    tools = dict(TOOLS)
    for name in sorted(added):
        field = f"tools.{name}"
        if name in TOOLS:
            raise ConfigError(f"config.{field}: a built-in tool has this name; choose another")
        options = {"tool": added[name]} if isinstance(added[name], str) else dict(added[name])
        names = options.pop("tool", "")
        make = named.find(names, {}, field)
        named.check_callable(make, names, field)
        named.check_options(make, options, field)
        tools[name] = make(**options)
        if lacking := [part for part in ("description", "parameters", "run") if not hasattr(tools[name], part)]:
            raise ConfigError(
                f"config.{field}: {type(tools[name]).__name__} lacks {', '.join(lacking)}, which a tool must have"
            )
    return tools
