"""The procedural families: the script earns 1, anything less earns nothing, and no trick earns the reward."""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
import sqlite3
import tarfile
import time

import numpy as np
import pytest
from scoring import score

from echo_jax.render.calls import GRAMMARS
from echo_jax.tasks import FAMILIES
from echo_jax.tasks.procedural import LEVELS, Answer
from echo_jax.tasks.python_functions import SOLUTION, Returns
from echo_jax.tasks.readers import MAX_BYTES
from echo_jax.tasks.shell_deeds import EndState
from echo_jax.tasks.sqlite_data import Contents
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Limits, Sandbox, SandboxError, Status
from echo_jax.tools.shell import DATABASE

LIMITS = Limits(timeout_seconds=10.0, memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)


def at_levels(by_default):
    """Returns every family at every level; levels other than `by_default` are variants."""
    return [
        pytest.param(name, {"level": level, "revision": 2}, marks=[] if level == by_default else pytest.mark.variant)
        for name in ("shell", "python", "sqlite")
        for level in LEVELS
    ]


LEVELS_OF = at_levels(max(LEVELS))  # the hardest level has all that the others have
MADE_AT = at_levels(min(LEVELS))  # making hundreds of the hardest tasks takes seconds
MAZE = ("maze", {"width": 6, "height": 6, "revision": 2})
MADE = pytest.mark.parametrize(("name", "parameters"), MADE_AT, ids=str)
LEVELLED = pytest.mark.parametrize(("name", "parameters"), LEVELS_OF, ids=str)
ANY_KIND = pytest.mark.parametrize(("name", "parameters"), [*LEVELS_OF, MAZE], ids=str)


@functools.cache
def make(name, level, split, index):
    return FAMILIES[name](level=level, revision=2).make(split, index)


def new_tasks(name, parameters, count):
    family = FAMILIES[name](**parameters)
    return [family.make(("train", "heldout")[i % 2], i) for i in range(count)]


@functools.cache
def _task(name, parameters, index):
    return FAMILIES[name](**dict(parameters)).make(("train", "heldout")[index % 2], index)


def some_tasks(name, parameters, count):
    """The first tasks, each made once."""
    return [_task(name, tuple(parameters.items()), i) for i in range(count)]


def of_every_template(name, level):
    """Returns two tasks of each template, one from each split."""
    return [
        next(task for task in (make(name, level, split, i) for i in range(500)) if task.template == template)
        for template in FAMILIES[name].templates
        for split in ("train", "heldout")
    ]


def task_of(template, level=1):
    name = next(name for name in ("shell", "python", "sqlite") if template in FAMILIES[name].templates)
    return next(task for task in (make(name, level, "train", i) for i in range(500)) if task.template == template)


@contextlib.contextmanager
def world_of(task):
    world = task.world() or Sandbox(limits=LIMITS, files=task.files, symlinks=task.symlinks)
    try:
        yield world
    finally:
        world.close()


def call(world, task, turn):
    """Runs a turn; returns the agent's observation."""
    [attempt] = GRAMMARS["plain"].parse(turn, {name: TOOLS[name] for name in (*task.tools, "submit")})
    result = TOOLS[attempt.tool].run(world, attempt.arguments)
    return (result.head + result.tail).decode()


def follow(task, *, solve, seed=0):
    """Runs a task's script; returns its reward and its last observation."""
    script = task.demonstrate(np.random.default_rng(seed), solve=solve)
    observation, seen = None, ""
    with world_of(task) as world:
        while not (turn := script.send(observation)).startswith("submit "):
            observation = seen = call(world, task, turn)
        world.kill_processes()
        return score(task, turn.removeprefix("submit "), world), seen


def reward_after(task, *deeds, solved=False, answer=""):
    """Returns the reward after `deeds`, commands or functions of the sandbox; checks that it takes bounded time."""
    started = time.monotonic()
    with world_of(task) as box:
        for turn in task.problem.solution if solved else ():
            call(box, task, turn)
        for deed in deeds:
            if callable(deed):
                deed(box)
            else:
                box.run(deed)
        box.kill_processes()
        box.timeout = 3.0
        reward = score(task, answer, box)
    assert time.monotonic() - started < 30
    return reward


