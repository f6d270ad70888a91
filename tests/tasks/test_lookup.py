"""The lookup tasks: the right script earns 1 in a real sandbox, nothing else does, and nothing reveals the answer."""

import collections
import functools

import numpy as np
import pytest
from scoring import score

from echo_jax.render import BuiltinRenderer
from echo_jax.roles import Role
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import Machine
from echo_jax.tasks.lookup import KEYED_LINES, LINES, MIN_VALUES, TEMPLATES, LookupFamily
from echo_jax.tasks.words import WORDS
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits

RENDERER = BuiltinRenderer(SentencePieces())
RULES = Rules(max_turns=3, max_tokens=96, max_turn_tokens=24)  # the default config's
LIMITS = Limits(timeout_seconds=10.0, memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)
FAMILY = LookupFamily(folders=3, files=6, words=96, revision=2)


def run_scripts(tasks, *, solve):
    jobs = [Job(task, group=i, rollout=i) for i, task in enumerate(tasks)]
    with Collector(RENDERER, RULES, Machine(LIMITS), tool_threads=2) as collector:
        return collector.scripted(jobs, [solve] * len(jobs), seed=0)


@functools.cache
def some_of_every_template(count):
    found = {template: [] for template in TEMPLATES}
    for i in range(200):
        for split in ("train", "heldout"):
            task = FAMILY.make(split, i)
            if len(found[task.template]) < count:
                found[task.template].append(task)
    return [task for tasks in found.values() for task in tasks]


def observed(trajectory):
    return RENDERER.tokenizer.decode(trajectory.ids[trajectory.role == Role.OBSERVATION])


def test_solving_script_solves_every_template_within_the_default_budgets():
    tasks = some_of_every_template(13)
    assert len(tasks) == 13 * len(TEMPLATES) >= 60
    for task, trajectory in zip(tasks, run_scripts(tasks, solve=True), strict=True):
        assert (trajectory.reward, trajectory.outcome) == (1.0, "submitted"), (task.prompt, observed(trajectory))
        # The command prints the answer and nothing that could be mistaken for it.
        assert observed(trajectory).count("\n") == 1
        assert observed(trajectory).split()[-1] == task.answer


def test_flawed_scripts_mostly_fail_in_different_ways():
    trajectories = run_scripts([FAMILY.make("train", i) for i in range(100)], solve=False)
    assert np.mean([t.reward for t in trajectories]) < 0.2
    assert all(t.outcome == "submitted" for t in trajectories)
    assert len({t.turns for t in trajectories}) > 1
    assert {status for t in trajectories for status in t.calls} > {"ok", "nonzero"}


def test_no_answer_and_every_wrong_answer_earn_nothing():
    for task in (FAMILY.make("train", i) for i in range(200)):
        wrong = {"", ".", "-", *WORDS, *task.files, *(f"./{path}" for path in task.files), *map(str, range(*LINES))}
        wrong -= {task.answer, task.answer.removeprefix("./")}
        assert score(task, None, None) == 0.0
        assert not any(score(task, guess, None) for guess in wrong)
        assert score(task, task.answer, None) == score(task, f" {task.answer}\n", None) == 1.0


def test_a_path_may_be_submitted_with_or_without_its_dot():
    task = next(task for task in some_of_every_template(13) if task.template == "file")
    assert task.answer.startswith("./")
    assert score(task, task.answer.removeprefix("./"), None) == 1.0


def test_prompt_does_not_contain_the_answer():
    for task in (FAMILY.make(split, i) for i in range(400) for split in ("train", "heldout")):
        assert not {task.answer, *task.answer.split("/")} & {*task.prompt.replace("/", " ").split()}, task.prompt


def test_no_answer_is_worth_guessing():
    answers = collections.defaultdict(collections.Counter)
    for i in range(2000):
        task = FAMILY.make("train", i)
        answers[task.template][task.answer] += 1
    for template in TEMPLATES:
        assert answers[template].most_common(1)[0][1] < 0.05 * answers[template].total(), template
    assert all(len(FAMILY.make("train", i).values) >= MIN_VALUES for i in range(20))


@pytest.mark.parametrize("words", [96, len(WORDS)])
def test_a_search_for_a_key_finds_one_line(words):
    """Some words are part of others: a search for "crow" also finds "crown"."""
    family = LookupFamily(folders=3, files=6, words=words, revision=2)
    for i in range(300):
        task = family.make("train", i)
        lines = [line for content in task.files.values() for line in content.decode().splitlines()]
        keys = [line.split()[0] for line in lines if line != "-"]
        assert len(keys) == 6 * KEYED_LINES
        if task.template == "file":
            continue  # the next test
        assert len(keys) == len({*keys})
        assert len({line.split()[1] for line in lines if line != "-"}) > 6  # a line does not hint at another
        for key in keys:
            assert sum(key in line for line in lines) == 1, key


def test_the_word_of_a_question_about_a_file_is_a_value_there_and_a_key_in_every_other_file():
    for task in (task for task in (FAMILY.make("train", i) for i in range(300)) if task.template == "file"):
        word = task.prompt.split()[-1]
        for path, content in task.files.items():
            [line] = [line for line in content.decode().splitlines() if word in line]
            assert line.split().index(word) == (path == task.answer.removeprefix("./"))


def test_first_and_last_lines_have_values_and_lengths_are_as_stated():
    for task in (FAMILY.make("heldout", i) for i in range(100)):
        for content in task.files.values():
            lines = content.decode().split("\n")
            assert lines.pop() == ""
            assert LINES[0] <= len(lines) < LINES[1]
            assert [len(line.split()) for line in (lines[0], lines[-1])] == [2, 2]


def test_train_and_heldout_share_no_tree_and_no_question_on_one():
    splits = [[FAMILY.make(split, i) for i in range(700)] for split in ("train", "heldout")]
    trees = [{tuple(sorted(task.files.items())) for task in tasks} for tasks in splits]
    assert not trees[0] & trees[1]
    assert len(trees[0]) == len(trees[1]) == 700
    assert len({task.name for tasks in splits for task in tasks}) == 1400


@pytest.mark.parametrize("index", [0, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 10**15])
def test_large_indices_are_distinct_tasks(index):
    task = FAMILY.make("train", index)
    assert task == FAMILY.make("train", index)
    assert task.files != FAMILY.make("train", index + 2**32).files
    assert task.files != FAMILY.make("heldout", index).files


@pytest.mark.parametrize(
    ("folders", "files", "words", "numbers"),
    [(3, 6, 76, "77"), (3, 6, len(WORDS) + 1, str(len(WORDS))), (30, 40, 96, "240"), (0, 6, 96, "0 folders"), (3, 0,
    96, "0 files"),
     (-1, 6, 96, "-1 folders"), (3, 6, -1, "77")],
)  # fmt: skip
def test_impossible_parameters_are_refused_with_the_numbers(folders, files, words, numbers):
    with pytest.raises(ValueError, match=f"task.lookup.*{numbers}"):
        LookupFamily(folders=folders, files=files, words=words)


@pytest.mark.parametrize(("folders", "files"), [(1, 1), (1, 6), (9, 3), (4, 30)])
def test_every_accepted_tree_can_be_made(folders, files):
    family = LookupFamily(folders=folders, files=files, words=len(WORDS))
    task = family.make("train", 0)
    assert len(task.files) == files
    assert len({path.split("/")[0] for path in task.files}) == min(folders, files)
