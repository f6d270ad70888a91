import csv
import io
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from echo_jax.run.sweeper import SweepError, run_name, run_sweep

CONFIG = """
    import ml_collections

    def get_config(arg=None):
        fields = {"seed": 0, "fast": True, "loss": {"weight": 0.0, "kind": "pg"}, "mesh": {"shape": (1, 1)}}
        return ml_collections.ConfigDict(fields | ({"big": 1} if arg == "big" else {})).lock()

    def sweep():
        yield from [*RUNS]
"""
# A stub of echo_jax.train: writes one record, then DONE; `seed` selects how it fails.
TRAIN = """
    import json, os, pathlib, signal, sys, time

    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    workdir = pathlib.Path(flags["workdir"])
    seed = int(flags.get("config.seed", 0))
    if flags.get("owner") == "me" and seed in (69, 75):
        sys.exit(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    print("weight", flags.get("config.loss.weight"), "steps", sys.argv[1:])
    print("to stderr", file=sys.stderr)
    signals = []
    if seed == 7:
        signal.signal(signal.SIGINT, lambda *_: signals.append(1))
        (workdir / "ready").touch()
        deadline = time.monotonic() + 20
        while not signals and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        (workdir / "signals").write_text(str(len(signals)))
        sys.exit(130)
    if seed == 8:
        raise SystemExit("no such luck")
    record = {"step": 1, "eval/solve_rate": 0.5 + seed, "observation/ce": None, "loss/total": 3.0}
    records = [{"step": 0, "eval/observation_ce": 2.5}, record]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
    if seed != 9:
        (workdir / "DONE").touch()
"""

RUN_SWEEP = "from sys import *; from echo_jax.run.sweeper import run_sweep;"


class Sandbox:
    """A config file and a stub of the train program in a folder."""

    def __init__(self, folder: Path, runs: list[Mapping[str, Any]]):
        self.folder, self.workdir = folder, folder / "out"
        self.config = folder / "config.py"
        self.config.write_text(textwrap.dedent(CONFIG).replace("*RUNS", ", ".join(map(repr, runs))))
        (folder / "train.py").write_text(textwrap.dedent(TRAIN))
        self.train = (sys.executable, str(folder / "train.py"))

    def run(self, **options) -> tuple[int, str]:
        output = io.StringIO()
        options = {"config": str(self.config), "workdir": self.workdir, "train": self.train, "output": output} | options
        return run_sweep(**options), output.getvalue()

    def results(self) -> list[dict[str, str]]:
        with (self.workdir / "results.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def test_every_run_gets_its_overrides_workdir_and_log_and_a_row_of_results(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"loss.weight": 0.05, "seed": 1}, {"loss.weight": 0.1}])
    status, output = sandbox.run(common={"fast": False})
    assert status == 0
    log = (sandbox.workdir / "weight=0.05,seed=1" / "log.txt").read_text()
    assert "weight 0.05" in log
    assert "to stderr" in log
    assert "--config.fast=False" in log
    assert f"--config={sandbox.config}" in log
    assert sandbox.results() == [
        {
            "run": "weight=0.05,seed=1",
            "loss.weight": "0.05",
            "seed": "1",
            "done": "yes",
            "eval/solve_rate": "1.5",
            "eval/observation_ce": "2.5",
            "observation/ce": "nan",
        },
        {
            "run": "weight=0.1",
            "loss.weight": "0.1",
            "seed": "",
            "done": "yes",
            "eval/solve_rate": "0.5",
            "eval/observation_ce": "2.5",
            "observation/ce": "nan",
        },
    ]
    assert "[2/2] weight=0.1: done in" in output
    assert "eval/solve_rate" in output


def test_runs_that_are_done_are_skipped_and_still_in_the_results(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 1}, {"seed": 2}])
    sandbox.run()
    for name in ("seed=1", "seed=2"):
        (sandbox.workdir / name / "log.txt").unlink()
    (sandbox.workdir / "results.csv").unlink()
    status, output = sandbox.run()
    assert status == 0
    assert "[1/2] seed=1: done before" in output
    assert not list(sandbox.workdir.glob("*/log.txt"))
    assert [row["eval/solve_rate"] for row in sandbox.results()] == ["1.5", "2.5"]


