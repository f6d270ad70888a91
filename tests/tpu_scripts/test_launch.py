import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "tpu_scripts" / "launch.sh"
# Records its arguments and PYTHONPATH; its exit status is in the file `status` next to it.
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
    """Runs the script outside the repository."""
    path = f"{fake}:{os.environ['PATH']}"
    own = ("PYTHON", "PYTHONPATH", "CONDA_PREFIX")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    settings = {"PATH": path, "POLL_SECONDS": "0.05", "VIRTUAL_ENV": str(fake.parent)} | environment
    return subprocess.run(
        [LAUNCH, *arguments], cwd=fake.parent, env=clean | settings, capture_output=True, text=True, timeout=60
    )


def call(fake: Path) -> list[str]:
    return (fake / "call").read_text().split("\0")[1:-1]


def test_interpreter_of_the_repositorys_venv_is_used_unless_an_environment_is_active(fake: Path):
    root = fake.parent / "repository"
    shutil.copytree(LAUNCH.parent, root / "tpu_scripts")
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(fake / "python", root / ".venv" / "bin" / "python")
    shutil.copy(fake / "status", root / ".venv" / "bin" / "status")
    command = [root / "tpu_scripts" / "launch.sh", "--local=1", *RUN]
    for active, used in (("", root / ".venv" / "bin"), (str(fake), fake)):
        environment = os.environ | {"PATH": f"{fake}:{os.environ['PATH']}", "PYTHON": "", "VIRTUAL_ENV": active}
        environment |= {"CONDA_PREFIX": "", "POLL_SECONDS": "0.05"}
        subprocess.run(command, cwd=fake.parent, env=environment, check=True, timeout=60)
        assert (used / "call").exists()
        (used / "call").unlink()
        assert not (fake / "call").exists()


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


def test_dry_run_prints_an_equivalent_command_and_writes_nothing(fake: Path):
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
        (["--local", "0", "--config=c", "--workdir=w"], "--local 0 is not a number of processes"),
        (["--config=c", "--workdir=w"], "give --local N, or --pod NAME --zone ZONE"),
        (["--local", "1", "--pod", "p", "--config=c", "--workdir=w"], "--local and --pod exclude each other"),
        (["--local"], "--local needs a value"),
        (["--local", "1", "--restarts", "x", "--config=c", "--workdir=w"], "--restarts x is not a number"),
        (["--local", "1", "--report", "--config=c", "--workdir=w"], "--logs and --report need --sweep"),
        (["--pod", "p", "--config=c", "--workdir=/w"], "--pod needs --zone ZONE"),
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


# Replaces one of several processes: prints its index, then executes `plan` in its folder.
PROCESS = """\
    #!/usr/bin/env bash
    folder=$(dirname "$0")
    printf '%s %s %s\\n' "$JAX_PROCESS_ID" "$JAX_NUM_PROCESSES" "$JAX_COORDINATOR_ADDRESS" >>"$folder/started"
    echo "$JAX_PROCESS_ID says hello"
    stop=''
    trap 'echo INT >>"$folder/signals-$JAX_PROCESS_ID"; stop=130' INT
    trap 'echo TERM >>"$folder/signals-$JAX_PROCESS_ID"; stop=75' TERM
    . "$folder/plan"
"""
WAIT = 'touch "$folder/ready-$JAX_PROCESS_ID"; until [[ $stop ]]; do sleep 0.05; done; exit "$stop"'
STUBBORN = 'touch "$folder/ready-$JAX_PROCESS_ID"; while :; do sleep 0.05; done'


@pytest.fixture
def several(fake: Path) -> Callable[[str], Path]:
    """Returns a function that writes the plan of the processes."""
    (fake / "python").write_text(textwrap.dedent(PROCESS))

    def write(plan: str) -> Path:
        (fake / "plan").write_text(plan)
        return fake

    return write