class Empty:
    """Replaces a sandbox: the agent left no file, and every command succeeds. Records the commands."""

    def __init__(self):
        self.commands = []

    def run(self, command, *, fresh):
        self.commands.append(command)
        return CommandResult(Status.OK, 0, b"", b"", 0, 0.0, "/work")

    def read_file(self, path, *, limit):
        raise SandboxError(path)


# -- tasks -------------------------------------------------------------------------------------------------------------


@ANY_KIND
def test_a_task_is_a_function_of_split_and_index(name, parameters):
    assert new_tasks(name, parameters, 12) == new_tasks(name, parameters, 12)
    assert [task.name for task in new_tasks(name, parameters, 2)] == [f"{name}/train/0", f"{name}/heldout/1"]


@pytest.mark.parametrize(("name", "parameters"), [*MADE_AT, MAZE], ids=str)
def test_train_and_heldout_share_no_content(name, parameters):
    family = FAMILIES[name](**parameters)
    splits = [[family.make(split, i) for i in range(150)] for split in ("train", "heldout")]
    train, heldout = ({repr(dataclasses.replace(task, name="")) for task in tasks} for tasks in splits)
    assert len(train) == len(heldout) == 150
    assert not train & heldout
    train, heldout = ({tuple(task.files.items()) for task in tasks if task.files} for tasks in splits)
    assert not train & heldout


@ANY_KIND
@pytest.mark.parametrize("index", [0, 2**32 - 1, 2**32, 10**15])
def test_large_indices_are_distinct_tasks(name, parameters, index):
    family = FAMILIES[name](**parameters)
    task = family.make("train", index)
    assert task == family.make("train", index)
    assert task.prompt != family.make("train", index + 2**32).prompt


@MADE
def test_templates_are_about_equally_frequent(name, parameters):
    counts = collections.Counter(task.template for task in some_tasks(name, parameters, 400))
    assert counts.keys() == FAMILIES[name].templates.keys()
    assert len(counts) >= {"shell": 10, "python": 8, "sqlite": 8}[name]
    assert max(counts.values()) < 3 * min(counts.values())


@pytest.mark.parametrize(
    "name", ["shell", *(pytest.param(name, marks=pytest.mark.variant) for name in ("python", "sqlite"))]
)
def test_higher_level_means_more_data_and_longer_solutions(name):
    def mean(level, measure):
        return np.mean([measure(make(name, level, "train", i)) for i in range(150)])

    for easy, hard in ((1, 2), (2, 3)):
        for measure in (
            lambda task: sum(map(len, task.files.values())),
            lambda task: len(task.problem.solution[-1]) + len(task.prompt),
        ):
            assert mean(hard, measure) > 1.05 * mean(easy, measure)


@pytest.mark.parametrize("name", ["shell", "python", "sqlite"])
@pytest.mark.parametrize("level", [0, 4, -1])
def test_unknown_level_is_refused(name, level):
    with pytest.raises(ValueError, match=f"task.{name}.level = {level}: choose 1 to 3"):
        FAMILIES[name](level=level)


# -- rewards -----------------------------------------------------------------------------------------------------------


@LEVELLED
def test_script_solves_every_template_and_submits_what_it_saw(name, parameters):
    for task in of_every_template(name, parameters["level"]):
        reward, seen = follow(task, solve=True)
        assert reward == 1.0, (task.template, task.prompt, seen)
        if task.problem.goal.answer:
            assert seen.split() == task.problem.goal.answer.split(), task.template


@ANY_KIND
def test_doing_nothing_earns_nothing(name, parameters):
    for task in some_tasks(name, parameters, 20):
        with world_of(task) as world:
            assert score(task, "", world) == score(task, "0", world) == score(task, None, world) == 0.0, task.prompt


