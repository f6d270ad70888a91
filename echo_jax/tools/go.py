"""The tool `go`: a step in a world that runs no process (`tasks/maze.py`)."""

from echo_jax.tools.sandbox import CommandResult
from echo_jax.tools.tool import Tool, World, strings


class Go(Tool):
    description = "Takes a step: north, east, south or west. Prints what is seen then."
    parameters = strings("direction")

    def run(self, world: World, arguments) -> CommandResult:
        return world.go(arguments["direction"])
