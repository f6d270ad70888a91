"""The software behind a run: one line in `WORKDIR/provenance.jsonl` each time it is started or resumed.

In: the running process. Out: command, commit, uncommitted diff, interpreter and package versions.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

from echo_jax.system import named

ROOT = Path(__file__).resolve().parents[2]  # of the repository, unless the package is installed elsewhere


def record(workdir: Path, root: Path = ROOT) -> None:
    """Appends one line. `git_sha` and `git_diff` are null without a git checkout or the record that launch.sh ships."""
    sha, diff = source(root)
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "module_folders": named.folders,  # where the config's own modules were found
        "git_sha": sha,
        "git_diff": diff,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {d.name: d.version for d in sorted(importlib.metadata.distributions(), key=lambda d: d.name)},
    }
    with (workdir / "provenance.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def source(root: Path = ROOT) -> tuple[str | None, str | None]:
    """Returns commit and uncommitted diff of the source. A shipped tree holds the commit's files: its diff, recorded
    next to them, is not applied."""
    if _git(root, "rev-parse", "--show-toplevel") == f"{root}\n":
        commit, diff = _git(root, "rev-parse", "HEAD"), _git(root, "diff", "HEAD")
    else:
        shipped = [root / ".shipped" / name for name in ("commit", "diff")]
        commit, diff = (path.read_text(errors="replace") if path.exists() else None for path in shipped)
    return commit and commit.strip(), diff


def _git(root: Path, *arguments: str) -> str | None:
    """Returns what git prints; None if git is missing or fails."""
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None