@ANY_KIND
def test_flawed_scripts_mostly_fail_in_different_ways(name, parameters):
    results = [follow(task, solve=False, seed=i) for i, task in enumerate(some_tasks(name, parameters, 30))]
    assert np.mean([reward for reward, _ in results]) < 0.2
    assert len({seen for _, seen in results}) > 1


@MADE
def test_slip_differs_from_the_solution(name, parameters):
    for task in some_tasks(name, parameters, 200):
        assert task.problem.slip != task.problem.solution[-1], task.template


@MADE
def test_no_answer_is_worth_guessing(name, parameters):
    answers = collections.defaultdict(list)
    for task in some_tasks(name, parameters, 600):
        if isinstance(task.problem.goal, Answer):
            assert task.problem.goal.answer
            answers[task.template].append(task.problem.goal.answer)
    repeated = sum(one == other for found in answers.values() for one, other in itertools.pairwise(found))
    assert repeated <= 0.02 * sum(map(len, answers.values()))


@MADE
def test_prompt_does_not_contain_the_answer(name, parameters):
    tasks = [task for task in some_tasks(name, parameters, 300) if task.problem.goal.answer]
    given_away = [task for task in tasks if {*task.problem.goal.answer.split()} <= {*task.prompt.split()}]
    assert len(given_away) <= 0.01 * len(tasks)


def by_reading(task):
    """Returns the answer of a task of level 3, found from prompt and files independently of the task's program."""
    numbers = [int(number) for number in re.findall(r"\d+", task.prompt)]
    text = next(iter(task.files.values())).decode(errors="ignore")
    lines = [line.split() for line in text.splitlines()]
    if task.template == "shortest":
        start, goal = re.search(r"from (\w+) to (\w+)\?", task.prompt).groups()
        far = collections.defaultdict(lambda: np.inf, {start: 0})
        for _ in lines:
            for here, there, km in lines:
                far[there] = min(far[there], far[here] + int(km))
        return str(far[goal])
    if task.template == "stretches":
        covered = np.zeros(1000, int)
        for first, last in lines:
            covered[int(first) : int(last)] += 1
        return str((covered >= 3).sum())
    if task.template == "walk":
        at, facing = 0, 1j
        for word, steps in lines:
            facing *= {"left": 1j, "right": -1j, "ahead": 1}[word]
            there = at + int(steps) * facing
            at = there if max(abs(there.real), abs(there.imag)) <= max(numbers) else at
        return f"{int(at.real)} {int(at.imag)}"
    connection = sqlite3.connect(":memory:")
    connection.deserialize(task.files[DATABASE])
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
    people, things, events = (connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables)
    connection.close()
    city_of, size_of = {person: city for person, _, city in people}, {thing: size for thing, _, size in things}
    if task.template == "total":
        city = re.search(r"from (\w+),", task.prompt)[1]
        return str(sum(e[4] for e in events if city_of[e[1]] == city and size_of[e[2]] > numbers[-1]))
    if task.template == "above_average":
        average = {person: np.mean([e[4] for e in events if e[1] == person] or [0]) for person in city_of}
        return str(sum(e[4] for e in events if e[4] > average[e[1]]))
    assert task.template == "never"
    city = re.search(r"from (\w+)\?", task.prompt)[1]
    met = {e[2] for e in events if city_of[e[1]] == city}
    return " ".join(sorted(name for thing, name, _ in things if thing not in met))


@pytest.mark.parametrize("template", ["shortest", "stretches", "walk", "total", "above_average", "never"])
def test_prompt_suffices_to_find_the_answer_independently(template):
    name = "sqlite" if template in FAMILIES["sqlite"].templates else "python"
    tasks = [task for task in (make(name, 3, "train", i) for i in range(200)) if task.template == template]
    assert len(tasks) > 5
    for task in tasks:
        assert by_reading(task) == task.problem.goal.answer, task.prompt


def test_answer_may_differ_only_in_spacing():
    goal = Answer("a/b.txt 7")
    assert all(goal.reached(answer, None) for answer in ("a/b.txt 7", "  ./a/b.txt\n7\n"))
    assert not any(goal.reached(answer, None) for answer in ("", "a/b.txt", "7 a/b.txt", "a/b.txt 7 8", "b.txt 7"))


