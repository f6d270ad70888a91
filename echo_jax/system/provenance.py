"""The software behind a run: one line in `WORKDIR/provenance.jsonl` each time it is started or resumed.

In: the running process. Out: command, commit, uncommitted diff, interpreter and package versions.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from echo_jax.system import named

_SMALL = 100_000  # bytes of an untracked file that is recorded
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
    with (workdir / "provenance.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def source(root: Path = ROOT) -> tuple[str | None, str | None]:
    """Returns commit and uncommitted diff of the source. A shipped tree holds the commit's files: its diff, recorded
    next to them, is not applied."""
    if _git(root, "rev-parse", "--show-toplevel") == f"{root}\n":
        commit, diff = _git(root, "rev-parse", "HEAD"), _diff(root)
    else:
        shipped = [root / ".shipped" / name for name in ("commit", "diff")]
        commit, diff = (
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else None for path in shipped
        )
    return commit and commit.strip(), diff


def _diff(root: Path) -> str | None:
    """Returns what differs from the commit, with the files that git does not track yet, small ones with their text."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"  # the files are added to a copy of git's index, not to git's own
        own = _git(root, "rev-parse", "--git-path", "index")
        if own is None or not (root / own.strip()).exists():
            return _git(root, "diff", "HEAD")
        shutil.copyfile(root / own.strip(), index)
        untracked = (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")[:-1]
        small = [name for name in untracked if (root / name).is_file() and (root / name).stat().st_size <= _SMALL]
        if small:
            _git(root, "add", "--intent-to-add", "--", *small, index=index)
        large = "".join(f"untracked, not shown: {name}\n" for name in untracked if name not in small)
        return (_git(root, "diff", "HEAD", index=index) or "") + large


def _git(root: Path, *arguments: str, index: Path | None = None) -> str | None:
    """Returns what git prints; None if git is missing or fails."""
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None
