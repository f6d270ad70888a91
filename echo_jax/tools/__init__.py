"""What an agent may call, and the sandbox that it runs in.

In: a call of a tool. Out: its capped output and status. A task names the tools that its agent has; `submit` comes with
all. A new tool is a class like those beside this file and a line in `TOOLS`.
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
    """Returns the built-in tools and, after them by name, those that `config.tools` adds.

    Args:
      added: name -> "module:Class", or {"tool": "module:Class", **its keyword arguments}.

    Raises:
      ConfigError: a name is taken, or what it names is no tool.
    """
    tools = dict(TOOLS)
    for name in sorted(added):
        field = f"tools.{name}"
        if name in TOOLS:
            raise ConfigError(f"config.{field}: there is a built-in tool of this name; choose another")
        options = {"tool": added[name]} if isinstance(added[name], str) else dict(added[name])
        make = named.find(options.pop("tool", ""), {}, field)
        named.check_callable(make, name, field)
        named.check_options(make, options, field)
        tools[name] = make(**options)
        if lacking := [part for part in ("description", "parameters", "run") if not hasattr(tools[name], part)]:
            raise ConfigError(f"config.{field}: {type(tools[name]).__name__} lacks {', '.join(lacking)} of a tool")
    return tools
