import os
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "tpu_scripts" / "launch.sh"
# Records its arguments and its PYTHONPATH; `status` in its folder is the exit status of the program.
PYTHON = """\
    #!/bin/sh
    folder=$(dirname "$0")
    { printf '%s\\0' "$PYTHONPATH"; printf '%s\\0' "$@"; } >"$folder/call"
    echo "on stdout"; echo "on stderr" >&2
    exit "$(cat "$folder/status")"
"""
AWKWARD = ["--config.a=two words", "--config.b=$(touch broken)'\"", "--config.c=", "--config.d=*", "--config.e=(1, 2)"]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with a `python` to put on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(textwrap.dedent(PYTHON))
    (folder / "python").chmod(0o755)
    (folder / "status").write_text("0")
    return folder


def launch(fake: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in a folder that is not the repository."""
    path = f"{fake}:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    return subprocess.run(
        [LAUNCH, *arguments], cwd=fake.parent, env=clean | {"PATH": path} | environment, capture_output=True, text=True
    )


def call(fake: Path) -> list[str]:
    return (fake / "call").read_text().split("\0")[1:-1]


@pytest.mark.parametrize(("flags", "module"), [((), "echo_jax.train"), (("--sweep",), "echo_jax.sweep")])
def test_arguments_reach_the_program_unchanged(fake: Path, flags: tuple[str, ...], module: str):
    arguments = ["--config=configs/x.py:arg", "--workdir=the workdir", *AWKWARD]
    result = launch(fake, "--local", "1", *flags, *arguments)
    assert result.returncode == 0, result.stderr
    assert call(fake) == ["-m", module, *arguments]
    assert (fake / "call").read_text().split("\0")[0] == str(LAUNCH.parents[1])
    recorded = fake.parent / "the workdir" / "launch"
    assert (recorded / "worker-0.log").read_text() == result.stdout == "on stdout\non stderr\n"
    assert shlex.split((recorded / "command.txt").read_text()) == ["python", *call(fake)]
    assert not (fake.parent / "broken").exists()


def test_exit_status_is_that_of_the_program_and_logs_are_appended(fake: Path):
    arguments = ["--local", "1", "--config=c.py", "--workdir=w"]
    (fake / "status").write_text("37")
    assert launch(fake, *arguments).returncode == 37
    (fake / "status").write_text("0")
    assert launch(fake, *arguments).returncode == 0
    assert (fake.parent / "w" / "launch" / "worker-0.log").read_text() == "on stdout\non stderr\n" * 2


def test_dry_run_prints_a_command_that_does_the_same_and_writes_nothing(fake: Path):
    arguments = ["--config=c.py", "--workdir=w", *AWKWARD]
    result = launch(fake, "--local", "1", "--dry-run", *arguments, PYTHONPATH="/else where")
    assert result.returncode == 0, result.stderr
    assert not (fake / "call").exists()
    assert not (fake.parent / "w").exists()
    subprocess.run(
        ["bash", "-c", result.stdout], env={"PATH": f"{fake}:{os.environ['PATH']}"}, cwd=fake.parent, check=True
    )
    assert call(fake) == ["-m", "echo_jax.train", *arguments]
    assert (fake / "call").read_text().split("\0")[0] == f"{LAUNCH.parents[1]}:/else where"


def test_dry_run_of_a_sweep_asks_the_sweep(fake: Path):
    launch(fake, "--local", "1", "--dry-run", "--sweep", "--config=c.py", "--workdir=w", "--only=a b")
    assert call(fake) == ["-m", "echo_jax.sweep", "--config=c.py", "--workdir=w", "--only=a b", "--dry_run"]
    assert not (fake.parent / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local", "2", "--config=c", "--workdir=w"], "only --local 1 so far, not --local 2"),
        (["--config=c", "--workdir=w"], "only --local 1 so far"),
        (["--local"], "--local needs a number"),
        (["--local", "1", "--workdir=w"], "--config=PATH is missing"),
        (["--local", "1", "--config=c"], "--workdir=DIR is missing"),
        (["--local", "1", "--config", "c", "--workdir=w"], "write --config=VALUE"),
    ],
)
def test_wrong_use_is_explained_and_starts_nothing(fake: Path, arguments: list[str], message: str):
    result = launch(fake, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"launch.sh: {message}\n")
    assert not (fake / "call").exists()
    assert not (fake.parent / "w").exists()


def test_help_names_every_option(fake: Path):
    result = launch(fake, "--help")
    assert result.returncode == 0
    assert all(
        option in result.stdout for option in ("--local", "--sweep", "--dry-run", "--config", "--workdir", "PYTHON")
    )
