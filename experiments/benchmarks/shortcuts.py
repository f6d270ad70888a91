"""Measures how many tasks are solved by shortcuts: policies that do not do what the task's family tests.

    python experiments/benchmarks/shortcuts.py [--output=experiments/benchmarks/shortcuts.md]

Most shortcuts pick an answer without understanding the question, such as the largest file. Others act: they jump to the
goal, write the shell's saved state, or delete everything. None should solve more than a guess among the candidates for
the answer, plus .1: of all tasks of a family, and of those of any one template. Where a shortcut happens to be what a
question asks for ("Which file is the largest?"), that template is left out for it; see `ASKED`.
"""

import collections
import contextlib
import dataclasses
import datetime
import os
import platform
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from tables import emit

from echo_jax.render.calls import GRAMMARS
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.lookup import LINES, MIN_VALUES
from echo_jax.tasks.python_functions import SOLUTION
from echo_jax.tasks.task import FinishedEpisode, Script, Task
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import Limits, Sandbox
from echo_jax.tools.shell import DATABASE

OUTPUT = flags.DEFINE_string("output", None, "also write the table to this file")
TASKS = flags.DEFINE_integer("tasks", 200, "held-out tasks of each family and level")
MARGIN = 0.1  # above a guess
MANY = 100  # candidates for a number, a list of names, a changed file or a function: at least this many
LIMITS = Limits(memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=4096)

# family, parameters that vary
CASES: tuple[tuple[str, Mapping[str, int]], ...] = (
    ("lookup", {"folders": 3, "files": 6, "words": 96}),
    ("rooms", {"width": 3, "height": 3, "map_seed": 0}),
    ("rooms", {"width": 5, "height": 5, "map_seed": 0}),
    *((name, {"level": level}) for name in ("shell", "python", "sqlite") for level in (1, 2, 3)),
    *(("maze", {"width": size, "height": size}) for size in (3, 4, 6)),
)
# (family, shortcut) -> the templates that ask for just this, by level; 0: at every level
ASKED: Mapping[tuple[str, str], tuple[tuple[str, int], ...]] = {
    ("shell", "largest file"): (("largest", 1),),
    ("shell", "first file that holds a word of the question"): (("holder", 1),),
    ("python", "sum of all numbers"): (("nested", 1),),
}


def candidates(task: Task, parameters: Mapping[str, int]) -> int:
    """Returns among how many answers a guess would have to choose: files for a file, users for a user, cells for a
    cell."""
    family, template, level = task.name.split("/")[0], getattr(task, "template", ""), parameters.get("level", 0)
    if family == "lookup":
        return {"file": parameters["files"], "lines": LINES[1] - LINES[0]}.get(template, MIN_VALUES)
    if family == "rooms":
        return parameters["width"] * parameters["height"]
    if family == "maze":
        return parameters["width"] * parameters["height"] - 1
    counts = {  # at levels 1, 2, 3
        ("shell", "largest"): (8, 8, 18),
        ("shell", "holder"): (8, 16, 36),
        ("shell", "frequent"): (6, 10, 14),
        ("sqlite", "never"): (6, 15, 30),
        ("sqlite", "top"): (6, 12, 6),
        ("sqlite", "update"): (6, 12, MANY),
    }
    return counts.get((family, template), (MANY,) * 3)[level - 1]


# -- answers that follow from the files alone --------------------------------------------------------------------------


def _by(key: Callable[[bytes], Any], rank: int) -> Callable[[Task], str]:
    """Returns the policy that submits the file at this rank, in the order of a property of its content."""

    def answer(task: Task) -> str:
        paths = sorted(sorted(task.files), key=lambda path: key(task.files[path]))
        return paths[max(rank, -len(paths))]

    return answer


def _holding_a_word_of_the_question(task: Task) -> str:
    """The first file in which a search for the last word of the question, else for one before, finds anything."""
    for word in reversed(re.findall(r"[\w./]+", task.prompt)):
        for path, content in sorted(task.files.items()):
            if re.search(rb"\b%s\b" % re.escape(word.encode()), content):
                return path
    return ""


FILES: Mapping[str, Callable[[Task], str]] = {
    "first file": _by(lambda content: 0, 0),
    "last file": _by(lambda content: 0, -1),
    "largest file": _by(len, -1),
    "second largest file": _by(len, -2),
    "smallest file": _by(len, 0),
    "file with the most lines": _by(lambda content: content.count(b"\n"), -1),
    "file with the fewest lines": _by(lambda content: content.count(b"\n"), 0),
    "first file that holds a word of the question": _holding_a_word_of_the_question,
}


def _numbers(task: Task) -> list[int]:
    return [int(word) for _, content in sorted(task.files.items()) for word in re.findall(rb"-?\d+", content)]


def _of_numbers(function: Callable[[list[int]], int]) -> Callable[[Task], str]:
    return lambda task: str(function(_numbers(task) or [0]))


