"""What the README shows of code works as it stands there."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from echo_jax.render import BuiltinRenderer
from echo_jax.rollout.collector import Collector, Job
from echo_jax.rollout.episode import Rules
from echo_jax.rollout.world import Machine
from echo_jax.tasks.task import Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import Limits

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_family_of_ones_own_is_solved_by_its_script_and_in_no_other_way():
    (code,) = re.findall(r"```python\n(.*?class SumFamily.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 20
    names = {"dataclasses": dataclasses, "np": np, "Task": Task, "__name__": "readme"}
    exec(code, names)
    family = names["SumFamily"]()
    jobs = [Job(family.make("heldout", i), group=i, rollout=i) for i in range(8)]
    with Collector(
        BuiltinRenderer(SentencePieces()), Rules(4, 400, 100), Machine(Limits()), tool_threads=2
    ) as collector:
        assert [t.reward for t in collector.scripted(jobs, [True] * 8, 0)] == [1.0] * 8
        assert [t.reward for t in collector.scripted(jobs, [False] * 8, 0)] == [0.0] * 8


def test_every_file_that_is_linked_exists():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (root / target).exists(), target