def test_failing_run_shows_the_end_of_its_log_and_the_sweep_goes_on(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 8}, {"seed": 9}, {"seed": 1}])
    status, output = sandbox.run()
    assert status == 1
    assert "[1/3] seed=8: FAILED with status 1" in output
    assert "    no such luck\n" in output
    assert "[2/3] seed=9: ended without writing DONE" in output
    assert "[3/3] seed=1: done in" in output
    assert [row["done"] for row in sandbox.results()] == ["no", "no", "yes"]


def test_run_of_another_owner_is_left_alone_and_one_that_stopped_is_a_failure(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 69}, {"seed": 1}])
    status, output = sandbox.run(owner="me")
    assert status == 0
    assert "[1/2] seed=69: belongs to another owner, left alone\n" in output
    assert "--owner=me" in (sandbox.workdir / "seed=1" / "log.txt").read_text()
    assert [row["done"] for row in sandbox.results()] == ["no", "yes"]
    sandbox = Sandbox(tmp_path, [{"seed": 75}])
    status, output = sandbox.run(owner="me")
    assert status == 1
    assert "[1/1] seed=75: FAILED with status 75 (the same command resumes it) after" in output


def test_launchers_status_decides_without_access_to_the_workdirs(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 9}, {"seed": 8}])
    launcher = [*sandbox.train, "--elsewhere=a b"]
    status, output = sandbox.run(launcher=launcher, train=["false"], logs=tmp_path / "logs", workdir=tmp_path / "far")
    assert status == 1
    assert "[1/2] seed=9: done in" in output
    assert "[2/2] seed=8: FAILED with status 1" in output
    assert "'--elsewhere=a b', " in (tmp_path / "logs" / "seed=9" / "log.txt").read_text()
    assert not list((tmp_path / "far").glob("*/log.txt"))
    assert not (tmp_path / "far" / "results.csv").exists()
    rows = csv.DictReader((tmp_path / "logs" / "results.csv").read_text().splitlines())
    assert [row["done"] for row in rows] == ["yes", "no"]


def test_report_starts_nothing_and_shows_existing_results(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 1}, {"seed": 2}])
    sandbox.run(only="seed=1")
    status, output = sandbox.run(report=True)
    assert status == 0
    assert "started" not in output
    assert [row["done"] for row in sandbox.results()] == ["yes", "no"]
    assert not (sandbox.workdir / "seed=2").exists()


def test_table_may_come_from_a_command(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 1}])
    status, output = sandbox.run(table=["sh", "-c", "echo the table; exit 3"])
    assert status == 0
    assert output.endswith("the table\nno table: status 3\n")
    assert not (sandbox.workdir / "results.csv").exists()
    assert sandbox.run(table=["the", "table"], dry_run=True)[1].endswith("\nthe table\n")


def test_only_flag_starts_only_the_matching_runs(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 1}, {"seed": 2}, {"seed": 12}])
    assert sandbox.run(only="=1$")[0] == 0
    assert [row["done"] for row in sandbox.results()] == ["yes", "no", "no"]
    with pytest.raises(SweepError, match="--only=7 matches none of the runs: seed=1, seed=2, seed=12"):
        sandbox.run(only="7")
    with pytest.raises(SweepError, match=r"--only=\( is not a regular expression"):
        sandbox.run(only="(")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss.wieght": 1.0}, "wieght"),
        ({"los.weight": 1.0}, "los"),
        ({"loss.weight": "heavy"}, "could not convert string to float"),
        ({"seed": 0.5}, "invalid literal for int"),
        ({"loss.kind": 3}, "loss.kind is of type str and does not take 3"),
        ({"seed": 1}, r"two runs would have the name seed=1"),
        ({"fast": False, "seed": 2}, "fast is set both by the sweep and on the command line"),
    ],
)
def test_a_bad_run_stops_the_sweep_before_the_first_one_starts(tmp_path: Path, bad: dict, message: str):
    sandbox = Sandbox(tmp_path, [{"seed": 1}, {"loss.weight": 0.5}, bad])
    with pytest.raises(SweepError, match=message):
        sandbox.run(common={"fast": True})
    assert not sandbox.workdir.exists()


