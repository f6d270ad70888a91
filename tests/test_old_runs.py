"""Runs of an earlier version resume in a later one with an additional field, tool, role and metric.

This module makes the later version from a copy of the package and renumbers everything numbered, so that reading
anything by number instead of by name shows.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKDIRS = ROOT / "tests" / "fixtures" / "workdirs"
WEIGHTS = "tests/fixtures/weights"  # the path in the run's config
FIELDS = {"tiny": {}, "adapters": {"model.weights": WEIGHTS, "lora.rank": 2, "lora.targets": ("query", "value")}}

# Everything a user does with a run, in one process.
PROGRAMS = """
import json, sys
from pathlib import Path
from rich.console import Console
from configs import tiny
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import load
from echo_jax.rollout.transcripts import show
from echo_jax.run.build import build
from echo_jax.run.evaluator import evaluate
from echo_jax.run.exporter import export
from echo_jax.run.lifecycle import train

workdir, output, fields = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
config = tiny.get_config()
config.update_from_flattened_dict({name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
assert train(config, workdir) == 0
parts = build(config)
found = {"evaluated": evaluate(parts, workdir, episodes=2)}
for path in sorted((workdir / "rollouts").glob("*.jsonl.gz")):
    saved = load(path, vocab_size=parts.learner.vocab_size)
    for trajectory in saved:
        show(trajectory, parts.renderer.tokenizer, Console(width=100))
    found[path.name] = [[Role(r).name for r in t.role] for t in saved], [
        [t.tools[i - 1] if i else "" for i in t.tool] for t in saved], [t.version.tolist() for t in saved]
export(config, workdir, output, dtype="float32", adapter=False)
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def later(tmp_path_factory) -> Path:
    """Returns a checkout of the later version."""
    root = tmp_path_factory.mktemp("later")
    for folder in ("echo_jax", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / WEIGHTS, root / WEIGHTS)

    def edit(path, before, after):
        text = (root / "echo_jax" / path).read_text()
        assert text.count(before) == 1, (path, before)
        (root / "echo_jax" / path).write_text(text.replace(before, after))

    edit("config.py", "    c.rollout.max_turns = 3\n", "    c.rollout.max_turns = 3\n    c.rollout.patience = 7\n")
    edit("tools/__init__.py", '    "bash": Bash(),\n', '    "again": Bash(),\n    "bash": Bash(),\n')
    edit("learner/update.py", 'metrics |= {"time/train"', 'metrics |= {"time/later": 1.0, "time/train"')
    roles = (root / "echo_jax" / "roles.py").read_text()
    number = lambda match: f"    {match[1]} = {int(match[2]) + (int(match[2]) > 1)}"  # noqa: E731
    roles = re.sub(r"^    ([A-Z]+) = (\d+)", number, roles, flags=re.MULTILINE)
    assert "    SCAFFOLD = 3" in roles
    (root / "echo_jax" / "roles.py").write_text(roles.replace("    SCAFFOLD = 3", "    JUDGE = 2\n    SCAFFOLD = 3"))
    return root


@pytest.mark.parametrize("name", ["tiny", pytest.param("adapters", marks=pytest.mark.variant)])
def test_old_run_can_be_resumed_evaluated_viewed_and_exported(name, later, tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(WORKDIRS / name, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAMS, str(workdir), str(output), json.dumps(FIELDS[name])],
        cwd=later,
        env=os.environ | {"PYTHONPATH": str(later)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "resuming" in ended.stdout
    assert (workdir / "DONE").exists()
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics.startswith(before)
    records = [json.loads(line) for line in metrics.splitlines()]
    assert [record["step"] for record in records] == list(range(1, 35))
    assert ["time/later" in record for record in records] == [False] * 32 + [True] * 2
    assert (output / "model.safetensors").exists()

    found = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("FOUND "))[6:])
    assert found["evaluated"]["step"] == 34
    assert {"step_000031.jsonl.gz", "step_000034.jsonl.gz", "demonstrations.jsonl.gz"} <= found.keys()
    for file, of in (("step_000031.jsonl.gz", 30), ("step_000034.jsonl.gz", 33)):  # saved by the old run, and now
        for roles, tools, versions in zip(*found[file], strict=True):
            assert roles[:2] == ["SCAFFOLD", "PROMPT"]
            assert "JUDGE" not in roles
            assert all(tool in ("", "bash") for tool in tools)
            assert versions == [of if role == "ACTION" else -1 for role in roles]
    roles, tools, versions = found["demonstrations.jsonl.gz"]
    written = {(role, tool) for r, t in zip(roles, tools, strict=True) for role, tool in zip(r, t, strict=True)}
    assert ("OBSERVATION", "bash") in written
    assert {version for of in versions for version in of} == {-1}
