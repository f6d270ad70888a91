"""What an agent may call, and the sandbox that it runs in.

In: a call of a tool. Out: its capped output and status. A task names the tools that its agent has; `submit` comes with
all. A new tool is a class like those beside this file and a line in `TOOLS`.
"""

from collections.abc import Iterable

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
# Which tool wrote a token, as a number: 0 is none, tool i of `TOOLS` is i + 1.
TOOL_IDS = {name: i for i, name in enumerate(TOOLS, start=1)}


def describe(names: Iterable[str]) -> list[dict]:
    """Returns the descriptions of tools in the form that chat templates take."""
    return [
        {
            "type": "function",
            "function": {"name": name, "description": TOOLS[name].description, "parameters": TOOLS[name].parameters},
        }
        for name in names
    ]