def test_names_are_safe_short_stable_and_distinguish_fields_of_one_name():
    assert run_name({"loss.observation_weight": 0.05, "seed": 1}) == "observation_weight=0.05,seed=1"
    assert run_name({"seed": 1, "loss.observation_weight": 0.05}) == "observation_weight=0.05,seed=1"
    assert run_name({"model.width": 3, "engine.width": 4}) == "engine.width=4,model.width=3"
    assert run_name({"path": "../a b/$(rm)"}) == "path=.._a_b___rm_"
    assert run_name({"mesh.shape": (2, 4), "fast": False}) == "fast=False,shape=2-4"
    changes = ((0, "echo"), (5, "grpo"))
    assert run_name({"loss.mode_changes": changes}) == "mode_changes=_0,__echo__-_5,__grpo__"
    assert run_name({"task.mixture": {"maze": 1.0, "lookup": 2}}) == "mixture=lookup-2-maze-1.0"
    assert run_name({}) == "base"
    long = [run_name({"text": "x" * 300 + end}) for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 200


def test_values_of_every_type_reach_the_run(tmp_path: Path):
    overrides = {"mesh.shape": (2, 4), "fast": False, "loss.kind": "a 'b' $c", "loss.weight": 1, "seed": -3}
    sandbox = Sandbox(tmp_path, [overrides])
    _, output = sandbox.run(dry_run=True)
    assert shlex.split(output)[len(sandbox.train) + 2 :] == [
        "--config.mesh.shape=(2, 4)",
        "--config.fast=False",
        "--config.loss.kind=a 'b' $c",
        "--config.loss.weight=1",
        "--config.seed=-3",
    ]
    assert not sandbox.workdir.exists()


OPEN = """
    import numpy as np
    from echo_jax.config import default_config as get_config

    def sweep():
        yield from [*RUNS]
"""


@pytest.mark.parametrize(
    ("overrides", "name", "arguments"),
    [
        ({"seed": "np.int64(3)"}, "seed=3", ["seed=3"]),
        ({"loss.observation_weight": "np.float64(0.1)"}, "observation_weight=0.1", ["loss.observation_weight=0.1"]),
        ({"seed": "np.array(1)"}, "seed=1", ["seed=1"]),
        ({"loss.dedupe": "np.True_"}, "dedupe=True", ["loss.dedupe=True"]),
        ({"lora.targets": "np.array(['up', 'down'])"}, "targets=up-down", ["lora.targets=('up', 'down')"]),
        ({"lora.targets": "['up', 'down']"}, "targets=up-down", ["lora.targets=('up', 'down')"]),
        ({"task.mixture": "{'maze': 1.0}"}, "mixture=maze-1.0", ["task.mixture={'maze': 1.0}"]),
        (
            {"task.mixture": "{'maze': np.float32(0.5), 'lookup': 1}"},
            "mixture=lookup-1-maze-0.5",
            ["task.mixture={'maze': 0.5, 'lookup': 1}"],
        ),
        ({"loss.policy_options": "{}"}, "policy_options=", ["loss.policy_options={}"]),
        ({"task.mixture.maze": "0.5"}, "maze=0.5", ["task.mixture.maze=0.5"]),
        ({"loss.clip_low": "None"}, "clip_low=None", ["loss.clip_low=None"]),
        ({"loss.policy_options.mode": "'1'"}, "mode=1", ["loss.policy_options.mode='1'"]),
        ({"loss.policy_options.mode": "None"}, "mode=None", ["loss.policy_options.mode=None"]),
        ({"tools.count": "'mine:Count'"}, "count=mine_Count", ["tools.count=mine:Count"]),
    ],
)
def test_values_that_a_sweep_computes_reach_the_run(tmp_path: Path, overrides: dict, name: str, arguments: list[str]):
    sandbox = Sandbox(tmp_path, [])
    runs = ", ".join(f"{{{field!r}: {code}}}" for field, code in overrides.items())
    sandbox.config.write_text(textwrap.dedent(OPEN).replace("*RUNS", runs))
    _, output = sandbox.run(dry_run=True)
    command = shlex.split(output)[len(sandbox.train) :]
    assert command[1:] == [f"--workdir={sandbox.workdir / name}", *(f"--config.{argument}" for argument in arguments)]


def test_a_dictionary_on_the_command_line_applies_to_all_runs(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [])
    sandbox.config.write_text(textwrap.dedent(OPEN).replace("*RUNS", "{'seed': 1}"))
    _, output = sandbox.run(dry_run=True, common={"task.mixture": ml_collections.ConfigDict({"maze": 1.0})})
    assert "--config.task.mixture={'maze': 1.0}" in shlex.split(output)


def test_a_printed_command_cannot_steer_the_terminal_and_means_the_same_to_a_shell(tmp_path: Path):
    text = "it's \x1b[2J\x9b\u202e \\u0041 \xe9\udce9"
    sandbox = Sandbox(tmp_path, [])
    sandbox.config.write_text(textwrap.dedent(OPEN).replace("*RUNS", f"{{'tools.count': {text!a}}}"))
    _, output = sandbox.run(dry_run=True)
    assert not set("\x1b\x9b\u202e\udce9") & set(output)
    arguments = output.split(" ", len(sandbox.train) + 2)[-1].strip()
    spoken = subprocess.run(["bash", "-c", f"printf %s {arguments}"], stdout=-1, env={"LC_ALL": "C.UTF-8"}, check=True)
    assert os.fsdecode(spoken.stdout) == f"--config.tools.count={text}"


@pytest.mark.parametrize("run", ["5", "{5: 3}"])
def test_a_sweep_that_yields_no_fields_is_named(tmp_path: Path, run: str):
    sandbox = Sandbox(tmp_path, [])
    sandbox.config.write_text(textwrap.dedent(OPEN).replace("*RUNS", run))
    with pytest.raises(SweepError, match=f"yields {run}; it must yield dictionaries of field: value"):
        sandbox.run(dry_run=True)


def test_what_a_run_printed_cannot_steer_the_terminal(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": 8}])
    train = tmp_path / "train.py"
    train.write_text(train.read_text().replace("no such luck", r"\x1b]0;no such luck\x07\x9b\u202e"), encoding="utf-8")
    _, output = sandbox.run()
    assert r"    \x1b]0;no such luck\x07\x9b\u202e" in output
    assert not set("\x1b\x07\x9b\u202e") & set(output)


def test_config_without_a_sweep_or_a_file_is_refused(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [])
    with pytest.raises(SweepError, match="yields no run"):
        sandbox.run()
    with pytest.raises(SweepError, match="does not exist"):
        sandbox.run(config=str(tmp_path / "none.py"))
    sandbox.config.write_text("def get_config(arg=None): ...\n")
    with pytest.raises(SweepError, match=r"config\.py has no sweep\(\)"):
        sandbox.run()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.variant)])