# -- shell: tricks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trick",
    [
        "mv {path} /tmp/x; ln -s /tmp/x {path}",
        "mv {path} .x; ln -s .x {path}",
        "rm {path}; mkfifo {path}",
        "rm {path}; mkdir {path}",
        "rm {path}; ln -s /dev/zero {path}",
        "rm {path}; ln -s /proc/self/environ {path}",
        "truncate -s 8M {path}",
        "chmod 000 {path}",
        "> {path}",
        "rm {path}",
    ],
)
def test_only_a_regular_file_with_the_content_counts(trick):
    task = task_of("sort")
    [path] = task.problem.goal.files
    assert reward_after(task, solved=True) == 1.0
    assert reward_after(task, f"chmod 444 {path}", solved=True) == 1.0
    assert reward_after(task, trick.format(path=path), solved=True) == 0.0


@pytest.mark.parametrize("template", ["permissions", "archive", "links", "remove"])
def test_poisoned_environment_does_not_change_the_score(template):
    lies = "find stat sha256sum tar mktemp sort xargs cd test ["
    deeds = [
        f"mkdir .bin; for f in {lies}; do printf '#!/bin/sh\\nexit 0\\n' > .bin/$f; chmod +x .bin/$f; done",
        "export PATH=/work/.bin BASH_ENV=/work/.bin/env ENV=/work/.bin/env LD_PRELOAD=/work/x.so HOME=/tmp",
        f'for f in {lies}; do eval "$f() {{ :; }}"; export -f $f; done',
        "echo 'exit 0' > /run/shell/env; echo 'exit 0' > .bashrc; echo 'exit 0' > .profile; trap - EXIT",
    ]
    assert reward_after(task_of(template), *deeds) == 0.0


def test_work_still_in_progress_does_not_count():
    task = task_of("remove")
    command = task.problem.solution[-1].removeprefix("bash ")
    assert reward_after(task, f"(sleep 0.5; {command}) > /dev/null 2>&1 &") == 0.0


def test_archive_of_links_to_the_files_does_not_count():
    task = task_of("archive")
    folder = next(iter(task.files)).split("/")[0]
    target = next(word for word in task.prompt.replace(",", "").split() if word.endswith(".tar.gz"))
    trick = f"mkdir .x; ln -s /work/{folder} .x/{folder}; tar -czf {target} -C .x {folder}"
    assert reward_after(task, trick) == 0.0
    assert reward_after(task, f"head -c 1000 /dev/zero | gzip > {target}") == 0.0
    assert reward_after(task, f"head -c 50M /dev/zero | gzip > {target}") == 0.0


def test_only_plain_files_in_an_archive_count():
    task = task_of("archive")
    goal = task.problem.goal

    def pack(change):
        def deed(box):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as tar:
                for path, content in goal.packed.items():
                    member = tarfile.TarInfo(f"./{path}")
                    member.size = len(content)
                    change(member)
                    tar.addfile(member, io.BytesIO(content))
            box.write_files({goal.archive: packed.getvalue()})

        return deed

    assert reward_after(task, pack(lambda member: None)) == 1.0
    for name, value in (("type", tarfile.SYMTYPE), ("type", tarfile.LNKTYPE), ("type", tarfile.FIFOTYPE), ("size", 0)):
        assert reward_after(task, pack(lambda member, name=name, value=value: setattr(member, name, value))) == 0.0


def test_database_with_a_write_ahead_log_counts():
    task = task_of("update")
    wal = lambda box: TOOLS["sqlite"].run(box, {"sql": "PRAGMA journal_mode=WAL"})  # noqa: E731
    assert reward_after(task, wal) == 0.0
    assert reward_after(task, wal, solved=True) == 1.0


def test_hard_link_is_not_a_symbolic_link():
    task = next(t for t in (make("shell", 1, "train", i) for i in range(500)) if t.template == "links")
    assert reward_after(task, solved=True) == 1.0
    assert reward_after(task, task.problem.solution[-1].removeprefix("bash ").replace("ln -s", "ln")) == 0.0


