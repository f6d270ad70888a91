"""`--workdir` alone is enough: evaluate, export and view read the rest from the run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

from echo_jax.system.metrics import read_metrics

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    *("--config.model.embed_dim=48", "--config.model.qk_norm=True", "--config.rollout.temperature=0.9"),
    *("--config.rollout.max_turns=3", "--config.warm_start.num_steps=8", "--config.checkpoint.every=4"),
    *("--config.pack.length=96", "--config.rollout.max_tokens=96", "--config.seed=3", "--config.num_steps=2"),
]


def program(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"echo_jax.{name}", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def evaluated(*arguments: str) -> dict:
    return json.loads(program("evaluate", *arguments).splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_programs_need_none_of_the_overrides_that_the_run_had(tmp_path):
    alone = f"--workdir={tmp_path / 'run'}"
    repeated = [alone, "--config=configs/tiny.py", *OVERRIDES]
    program("train", *repeated)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]

    result = evaluated(alone, "--samples=2")
    assert result == evaluated(*repeated, "--samples=2")
    assert result["step"] == last["step"] == 10
    assert result["eval/observation_ce"] == pytest.approx(last["eval/observation_ce"], rel=1e-6)
    earlier = evaluated(alone, "--step=8")
    assert earlier == evaluated(*repeated, "--step=8")
    assert earlier["step"] == 8
    assert earlier["eval/observation_ce"] != result["eval/observation_ce"]

    hot = evaluated(alone, "--config.rollout.temperature=1.5")
    assert hot == evaluated(*repeated, "--config.rollout.temperature=1.5")
    assert hot["eval/observation_ce"] == result["eval/observation_ce"]  # the same transcripts, at temperature 1
    assert hot["eval/tokens"] != result["eval/tokens"]
    elsewhere = evaluated(alone, "--config.task.mixture={'maze': 1.0}", "--episodes=2")
    assert elsewhere["episodes"] == 2
    assert elsewhere["eval/observation_ce"] != result["eval/observation_ce"]

    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["overrides"] for line in lines] == [
        *({} for _ in range(4)),
        {"rollout.temperature": 1.5},
        {"rollout.temperature": 1.5},
        {"task.mixture.lookup": "(no such field)", "task.mixture.maze": 1.0},
    ]

    program("export", alone, f"--output={tmp_path / 'a'}")
    program("export", *repeated, f"--output={tmp_path / 'b'}")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    saved = tmp_path / "run" / "rollouts" / "step_000010.jsonl.gz"
    assert program("view", alone) == program("view", f"--trajectories={saved}")
    assert "step_000009" in program("view", alone, "--step=9", "--show=1")
