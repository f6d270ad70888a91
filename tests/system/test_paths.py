"""Paths that users give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.system.paths import PathError, expanded, parse

ROOT = Path(__file__).parents[2]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("~/x", "--workdir") == Path("/home/me/x")
    assert parse("~", "--workdir") == Path("/home/me")
    assert expanded("~/m.gguf") == "/home/me/m.gguf"
    assert parse("a/~/b", "--workdir") == Path("a/~/b")
    assert parse("./~/b", "--workdir") == Path("~/b")
    with pytest.raises(PathError, match=r"'~nobody_has_this_name/x': there is no such home folder; write \./~nobody"):
        parse("~nobody_has_this_name/x", "--workdir")


@given(st.text(st.sampled_from(" \t\n")))
def test_an_empty_path_is_refused(text):
    with pytest.raises(PathError, match="--workdir is empty"):
        parse(text, "--workdir")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_any_other_path_stays_as_it_is(text):
    if text.strip() and not text.startswith("~"):
        assert parse(text, "--workdir") == Path(text)


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"echo_jax.{program}", *arguments]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, encoding="utf-8")


def test_a_program_expands_and_refuses_paths(tmp_path):
    (tmp_path / "c.py").write_text("from configs.tiny import get_config\ndef sweep():\n    yield {}\n")
    ended = run(tmp_path, "sweep", "--config=~/c.py", "--workdir=~/x", "--dry_run")
    assert f"--config={tmp_path / 'c.py'} --workdir={tmp_path / 'x' / 'base'}" in ended.stdout, ended.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("train", "workdir"),
        pytest.param("sweep", "logs", marks=pytest.mark.variant),
        pytest.param("evaluate", "workdir", marks=pytest.mark.variant),
        pytest.param("view", "trajectories", marks=pytest.mark.variant),
        pytest.param("export", "output", marks=pytest.mark.variant),
    ],
)
def test_an_empty_flag_starts_nothing(tmp_path, program, flag):
    config = f"--config={ROOT / 'configs' / 'tiny.py'}"
    more = {"view": [], "train": [config]}.get(program, [config, "--workdir=w"] if flag != "workdir" else [config])
    ended = run(tmp_path, program, *more, f"--{flag}=")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: --{flag} is empty")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_refused_before_work(monkeypatch, tmp_path):
    """The library that writes checkpoints takes no other, and notices after the warm start."""
    with pytest.raises(PathError, match=r"^--workdir = 'caf\\udce9': .* only paths in UTF-8.*; rename the folder$"):
        parse(os.fsdecode(b"caf\xe9"), "--workdir")
    inside = tmp_path / os.fsdecode(b"caf\xe9")
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(PathError, match="only paths in UTF-8"):
        parse("runs/x", "--workdir")
    assert parse("/tmp/café/☃", "--workdir") == Path("/tmp/café/☃")


def test_under_a_locale_that_is_not_utf8_a_path_must_be_ascii(monkeypatch):
    """Python would write to another folder than such libraries."""
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso-8859-1")
    with pytest.raises(PathError, match="or set a UTF-8 locale, such as LC_ALL=C.UTF-8"):
        parse("/tmp/café", "--workdir")
    assert parse("/tmp/cafe", "--workdir") == Path("/tmp/cafe")
