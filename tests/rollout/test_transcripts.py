"""Rollouts shown on a terminal: what the policy and the tools wrote cannot steer it."""

import dataclasses
import io
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from echo_jax.roles import Role
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.rollout.transcripts import show
from echo_jax.system.progress import Progress
from echo_jax.tokenizer import SentencePieces

HOSTILE = "\x1b[2J \x1b]52;c;eA==\x07 \x9b31m \u202e \x00 \x7f \r"
TOKENIZER = SentencePieces()


def trajectory(text: str, task: str = "t") -> Trajectory:
    ids = np.asarray([TOKENIZER.task, *TOKENIZER.encode(text)], np.int32)
    zeros = np.zeros(len(ids))
    arrays = {"ids": ids, "role": np.full(len(ids), Role.OBSERVATION, np.int8), "tool": zeros.astype(np.int8)}
    arrays |= {"logprob": zeros, "entropy": zeros, "version": zeros.astype(np.int32)}
    given = {f.name: "" for f in dataclasses.fields(Trajectory) if f.default is dataclasses.MISSING}
    numbers = dict.fromkeys(("group", "rollout", "shared", "reward", "turns"), 0)
    return Trajectory(**given | arrays | numbers | {"task": task, "scored": True, "attempts": (), "outcome": task})


def shown(what, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, soft_wrap=True, width=200)
    what(console)
    text = console.file.getvalue()
    return re.sub(r"\x1b\[[0-9;]*m", "", text)  # the colours of the parts


def controls(text: str) -> set[str]:
    return set(re.findall("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text))


@given(st.one_of(st.text(max_size=30), st.text(st.sampled_from(HOSTILE), max_size=30)))
@example(HOSTILE)
def test_a_rollout_is_shown_without_control_characters(text):
    made = shown(lambda console: show(trajectory(text, task=text), TOKENIZER, console), terminal=True)
    assert not controls(made)


def test_the_escapes_can_be_read():
    made = shown(lambda console: show(trajectory(HOSTILE), TOKENIZER, console), terminal=True)
    assert r"\x1b[2J \x1b]52;c;eA==\x07 \x9b31m \u202e \x00 \x7f \r" in made


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_no_control_characters(terminal):
    def work(console):
        with Progress(f"phase {HOSTILE}", total=2, console=console) as progress:
            progress.log(HOSTILE)
            progress.update(1, {f"rate {HOSTILE}": 0.5})

    made = shown(work, terminal=terminal)
    assert r"\x1b[2J" in made
    assert "\x9b" not in made
    assert "\u202e" not in made
    assert "]52;" not in made.replace(r"\x1b]52;", "")
