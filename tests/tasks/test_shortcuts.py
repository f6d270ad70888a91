"""No shortcut solves more than a guess, tasks of an older revision never change, and the splits share no task."""

import hashlib

import pytest
from shortcuts import CASES, measure

from echo_jax.tasks import FAMILIES

TASKS = {"rooms": 12, "shell": 150}  # by family; the answers of most shortcuts need no sandbox
# The first tasks of revision 1, as version 0.1.0 made them.
RELEASED = [
    ("lookup", {"folders": 3, "files": 6, "words": 96}, "18d55443f32c10be"),
    ("rooms", {"width": 3, "height": 3, "map_seed": 0}, "3b752fca831e60e0"),
    ("maze", {"width": 3, "height": 3}, "37e1340e447241df"),
    ("maze", {"width": 6, "height": 6}, "c21bf5556c9ad687"),
    ("shell", {"level": 1}, "f915b372d99ced6b"),
    ("shell", {"level": 2}, "8a57455b44b6d68e"),
    ("shell", {"level": 3}, "d71072e6ed567c0c"),
    ("python", {"level": 1}, "52bc480fad1aa433"),
    ("python", {"level": 2}, "332838649ac262c5"),
    ("python", {"level": 3}, "8db85eb30364994c"),
    ("sqlite", {"level": 1}, "f1fe4e4d83254734"),
    ("sqlite", {"level": 2}, "c750f4fcc574869a"),
    ("sqlite", {"level": 3}, "2c135ab8f8cd8517"),
]


def content(task):
    """Returns all that makes a task what it is, without its name."""
    hidden = task.problem.goal if hasattr(task, "problem") else sorted(getattr(task, "doors", ()))
    return repr((task.prompt, sorted(task.files.items()), sorted(task.symlinks.items()), task.setup, hidden))


def facts(task):
    problem = getattr(task, "problem", None)
    yield from (
        task.name,
        task.prompt,
        task.tools,
        sorted(task.files.items()),
        sorted(task.symlinks.items()),
        task.setup,
    )
    if problem:
        yield problem.goal, problem.solution, problem.slip
    else:
        yield [getattr(task, field, None) for field in ("command", "answer", "path", "goal", "start")]
    yield sorted(getattr(task, "doors", ()))


@pytest.mark.parametrize(("family", "parameters", "digest"), RELEASED, ids=str)
def test_tasks_of_the_first_revision_are_those_that_were_released(family, parameters, digest):
    """A run that goes on must find its tasks as they were: this digest never changes."""
    for made in (FAMILIES[family](**parameters), FAMILIES[family](**parameters, revision=1)):
        tasks = [made.make(split, i) for split in ("train", "heldout") for i in range(40)]
        found = repr([[*facts(task)] for task in tasks]).encode()
        assert hashlib.sha256(found).hexdigest()[:16] == digest


def often(parameters):
    return parameters.get("level", 2) == 2 and parameters.get("width", 3) == 3


# All levels of a family but one, and large maps, are variants.
ANY = [pytest.param(family, p, marks=[] if often(p) else pytest.mark.variant) for family, p in CASES]


@pytest.mark.parametrize(("family", "parameters"), ANY, ids=str)
def test_no_shortcut_solves_more_than_a_guess(family, parameters):
    """The limit holds for all tasks and for each template: up to two standard errors, since it is a sample."""
    for shortcut, rates in measure(family, parameters, TASKS.get(family, 200)).items():
        for template, rate in rates.items():
            assert rate.excess <= 2 * rate.error * bool(template), (shortcut, template, str(rate), rate.limit)


@pytest.mark.parametrize(
    ("family", "parameters", "shortcut", "template"),
    [
        ("lookup", {"folders": 3, "files": 6, "words": 96}, "first file that holds a word of the question", "file"),
        ("rooms", {"width": 3, "height": 3, "map_seed": 0}, "cd to the sign that grep finds", ""),
        ("shell", {"level": 2}, "file with the most lines", "holder"),
        ("sqlite", {"level": 1}, "last thing", "never"),
        ("maze", {"width": 3, "height": 3}, "straight to the goal, rows first", ""),
    ],
    ids=str,
)
def test_the_same_shortcuts_solve_tasks_of_the_first_revision(family, parameters, shortcut, template):
    count = {"rooms": 8, "maze": 200}.get(family, 100)
    assert measure(family, parameters, count, revision=1, only=shortcut)[shortcut][template].excess > 0


@pytest.mark.parametrize(("family", "parameters"), [*ANY, ("maze", {"width": 2, "height": 2})], ids=str)
def test_no_heldout_task_is_a_train_task(family, parameters):
    made = FAMILIES[family](**parameters, revision=2)
    train, heldout = ({content(made.make(split, i)) for i in range(400)} for split in ("train", "heldout"))
    assert min(len(train), len(heldout)) > 1
    assert not train & heldout
