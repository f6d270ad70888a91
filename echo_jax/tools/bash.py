"""The tool `bash`: its argument is a command line, its observation what that prints."""

from echo_jax.tools.sandbox import CommandResult, Sandbox


class Bash:
    name = "bash"

    def run(self, sandbox: Sandbox, argument: str) -> CommandResult:
        return sandbox.run(argument)