def test_interruption_reaches_the_run_once_and_stops_the_sweep(tmp_path: Path, number: int):
    sandbox = Sandbox(tmp_path, [{"seed": 7}, {"seed": 1}])
    code = f"{RUN_SWEEP} exit(run_sweep(argv[1], argv[2], train=argv[3:]))"
    command = [sys.executable, "-c", code, str(sandbox.config), str(sandbox.workdir), *sandbox.train]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        ready, deadline = sandbox.workdir / "seed=7" / "ready", time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        # To the whole process group, as a terminal does.
        os.killpg(process.pid, number)
        output = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    assert (sandbox.workdir / "seed=7" / "signals").read_text() == "1"
    assert not (sandbox.workdir / "seed=1").exists()
    assert "run the same command again to continue" in output
    assert [row["done"] for row in sandbox.results()] == ["no", "no"]


def test_runs_share_a_warm_start_of_their_own(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"seed": seed, "loss.weight": weight} for seed in (1, 2) for weight in (0.1, 0.2)])
    text = sandbox.config.read_text().replace('"seed": 0,', '"seed": 0, "num_steps": 9, "init_from": "",')
    sandbox.config.write_text(text + '\nshared_warm_start = ("seed",)\n')
    output = io.StringIO()
    train = (sys.executable, str(tmp_path / "train.py"))
    assert run_sweep(str(sandbox.config), sandbox.workdir, train=train, output=output) == 0
    names = ["warm_start,seed=1", "weight=0.1,seed=1", "weight=0.2,seed=1"]
    assert [line.split("] ")[1].split(":")[0] for line in output.getvalue().splitlines() if ": started" in line] == [
        *names, *(name.replace("seed=1", "seed=2") for name in names)
    ]  # fmt: skip
    printed = (sandbox.workdir / names[0] / "log.txt").read_text()
    assert "--config.seed=1" in printed
    assert "--config.num_steps=0" in printed
    assert f"--config.init_from={sandbox.workdir / names[0]}" in (sandbox.workdir / names[2] / "log.txt").read_text()

    output = io.StringIO()
    other = tmp_path / "other"
    assert run_sweep(str(sandbox.config), other, train=train, only="weight=0.2,seed=2", output=output) == 0
    assert {path.name for path in other.iterdir()} == {"warm_start,seed=2", "weight=0.2,seed=2", "results.csv"}


