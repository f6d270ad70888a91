"""What an agent may call. A tool has a `name` and `run(sandbox, argument) -> CommandResult`, and keeps no state."""

from echo_jax.tools.bash import Bash

TOOLS = {"bash": Bash}
# Which tool wrote a token, as a number: 0 is none, tool i of `TOOLS` is i + 1.
TOOL_IDS = {name: i for i, name in enumerate(TOOLS, start=1)}
