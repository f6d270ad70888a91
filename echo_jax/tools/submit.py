"""The tool `submit`: calling it gives the agent's answer."""

from echo_jax.tools.sandbox import CommandResult
from echo_jax.tools.tool import Tool, World, strings


class Submit(Tool):
    description = "Ends the task with an answer; the answer is empty where the task asks for a deed."
    parameters = strings("answer")

    def run(self, world: World, arguments) -> CommandResult:
        raise NotImplementedError("a submission ends the episode; there is nothing to run")
