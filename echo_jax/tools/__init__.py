"""What an agent may call. A tool has a `name` and `run(sandbox, argument) -> CommandResult`, and keeps no state."""

from echo_jax.tools.bash import Bash

TOOLS = {"bash": Bash}