@pytest.mark.parametrize("template", ["sort", "permissions", "encode", "update"])
def test_dead_sandbox_is_an_error_not_the_agents_failure(template):
    with pytest.raises(SandboxError, match="died|closed"):
        reward_after(task_of(template), lambda box: setattr(box, "kill_processes", box.close))


def test_removing_too_much_earns_nothing():
    task = task_of("remove")
    assert isinstance(task.problem.goal, EndState)
    assert reward_after(task, f"rm {next(iter(task.problem.goal.files))}", solved=True) == 0.0
    assert reward_after(task, f"ln -s nowhere {task.problem.goal.gone[0]}", solved=True) == 0.0


# -- python: tricks ----------------------------------------------------------------------------------------------------

REWRITE = (
    "import json, time\nwhile True:\n    json.dump([0] * 8, open('/work/.values.json', 'w'))\n    time.sleep(0.01)\n"
)


def function_task():
    return task_of("encode")


def with_solution(text):
    return lambda box: box.write_files({SOLUTION: text.encode()})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "encode = None",
        "def encode(text): return text",
        "def encode(text): raise SystemExit(0)",
        "def encode(text):\n    while True: pass",
        "def encode(text): return 'x' * 10**7",
        "def encode(text):\n    value = []\n    for _ in range(10**5): value = [value]\n    return value",
        "class Same:\n    def __eq__(self, other): return True\ndef encode(text): return Same()",
        "exit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print('[1, 1, 1, 1, 1, 1, 1, 1]'); exit(0)",
        "import json; json.dump = lambda values, file: file.write('true'); encode = len",
        "import sys; sys.stdout = sys.stderr = open('/dev/null', 'w'); encode = len",
        "import sys; sys.argv[:] = ['', 'len', '[[[]]]', '/work/.values.json']; encode = len",
        "import atexit; atexit.register(lambda: open('/work/.values.json', 'w').write('true')); encode = len",
        "import json, os\nif os.fork() == 0:\n    os.setsid()\n    "
        + REWRITE.replace("\n", "\n    ")
        + "\nencode = len",
        "open('/work/.values.json', 'w').write('[' * 10**6); exit(0)",
        "open('/work/.values.json', 'w').write('[' * 30000); exit(0)",
        "open('/work/.values.json', 'w').write('9' * 30000); exit(0)",
        "open('/work/.values.json', 'wb').write(bytes(range(256))); exit(0)",
        "open('/work/.values.json', 'w').write('null'); exit(0)",
    ],
)
def test_only_the_right_values_earn_the_reward(text):
    assert reward_after(function_task(), with_solution(text)) == 0.0


@pytest.mark.parametrize(
    "trick",
    [
        "mkfifo .values.json",
        "mkdir .values.json",
        "ln -s /dev/null .values.json",
        "ln -s /tmp/x .values.json",
        "rm solution.py; mkfifo solution.py",
        "rm solution.py; mkdir solution.py",
        "rm solution.py; ln -s /dev/zero solution.py",
        "truncate -s 10M solution.py",
    ],
)
def test_file_in_the_way_earns_nothing_and_does_not_hang(trick):
    assert reward_after(function_task(), trick, solved=True) == 0.0


@pytest.mark.parametrize(
    "name", ["sitecustomize", "usercustomize", "json/__init__", "sys", "encodings/__init__", "string"]
)
def test_agents_modules_do_not_replace_others(name):
    forge = {f"{name}.py": b"open('/work/.values.json', 'w').write('true')\nraise SystemExit(0)\n"}
    settings = "export PYTHONPATH=/work PYTHONSTARTUP=/work/json/__init__.py PYTHONHOME=/work PYTHONINSPECT=1"
    poison = (
        lambda box: box.write_files(forge),
        settings,
        "export PATH=/work:$PATH; echo exit > python3; chmod +x python3",
    )
    assert reward_after(function_task(), *poison, with_solution("encode = len")) == 0.0
    assert reward_after(function_task(), *poison, solved=True) == 1.0