def left_behind(fake: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-af", str(fake / "python")], capture_output=True, text=True).stdout
    return found.splitlines()


RUN = ["--config=c.py", "--workdir=w"]


def test_processes_find_each_other_and_have_a_log_each(several: Callable[[str], Path]):
    fake = several("exit 0")
    result = launch(fake, "--local", "3", *RUN)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0 says hello\n", "")
    started = sorted(line.split() for line in (fake / "started").read_text().splitlines())
    assert [line[:2] for line in started] == [["0", "3"], ["1", "3"], ["2", "3"]]
    (address,) = {line[2] for line in started}
    assert address.startswith("localhost:")
    for i in range(3):
        assert (fake.parent / "w" / "launch" / f"worker-{i}.log").read_text() == f"{i} says hello\n"


def test_one_process_has_no_coordinator(several: Callable[[str], Path]):
    fake = several("exit 0")
    assert launch(fake, "--local", "1", *RUN).returncode == 0
    assert (fake / "started").read_text() == "  \n"


@pytest.mark.parametrize("others", [WAIT, STUBBORN, "sleep 0.3; exit 75", "kill -KILL $$"])
def test_failed_process_ends_the_others_without_a_restart(several: Callable[[str], Path], others: str):
    fake = several(f"((JAX_PROCESS_ID == 1)) && sleep 0.2 && exit 1\n{others}")
    result = launch(fake, "--local", "2", *RUN, GRACE_SECONDS="1" if others in (WAIT, STUBBORN) else "30")
    assert result.returncode == 1, result.stderr
    assert len((fake / "started").read_text().splitlines()) == 2
    assert not left_behind(fake)


@pytest.mark.parametrize(
    ("end", "reason"),
    [("exit 75", "status 75: it was stopped, or another process"), ("kill -KILL $$", "status 137: killed by signal 9")],
)
def test_lost_run_is_restarted(several: Callable[[str], Path], end: str, reason: str):
    fake = several(f'[[ -e "$folder/again" ]] && exit 0; sleep 0.2; touch "$folder/again"; {end}')
    result = launch(fake, "--local", "1", *RUN)
    assert result.returncode == 0
    assert f"restart 1 of 2 after {reason}" in result.stderr
    assert len((fake / "started").read_text().splitlines()) == 2


@pytest.mark.parametrize(("flags", "starts"), [((), 3), (("--restarts", "0"), 1), (("--restarts=1",), 2)])
def test_run_that_keeps_getting_lost_is_given_up_with_its_status(several, flags: tuple[str, ...], starts: int):
    fake = several("exit 75")
    result = launch(fake, "--local", "1", *flags, *RUN)
    assert result.returncode == 75
    assert len((fake / "started").read_text().splitlines()) == starts


def interrupt(fake: Path, processes: int, signals: list[int], *flags: str) -> int:
    """Starts, sends the signals to the whole group, as a terminal does, and returns the exit status."""
    environment = os.environ | {"PYTHON": str(fake / "python"), "POLL_SECONDS": "0.05"}
    command = [LAUNCH, "--local", str(processes), *flags, *RUN]
    with subprocess.Popen(command, cwd=fake.parent, env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 20
        while len(list(fake.glob("ready-*"))) < processes and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in signals:
            os.killpg(process.pid, number)
            time.sleep(0.5)
        return process.wait(timeout=20)


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(signal.SIGINT, "INT", 130), (signal.SIGTERM, "TERM", 75), (signal.SIGHUP, "TERM", 75)],
)
def test_signal_reaches_every_process_once_without_a_restart(several, number: int, name: str, status: int):
    fake = several(WAIT)
    assert interrupt(fake, 2, [number]) == status
    assert [(fake / f"signals-{i}").read_text() for i in (0, 1)] == [f"{name}\n"] * 2
    assert len((fake / "started").read_text().splitlines()) == 2
    assert not left_behind(fake)


def test_second_signal_kills(several: Callable[[str], Path]):
    fake = several(STUBBORN)
    assert interrupt(fake, 2, [signal.SIGINT, signal.SIGINT]) == 137
    assert not left_behind(fake)


def test_nothing_outlives_a_killed_launch(several: Callable[[str], Path]):
    fake = several(WAIT)
    assert interrupt(fake, 2, [signal.SIGKILL]) == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while left_behind(fake) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_behind(fake)
    assert [(fake / f"signals-{i}").read_text() for i in (0, 1)] == ["TERM\n"] * 2


def test_processes_left_behind_are_killed(several: Callable[[str], Path]):
    fake = several('(exec -a "$folder/python-child" sleep 60) & exit 0')
    assert launch(fake, "--local", "1", *RUN).returncode == 0
    assert not left_behind(fake)


def test_dry_run_of_several_processes_prints_equivalent_commands(several: Callable[[str], Path]):
    fake = several('printf "%s\\0" "$@" >"$folder/call-$JAX_PROCESS_ID"')
    arguments = ["--config=c.py", "--workdir=w", *AWKWARD]
    result = launch(fake, "--local", "2", "--dry-run", *arguments)
    assert not (fake / "started").exists()
    assert not (fake.parent / "w").exists()
    environment = {"PATH": f"{fake}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", result.stdout], env=environment, cwd=fake.parent, check=True)
    for i in (0, 1):
        assert (fake / f"call-{i}").read_text().split("\0")[:-1] == ["-m", "echo_jax.train", *arguments]


def test_sweep_of_several_processes_starts_each_run_through_the_script(fake: Path):
    launch(fake, "--local", "2", "--sweep", "--config=c.py", "--workdir=w", "--owner=me")
    assert call(fake) == [
        *("-m", "echo_jax.sweep", "--config=c.py", "--workdir=w", "--owner=me"),
        f"--launcher={LAUNCH} --local=2 --restarts=2",
    ]


def test_report_of_a_sweep_leaves_no_log(fake: Path):
    launch(fake, "--local", "1", "--sweep", "--report", "--config=c.py", "--workdir=w")
    assert call(fake) == ["-m", "echo_jax.sweep", "--config=c.py", "--workdir=w", "--report"]
    assert not (fake.parent / "w").exists()


SCRIPTS = sorted(path for path in LAUNCH.parent.glob("*.sh") if path.name != "common.sh")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_short_and_has_help_that_names_every_option(script: Path):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert len(text.splitlines()) <= 100
    result = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=10)
    assert (result.returncode, result.stderr) == (0, "")
    cases = [line.strip().rpartition(") ")[0] or line.strip().rstrip(")") for line in text.splitlines()]
    options = {
        word.strip("=*") for case in cases for word in case.split(" | ") if re.fullmatch(r"--[a-z-]+(=\*)?", word)
    }
    options -= {"--help"}
    assert options
    assert sorted(option for option in options if option not in result.stdout) == []


def test_every_linked_file_exists():
    for text in LAUNCH.parent.glob("*.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text.read_text()):
            assert (text.parent / target).exists(), target


def test_scripts_are_clean():
    # Also look next to the interpreter: a virtual environment need not be on PATH.
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: install the extra `test`"
    result = subprocess.run(
        [shellcheck, "-x", *LAUNCH.parent.glob("*.sh")], cwd=LAUNCH.parents[1], capture_output=True, text=True
    )
    assert result.stdout == ""