NUMBERS: Mapping[str, Callable[[Task], str]] = {
    "0": lambda task: "0",
    "first number": _of_numbers(lambda numbers: numbers[0]),
    "last number": _of_numbers(lambda numbers: numbers[-1]),
    "largest number": _of_numbers(max),
    "number of numbers": _of_numbers(len),
    "sum of all numbers": _of_numbers(sum),
    "number of lines": lambda task: str(sum(content.count(b"\n") for content in task.files.values())),
}


def _query(sql: str) -> Callable[[Task], str]:
    """Returns the policy that submits the result of a query on people, things and events, the three tables."""

    def answer(task: Task) -> str:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.deserialize(task.files[DATABASE])
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            amount = [column[1] for column in connection.execute(f"PRAGMA table_info({tables[2]})")][-1]
            named = dict(zip(("people", "things", "events"), tables, strict=False)) | {"amount": amount}
            return "|".join(map(str, connection.execute(sql.format(**named)).fetchone()))

    return answer


ROWS: Mapping[str, Callable[[Task], str]] = {
    "0": lambda task: "0",
    "first person": _query("SELECT name FROM {people} ORDER BY id LIMIT 1"),
    "last person": _query("SELECT name FROM {people} ORDER BY id DESC LIMIT 1"),
    "first thing": _query("SELECT name FROM {things} ORDER BY id LIMIT 1"),
    "last thing": _query("SELECT name FROM {things} ORDER BY id DESC LIMIT 1"),
    "number of events": _query("SELECT count(*) FROM {events}"),
    "sum over all events": _query("SELECT sum({amount}) FROM {events}"),
}


# -- turns -------------------------------------------------------------------------------------------------------------


def _commands(*turns: str) -> Callable[[Task], Script]:
    """Returns the policy that takes these turns and submits. `{sign}` is the name of the goal's room."""

    def script(task: Task) -> Script:
        for turn in turns:
            yield turn.replace("{sign}", task.prompt.split()[-1])
        yield "submit x"

    return script


def _walk(task: Task, ways: Sequence[Sequence[str]]) -> Script:
    for direction in (step for way in ways for step in way):
        yield f"go {direction}"
    yield "submit x"


def _straight(rows_first: bool) -> Callable[[Task], Script]:
    def script(task: Task) -> Script:
        x, y = task.goal[0] - task.start[0], task.goal[1] - task.start[1]
        ways = [["east" if x > 0 else "west"] * abs(x), ["south" if y > 0 else "north"] * abs(y)]
        return _walk(task, ways[::-1] if rows_first else ways)

    return script


def _into_the_corner(first: str, second: str) -> Callable[[Task], Script]:
    return lambda task: _walk(task, [[first] * 20, [second] * 20])


def _return_the_example(task: Task) -> Script:
    """Writes a function that always returns the value of the question's example."""
    signature = re.search(r"function (\w+\(.*?\)) into", task.prompt)
    if signature:
        value = task.prompt.rpartition(" is ")[2].removesuffix(".")
        yield f"write {SOLUTION}\ndef {signature[1]}:\n    return {value}\n"
    yield "submit x"


def _change_the_last_row(task: Task) -> Script:
    asked = re.match(r"Add (\d+) to the (\w+) of every (\w+) that", task.prompt)
    if asked:
        more, size, thing = asked.groups()
        rows = f"WHERE id = (SELECT max(id) FROM {thing}s)"
        yield f"sqlite UPDATE {thing}s SET {size} = {size} + {more} {rows}"
    yield "submit x"


GOAL = "$(dirname $(grep -lx 'room {sign}' /work/*/sign))"
WALK = "exits=(n e s w); until [ \"$(<sign)\" = 'room {sign}' ]; do cd -P ${exits[RANDOM % 4]}; done"
TURNS: Mapping[str, Mapping[str, Callable[[Task], Script]]] = {
    "rooms": {
        "submit at once": _commands(),
        "cd to the sign that grep finds": _commands(f"bash cd {GOAL}"),
        "write the shell's state": _commands(f"bash echo {GOAL} > /run/shell/cwd; kill -9 $$"),
        "write the shell's state, and let the next shell read it": _commands(
            f"bash echo {GOAL} > /run/shell/cwd; kill -9 $$", "bash true"
        ),
        "turn an exit to the goal": _commands(f"bash rm n; ln -s {GOAL} n; cd n"),
        "walk at random in one command": _commands(f"bash {WALK}"),
    },
    "shell": {
        "submit at once": _commands(),
        "delete everything": _commands("bash rm -rf *"),
    },
    "python": {"return the value of the example": _return_the_example},
    "sqlite": {"change the last row": _change_the_last_row},
    "maze": {
        "submit at once": _commands(),
        "straight to the goal, columns first": _straight(rows_first=False),
        "straight to the goal, rows first": _straight(rows_first=True),
        **{
            f"all the way {across}, then {down}": _into_the_corner(across, down)
            for across in ("east", "west")
            for down in ("north", "south")
        },
    },
}
ANSWERS: Mapping[str, Mapping[str, Callable[[Task], str]]] = {
    "lookup": FILES | {"number of lines": NUMBERS["number of lines"]},
    "shell": FILES | NUMBERS,
    "python": NUMBERS,
    "sqlite": ROWS,
}


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rate:
    """How a shortcut does on tasks: of a template, or of all ("")."""

    solved: int
    tasks: int
    chance: float  # that a guess among the candidates is right

    @property
    def limit(self) -> float:
        return self.chance + MARGIN

    @property
    def excess(self) -> float:
        """How far the rate is above the limit."""
        return self.solved / self.tasks - self.limit

    @property
    def error(self) -> float:
        """The standard error of a rate that is at the limit."""
        return (self.limit * (1 - self.limit) / self.tasks) ** 0.5

    def __str__(self) -> str:
        return f"{self.solved / self.tasks:.3f} of {self.tasks}"


