"""Standard streams of any kind, and text that a terminal takes as commands."""

import json
import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.system.terminal import escaped

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = {"\u061c", "\u200e", "\u200f"}


@given(st.text(st.characters(exclude_categories=())))
def test_shown_text_has_no_control_character_but_newline_and_tab(text):
    shown = escaped(text)
    shown.encode()  # no surrogates
    for character in set(shown) - {"\n", "\t"}:
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in BIDI
        assert character not in MARKS


@given(st.text(st.characters(categories=("L", "M", "N", "P", "S", "Zs"))))
def test_ordinary_text_is_shown_as_it_is(text):
    assert escaped(f"{text}\n\t\U0001f469\u200d\U0001f4bb") == f"{text}\n\t\U0001f469\u200d\U0001f4bb"


def test_the_escapes_name_the_character():
    assert escaped("\x1b[2J \x1b]52;c;eA==\x07 \x9b \u202e \udcff \r") == (
        r"\x1b[2J \x1b]52;c;eA==\x07 \x9b \u202e \udcff \r"
    )


# Opens a file as a run does, prints, and says in that file what its standard descriptors are.
PROGRAM = """
import contextlib, json, os, sys
from absl import flags
from echo_jax.system.cli import run_program
def main(args):
    with open(args.output, "w", encoding="utf-8") as file:
        print("\u00b1 said", flush=True)
        print("\u00b1 said", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            os.write(1, b"written")
            os.write(2, b"written")
        inherited = os.system("true >&1 2>&2")
        json.dump([os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)] + [file.fileno(), inherited], file)
if __name__ == "__main__":
    flags.DEFINE_string("output", None, "")
    run_program(main, required=("output",), outlives_output=True)
"""


def started(tmp_path, redirections: str, **environment: str) -> tuple[int, list]:
    """Returns exit status and what the program wrote, started by a shell with these redirections."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = f'exec "{sys.executable}" program.py --output=out {redirections}'
    status = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | environment).returncode
    return status, json.loads((tmp_path / "out").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "redirections",
    [
        "<&- >&- 2>&-",
        pytest.param("<&- >/dev/null", marks=pytest.mark.variant),
        pytest.param("2>&- >/dev/null", marks=pytest.mark.variant),
        pytest.param(">&- <&-", marks=pytest.mark.variant),
    ],
)
def test_what_is_printed_never_lands_in_a_file_that_took_the_place_of_a_closed_stream(tmp_path, redirections):
    status, (*standard, file, inherited) = started(tmp_path, redirections)
    assert status == 0
    assert file > 2
    assert inherited == 0
    assert str(tmp_path / "out") not in standard


@pytest.mark.parametrize(
    ("redirections", "environment"),
    [
        (">/dev/full 2>/dev/full", {"PYTHONIOENCODING": "ascii"}),
        pytest.param("> >(true)", {}, marks=pytest.mark.variant),
        pytest.param("1</dev/null 2</dev/null", {}, marks=pytest.mark.variant),
        pytest.param(">/dev/null", {"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.variant),
        pytest.param(">/dev/null", {"PYTHONIOENCODING": "latin-1:strict"}, marks=pytest.mark.variant),
        pytest.param(
            "2>/dev/full",
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
            marks=pytest.mark.variant,
        ),
    ],
)
def test_the_status_does_not_depend_on_printing(tmp_path, redirections, environment):
    assert started(tmp_path, redirections, **environment)[0] == 0
