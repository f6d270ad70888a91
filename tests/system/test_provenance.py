"""The workdir records the software that a run used."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from echo_jax.system import provenance


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "provenance.jsonl").read_text().splitlines()]


def test_commit_diff_and_versions_are_recorded_at_each_start(tmp_path):
    root, workdir = tmp_path / "repository", tmp_path / "w"
    root.mkdir()
    workdir.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    (root / "a.py").write_text("one\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    provenance.record(workdir, root)
    (root / "a.py").write_text("two\n")
    (root / "new.py").write_text("mine\n")
    (root / "large.csv").write_text("0" * 200_000)
    provenance.record(workdir, root)
    status = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    assert "?? new.py" in status  # git's own index is as it was
    sha = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    first, second = lines(workdir)
    assert first["git_sha"] == second["git_sha"] == sha
    assert first["git_diff"] == ""
    assert "-one\n+two\n" in second["git_diff"]
    assert "+++ b/new.py" in second["git_diff"]
    assert "+mine\n" in second["git_diff"]
    assert second["git_diff"].endswith("untracked, not shown: large.csv\n")
    assert first["packages"]["jax"] == importlib.metadata.version("jax")
    assert first["command"] == sys.orig_argv


def test_no_commit_is_recorded_outside_a_checkout(tmp_path):
    """Nor inside another repository: an installed package may be below one."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    provenance.record(tmp_path, tmp_path / "site-packages")
    assert lines(tmp_path)[0]["git_sha"] is None
    assert lines(tmp_path)[0]["git_diff"] is None


def test_shipped_tree_knows_its_commit(tmp_path):
    (tmp_path / ".shipped").mkdir()
    (tmp_path / ".shipped" / "commit").write_text("abc\n")
    (tmp_path / ".shipped" / "diff").write_text("+not shipped\n")
    provenance.record(tmp_path, tmp_path)
    assert (lines(tmp_path)[0]["git_sha"], lines(tmp_path)[0]["git_diff"]) == ("abc", "+not shipped\n")