def measure(
    family: str, parameters: Mapping[str, int], count: int, *, revision: int = 0, only: str = ""
) -> dict[str, dict[str, Rate]]:
    """Returns shortcut -> template -> its rate on the first held-out tasks; "" stands for all templates. A template
    that asks for just what the shortcut does is left out for it.

    Args:
      count: the number of tasks.
      revision: of the tasks; 0: the newest.
      only: the name of the only shortcut to measure; empty: all.
    """
    make = FAMILIES[family](**parameters, revision=revision or FAMILIES[family].newest_revision).make
    tasks = [make("heldout", index) for index in range(count)]
    found = {}
    for name, reward in _shortcuts(family):
        if only not in ("", name):
            continue
        asked = ASKED.get((family, name), ())
        rewards: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        for task in tasks:
            template = getattr(task, "template", "")
            if not {(template, 0), (template, parameters.get("level", 0))} & {*asked}:
                pair = reward(task), 1 / candidates(task, parameters)
                for group in {template, ""}:
                    rewards[group].append(pair)
        found[name] = {
            template: Rate(int(sum(solved for solved, _ in pairs)), len(pairs), float(np.mean([c for _, c in pairs])))
            for template, pairs in rewards.items()
        }
    return found


def _shortcuts(family: str) -> Iterator[tuple[str, Callable[[Task], float]]]:
    for name, answer in ANSWERS.get(family, {}).items():
        yield name, lambda task, answer=answer: _reward_of_answer(task, answer(task))
    for name, script in TURNS.get(family, {}).items():
        yield name, lambda task, script=script: _reward_of_turns(task, script(task))


def _reward_of_answer(task: Task, answer: str) -> float:
    """A task that asks for a deed is not solved by an answer: `submit at once` and tests/tasks show it."""
    problem = getattr(task, "problem", None)
    return 0.0 if problem and not problem.goal.answer else task.score(FinishedEpisode(answer, None, "submitted", 1))


def _reward_of_turns(task: Task, script: Script) -> float:
    """The scripts do not look at what their calls print."""
    if task.name.startswith(("shell", "python", "sqlite")) and task.problem.goal.answer:
        return 0.0  # a question, not a deed
    tools = {name: TOOLS[name] for name in (*task.tools, "submit")}
    options = {"files": task.files, "symlinks": task.symlinks, "places": task.reads_places}
    with contextlib.closing(task.world() or Sandbox(limits=LIMITS, **options)) as world:
        if task.setup:
            world.run(task.setup)
        *calls, submission = (GRAMMARS["plain"].parse(turn, tools)[0] for turn in script)
        for call in calls:
            TOOLS[call.tool].run(world, call.arguments)
        world.kill_processes()
        return task.score(FinishedEpisode(submission.arguments["answer"], world, "submitted", len(calls) + 1))


def table(cases: Iterable[tuple[str, Mapping[str, int]]], count: int) -> Iterator[str]:
    yield "# Shortcuts: how many held-out tasks they solve\n"
    yield (
        f"`python experiments/benchmarks/shortcuts.py`, {datetime.date.today()}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}, numpy "
        f"{np.__version__}.\n"
    )
    yield (
        "A shortcut is a policy that does not do what the family tests; the module's docstring says more. The limit is "
        "the chance of a guess among the candidates for the answer, plus .1. The last column names the template on "
        "which the shortcut does best, compared with that template's limit.\n"
    )
    yield "| family | parameters | shortcut | solved | limit | best template: solved, limit |"
    yield "|---|---|---|---|---|---|"
    for family, parameters in cases:
        for name, rates in measure(family, parameters, count).items():
            total = rates.pop("")
            best = max(rates, key=lambda template: rates[template].excess, default="")
            where = f"{best}: {rates[best]}, {rates[best].limit:.3f}" if best else ""
            settings = ", ".join(f"{key} {value}" for key, value in parameters.items() if key != "map_seed")
            yield f"| {family} | {settings} | {name} | {total} | {total.limit:.3f} | {where} |"
    yield (
        "\nLeft out, because the question asks for just this: "
        + "; ".join(
            f"`{family}` {template}{f' at level {level}' if level else ''} for “{name}”"
            for (family, name), asked in ASKED.items()
            for template, level in asked
        )
        + "."
    )
    yield (
        "\nNot counted as a shortcut: a program that searches the links of `rooms` for a way and takes one step of it "
        "in each call solves all of them."
    )


def main(_) -> None:
    emit(table(CASES, TASKS.value), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
