"""Task families: each makes endless tasks from seeds, split into train and held-out.

In: a family's parameters, a split and an index. Out: a `Task`: what the agent reads, the files it finds, how its work
is scored, and perhaps a scripted demonstrator. A new family is one module with a class like `LookupFamily` and a line
in `FAMILIES`, or is named as `module:Class` in its section of `config.task`.
"""

from echo_jax.tasks.lookup import LookupFamily
from echo_jax.tasks.maze import MazeFamily
from echo_jax.tasks.python import PythonFamily
from echo_jax.tasks.rooms import RoomsFamily
from echo_jax.tasks.shell import ShellFamily
from echo_jax.tasks.sqlite import SqliteFamily

FAMILIES = {
    "lookup": LookupFamily,
    "rooms": RoomsFamily,
    "shell": ShellFamily,
    "python": PythonFamily,
    "sqlite": SqliteFamily,
    "maze": MazeFamily,
}
