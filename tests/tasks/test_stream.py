"""Laws of the task stream: a pure function of split, seed and index."""

import os
import subprocess
import sys

import pytest

from echo_jax.config import FIRST_SPARE, TASKS_PER_SEED
from echo_jax.tasks.stream import (
    environment_stream,
    environments,
    make_families,
    spare_tasks,
    task_stream,
)

PARAMETERS = {
    "lookup": {"folders": 3, "files": 6, "words": 96, "revision": 2},
    "rooms": {"width": 3, "height": 3, "map_seed": 0, "revision": 2},
    "shell": {"level": 2, "revision": 2},
    "python": {"level": 2, "revision": 2},
    "sqlite": {"level": 2, "revision": 2},
    "maze": {"width": 4, "height": 4, "revision": 2},
}
MIXTURE = {"lookup": 3.0, "rooms": 1.0}
DIGEST = """
import hashlib
from echo_jax.tasks import FAMILIES
for name in sorted(FAMILIES):
    family = FAMILIES[name](**{parameters!r}[name])
    tasks = [family.make(split, i) for split in ("train", "heldout") for i in range(20)]
    tasks = [sorted(vars(task).items()) if name != "maze" else (task.prompt, sorted(task.doors)) for task in tasks]
    print(name, hashlib.sha256(repr(tasks).encode()).hexdigest())
"""


def stream(mixture=MIXTURE, *, split="train", seed=0):
    return task_stream(mixture, make_families(mixture, PARAMETERS), split=split, seed=seed)


def test_every_process_makes_the_same_tasks():
    command = [sys.executable, "-c", DIGEST.format(parameters=PARAMETERS)]
    made = {
        subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, text=True)
        for hash_seed in ("0", "1", "2")
    }
    assert len(made) == 1
    assert made.pop().count("\n") == len(PARAMETERS)


def test_a_task_is_a_function_of_its_index_in_whatever_order_it_is_read():
    one, other = stream(), stream()
    forwards = [one[i] for i in range(40)]
    assert [other[i] for i in reversed(range(40))] == forwards[::-1]
    assert one[17] == forwards[17] == stream()[17]


@pytest.mark.parametrize(
    "mixture", [{"lookup": 3.0, "rooms": 1.0}, {"lookup": 1, "rooms": 1}, {"lookup": 0.1, "rooms": 0.9}]
)
def test_families_come_by_weight_and_no_task_is_skipped_or_repeated(mixture):
    endless = stream(mixture)
    tasks = [endless[i] for i in range(400)]
    for name, weight in mixture.items():
        own = [int(task.name.split("/")[-1]) for task in tasks if task.name.startswith(f"{name}/")]
        assert abs(len(own) / 400 - weight / sum(mixture.values())) < 0.01
        assert own == list(range(len(own)))


def test_a_family_of_weight_zero_never_comes():
    assert {stream({"lookup": 1.0, "rooms": 0.0})[i].name.split("/")[0] for i in range(50)} == {"lookup"}


def test_different_seeds_share_no_train_task():
    streams = [stream(seed=seed) for seed in range(4)]
    tasks = [tasks[i] for tasks in streams for i in range(100)]
    assert len({task.name for task in tasks}) == 400
    trees = {tuple(task.files.items()) for task in tasks if task.name.startswith("lookup")}
    assert len(trees) == 300


@pytest.mark.parametrize("mixture", [{"lookup": 3.0, "rooms": 1.0, "maze": 0.0}, {"rooms": 1.0}])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_each_task_has_the_entry_of_the_mixture_that_it_comes_from(mixture, split):
    tasks, entries = stream(mixture, split=split, seed=2), environment_stream(mixture)
    assert [tasks[i].name.split("/")[0] for i in range(40)] == [entries[i] for i in range(40)]
    assert environments(mixture) == [name for name in mixture if mixture[name]]


def test_spare_tasks_are_no_others():
    mixture, families = MIXTURE, make_families(MIXTURE, PARAMETERS)
    spare = [spare_tasks(families, seed=seed)(name, i) for seed in range(2) for name in mixture for i in range(20)]
    others = {stream(seed=seed)[i].name for seed in range(2) for i in range(100)}
    assert len({task.name for task in spare} | others) == 80 + 200
    assert spare[3].name == f"lookup/train/{FIRST_SPARE + 3}"
    # A stream reaches no entry's spare task before this index.
    assert int(stream()[FIRST_SPARE - 1].name.rsplit("/", 1)[1]) < FIRST_SPARE


def test_heldout_tasks_are_the_same_for_all_seeds_and_are_no_train_tasks():
    heldout = [[stream(split="heldout", seed=seed)[i] for i in range(60)] for seed in (0, 1, 12345)]
    assert heldout[0] == heldout[1] == heldout[2]
    assert not {task.name for task in heldout[0]} & {stream()[i].name for i in range(60)}


def test_the_stream_is_longer_than_any_run():
    for mixture in (MIXTURE, {"rooms": 1.0}):
        far = 9 * 10**8
        assert stream(mixture, seed=3)[far] == stream(mixture, seed=3)[far]
        assert len(stream(mixture)) >= TASKS_PER_SEED


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({}, "mixture is empty; choose from lookup, rooms"),
        ({"lookup": 1.0, "chess": 1.0}, "chess.*lookup, rooms"),
        ({"lookup": 0.0}, "one must be above 0"),
        ({"lookup": 2.0, "rooms": -1.0}, "no weight may be negative"),
        ({"lookup": float("nan")}, "task.mixture"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        make_families(mixture, PARAMETERS)


def test_parameters_of_a_family_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="task.rooms"):
        make_families({"rooms": 1.0}, {"rooms": {"width": 1, "height": 1, "map_seed": 0}})
