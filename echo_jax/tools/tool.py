"""What a tool is: a name, a description, the JSON schema of its arguments, and how a call of it runs."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from echo_jax.tools.sandbox import CommandResult

STRING = {"type": "string"}


class World(Protocol):
    """What tools act on and scores look at: a `Sandbox`, or a task's own world that runs no process."""

    timeout: float  # seconds that the next call may take
    cwd: str

    def kill_processes(self) -> None:
        """Ends everything that the agent has running; its traces stay."""
        ...

    def close(self) -> None: ...


class Tool(Protocol):
    """A tool. It keeps no state: that is the world's. A new one is a class like this and a line in `TOOLS`, or is named
    in `config.tools`. A call of `submit` runs nothing: it is the agent's answer."""

    description: ClassVar[str]  # what the agent reads about it
    parameters: ClassVar[Mapping[str, Any]]  # JSON schema of its arguments, an object

    def run(self, world: World, arguments: Mapping[str, Any]) -> CommandResult: ...


def strings(*required: str, **optional: str) -> dict[str, Any]:
    """Returns the JSON schema of an object of strings. `optional`: name -> default."""
    properties = {name: STRING for name in required}
    properties |= {name: {**STRING, "default": default} for name, default in optional.items()}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