def test_a_background_process_does_not_write_the_values():
    task = function_task()
    start = f"printf %s {json.dumps(REWRITE)} > /tmp/x.py; nohup setsid python3 /tmp/x.py > /dev/null 2>&1 &"
    assert reward_after(task, with_solution("encode = len"), start) == 0.0
    assert reward_after(task, start, solved=True) == 1.0


def test_correct_function_may_print_and_import():
    task = function_task()
    solution = task.problem.solution[-1].removeprefix(f"write {SOLUTION}\n")
    helper = {"helper.py": solution.encode()}
    chatty = "from helper import encode\nprint('[]' * 10000)\n"
    assert reward_after(task, lambda box: box.write_files(helper), with_solution(chatty)) == 1.0


@pytest.mark.parametrize("level", LEVELS)
def test_the_right_values_stay_on_the_host(level):
    for task in of_every_template("python", level):
        goal = task.problem.goal
        if isinstance(goal, Returns):
            box = Empty()
            assert not goal.reached("", box)
            [command] = box.commands
            assert json.dumps(goal.inputs)[1:-1] in command.replace("'\"'\"'", "'")
            assert not any(json.dumps([value])[1:-1] in command for value in goal.values if len(str(value)) > 4)
            assert len({json.dumps(value) for value in goal.values}) > 4  # a constant does not solve it
            assert json.dumps(goal.inputs[0])[1:-1] not in task.prompt.replace("'", '"')


# -- sqlite: tricks ----------------------------------------------------------------------------------------------------


def change_task():
    return task_of("update")


