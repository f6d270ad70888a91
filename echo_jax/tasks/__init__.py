"""Task families: each makes unlimited tasks from seeds, split into train and held-out.

In: a family's parameters, a split and an index. Out: a `Task`: its prompt, its files, its scoring and,
optionally, a scripted demonstrator. To add a family, write a module with a class like `LookupFamily`; add a line to
`FAMILIES`, or name the class as `module:Class` in its section of `config.task`.
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