def test_arms_that_would_warm_start_differently_share_none(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"loss.weight": 0.1}, {"optimizer.clip": 0.5}])
    text = sandbox.config.read_text().replace(
        '"seed": 0,', '"seed": 0, "num_steps": 9, "init_from": "", "optimizer": {"clip": 1.0},'
    )
    sandbox.config.write_text(text + '\nshared_warm_start = ("seed",)\n')
    train = (sys.executable, str(tmp_path / "train.py"))
    with pytest.raises(SweepError, match=r"run clip=0.5: the warm start depends on optimizer.clip, which shared_warm"):
        run_sweep(str(sandbox.config), sandbox.workdir, train=train)
    sandbox.config.write_text(text + '\nshared_warm_start = ("seed", "optimizer.clip")\n')
    assert run_sweep(str(sandbox.config), sandbox.workdir, train=train, output=io.StringIO()) == 0


def test_interruption_while_a_run_is_being_started_reaches_it(tmp_path: Path):
    """Broken on purpose: raising KeyboardInterrupt at once, the run goes on without its sweep."""
    sandbox = Sandbox(tmp_path, [{"seed": 1}])
    launcher = "trap 'touch stopped; exit 130' INT; touch ready; while :; do sleep 0.05; done"
    late = """
import os, signal, subprocess, sys, time
class Late(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        while not os.path.exists("ready"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
subprocess.Popen = Late
"""
    code = f"{late}{RUN_SWEEP} exit(run_sweep(argv[1], argv[2], launcher=argv[3:]))"
    command = [sys.executable, "-c", code, str(sandbox.config), str(sandbox.workdir), "bash", "-c", launcher]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130, ended.stderr
    assert (tmp_path / "stopped").exists()


def test_second_interruption_kills_the_run_and_what_it_started(tmp_path: Path):
    launcher = (
        "trap 'echo $((count += 1)) >signals; ((count < 2)) || exit 130' INT; touch ready; while :; do sleep 0.05; done"
    )
    sandbox = Sandbox(tmp_path, [{"seed": 1}])
    code = f"{RUN_SWEEP} exit(run_sweep(argv[1], argv[2], launcher=argv[3:]))"
    command = [sys.executable, "-c", code, str(sandbox.config), str(sandbox.workdir), "bash", "-c", launcher]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        while not (tmp_path / "signals").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "signals").read_text() == "2\n"


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echo_jax.sweep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_dry_run_of_the_program_prints_the_train_commands(tmp_path: Path):
    sandbox = Sandbox(tmp_path, [{"loss.weight": 0.05, "seed": 1}, {"loss.kind": "a b", "big": 2}])
    workdir = str(sandbox.workdir)
    result = cli(f"--config={sandbox.config}:big", f"--workdir={workdir}", "--dry_run", "--config.fast=false")
    assert (result.returncode, result.stderr) == (0, "")
    train = [sys.executable, "-m", "echo_jax.train", f"--config={sandbox.config}:big"]
    assert [shlex.split(line) for line in result.stdout.splitlines()] == [
        [
            *train,
            f"--workdir={workdir}/weight=0.05,seed=1",
            "--config.fast=False",
            "--config.loss.weight=0.05",
            "--config.seed=1",
        ],
        [
            *train,
            f"--workdir={workdir}/big=2,kind=a_b",
            "--config.fast=False",
            "--config.loss.kind=a b",
            "--config.big=2",
        ],
    ]


def test_program_explains_itself_and_its_errors(tmp_path: Path):
    help_text = cli("--help").stdout
    for text in (
        *("python -m echo_jax.sweep --config=", "--[no]dry_run", "--only", "--workdir", "results.csv"),
        *("--launcher", "--owner", "--[no]report", "--logs", "--table"),
    ):
        assert text in help_text
    sandbox = Sandbox(tmp_path, [{"loss.wieght": 1.0}])
    result = cli(f"--config={sandbox.config}", f"--workdir={sandbox.workdir}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: run wieght=1.0: the config does not take {'loss.wieght': 1.0}")