def changed(task):
    """Returns an open connection to the database as the solution leaves it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(task.files[DATABASE])
    connection.execute(task.problem.solution[-1].removeprefix("sqlite "))
    return connection


def reward_of(task, connection):
    data = connection.serialize()
    connection.close()
    return reward_after(task, lambda box: box.write_files({DATABASE: data}))


def rebuild(connection, table, definition):
    """Replaces a table by something else; its rows move to `hidden`."""
    connection.executescript(f"ALTER TABLE {table} RENAME TO hidden; {definition}")


@pytest.mark.parametrize(
    "trick",
    [
        "rm data.db",
        "rm data.db; mkfifo data.db",
        "rm data.db; mkdir data.db",
        "mv data.db /tmp/x; ln -s /tmp/x data.db",
        "rm data.db; ln -s /dev/zero data.db",
        "> data.db",
        f"truncate -s {MAX_BYTES + 1} data.db",
        "truncate -s 1500 data.db",
        "head -c 8192 /dev/urandom > data.db",
        "chmod 000 data.db",
    ],
)
def test_only_a_database_at_its_path_counts(trick):
    task = change_task()
    assert reward_after(task, solved=True) == 1.0
    assert reward_after(task, trick, solved=True) == 0.0


def test_a_trigger_does_not_fire_and_an_extra_table_does_not_matter():
    task = change_task()
    connection = changed(task)
    table = next(iter(task.problem.goal.tables))
    connection.executescript(
        f"CREATE TABLE extra (x); CREATE TRIGGER t AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END"
    )
    assert reward_of(task, connection) == 1.0


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE VIEW {table} AS SELECT * FROM hidden",
        "CREATE VIEW {table} AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "CREATE VIRTUAL TABLE {table} USING fts5(id, name, size)",
        "CREATE TABLE {table} (id, name, size AS (zeroblob(9000000))); INSERT INTO {table} (id) VALUES (1)",
        "CREATE TABLE {table} (id, name, size AS (printf('%.*c', 9000000, 'x'))); INSERT INTO {table} (id) VALUES (1)",
        "CREATE TABLE {table} (id, name, size AS (instr(hex(zeroblob(40000)), hex(zeroblob(20000)) || '1'))); "
        "INSERT INTO {table} (id) VALUES (1)",
        "CREATE TABLE {table} AS SELECT *, 1 AS more FROM hidden",
        "CREATE TABLE {table} AS SELECT * FROM hidden UNION ALL SELECT * FROM hidden",
        "CREATE TABLE {table} AS SELECT * FROM hidden LIMIT 1",
        "CREATE TABLE {table} (id, name, size); INSERT INTO {table} VALUES (1, zeroblob(500000), CAST(x'ff' AS TEXT))",
    ],
)
def test_only_the_table_with_its_rows_counts(definition):
    task = change_task()
    for table in list(task.problem.goal.tables)[:2]:
        connection = changed(task)
        rebuild(connection, table, definition.format(table=table))
        assert reward_of(task, connection) == 0.0


@pytest.mark.parametrize("value", ["{}", "abs({})", "instr(zeroblob(9000), zeroblob(4000) || x'01') + {}"])
def test_a_computed_column_is_not_run(value):
    task = change_task()
    name, table = list(task.problem.goal.tables.items())[1]
    connection = changed(task)
    cases = " ".join(f"WHEN {number} THEN {value.format(amount)}" for number, _, amount in table.rows)
    rebuild(connection, name, f"CREATE TABLE {name} (id, name, {table.columns[2]} AS (CASE id {cases} END))")
    connection.execute(f"INSERT INTO {name} SELECT id, name FROM hidden")
    assert reward_of(task, connection) == 0.0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sqlite_master SET sql = 'CREATE VIEW ' || name || ' AS SELECT 1' WHERE type = 'table'",
        "UPDATE sqlite_master SET rootpage = 99",
        "UPDATE sqlite_master SET rootpage = 1",
        "UPDATE sqlite_master SET sql = 'CREATE TABLE ' || name || '(' || hex(zeroblob(100000)) || ')'",
        "UPDATE sqlite_master SET sql = NULL",
        "UPDATE sqlite_master SET sql = 17",
        "UPDATE sqlite_master SET sql = x'ff'",
        "UPDATE sqlite_master SET name = x'ff'",
        "UPDATE sqlite_master SET sql = CAST(replace(sql, 'INTEGER', 'TEXT') AS BLOB), name = CAST(name AS BLOB)",
        "INSERT INTO sqlite_master VALUES ('index', 'x', 'x', 3, 'CREATE INDEX x ON x (x)')",
    ],
)
def test_a_forged_schema_earns_nothing(statement):
    task = change_task()
    connection = changed(task)
    connection.executescript(f"PRAGMA writable_schema = ON; {statement}")
    assert reward_of(task, connection) == 0.0


@pytest.mark.parametrize("kind", ["VIEW {} AS SELECT * FROM hidden", "VIRTUAL TABLE {} USING fts5(id, name, size)"])
def test_decoy_in_the_schema_does_not_count_as_the_table(kind):
    task = change_task()
    name = next(iter(task.problem.goal.tables))
    connection = changed(task)
    rebuild(connection, name, f"CREATE {kind.format(name)}; CREATE TABLE decoy (id)")
    connection.executescript(
        f"PRAGMA writable_schema = ON; UPDATE sqlite_master SET name = 'other' WHERE name = '{name}';"
        f"UPDATE sqlite_master SET name = '{name}', type = 'table' WHERE name = 'decoy';"
    )
    assert reward_of(task, connection) == 0.0


def test_index_is_checked_by_its_columns():
    task = task_of("index", level=2)
    assert isinstance(task.problem.goal, Contents)
    sql = task.problem.solution[-1].removeprefix("sqlite ")
    start, columns = sql.removesuffix(")").split("(")
    first, second = columns.split(", ")
    for statement, reward in (
        (f'{start.replace("INDEX", "INDEX IF NOT EXISTS").lower()} ("{first}" ,\n [{second}])', 1.0),
        (f"{start} ({second}, {first})", 0.0),
        (f"{start} ({first})", 0.0),
        (f"{start} ({first}, {second}) WHERE id > 0", 0.0),
    ):
        connection = sqlite3.connect(":memory:")
        connection.deserialize(task.files[DATABASE])
        connection.execute(statement)
        assert reward_of(task, connection) == reward, statement
