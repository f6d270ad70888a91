"""The interface of a tool: a name, a description, the JSON schema of its arguments, and a method that runs a call."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from echo_jax.tools.sandbox import CommandResult

STRING = {"type": "string"}


class World(Protocol):
    """What tools act on and scoring inspects: a `Sandbox`, or a world that a task defines and that runs no process."""

    timeout: float  # seconds that the next call may take
    cwd: str

    def kill_processes(self) -> None:
        """Kills all of the agent's processes; its files stay."""
        ...

    def close(self) -> None: ...


class Tool(Protocol):
    """A tool. It keeps no state: the world does. To add a tool, write a class like this and add a line to `TOOLS`, or
    name it in `config.tools`. A call of `submit` runs nothing: it is the agent's answer."""

    description: ClassVar[str]  # shown to the agent
    parameters: ClassVar[Mapping[str, Any]]  # JSON schema of its arguments, an object

    def run(self, world: World, arguments: Mapping[str, Any]) -> CommandResult:
        """Runs a call, for at most `world.timeout` seconds: nothing else ends a call that waits outside its world.

        Its `speaker` says whether the agent reads it as the tool's output, or as a message of a user or the system. Not
        every chat format can show a system message there; a result that asks for one is then an exception.
        What goes wrong for the agent is a result. An exception is an observation too, but counts as a fault of the
        tool: it is logged, and if every rollout of a step has one, the run stops.
        """
        ...


def strings(*required: str, **optional: str) -> dict[str, Any]:
    """Returns the JSON schema of an object of strings. `optional`: name -> default."""
    properties = {name: STRING for name in required}
    properties |= {name: {**STRING, "default": default} for name, default in optional.items()}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
