"""Trains under a policy that attacks, and reports what the run and the host have lost by it.

python experiments/hostile/run.py [--output=experiments/hostile/report.md]
"""

import collections
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from policy import ATTACKS, HONEST

from echo_jax.rollout import trajectory
from echo_jax.system.metrics import read_metrics
from echo_jax.tokenizer import load as load_tokenizer

OUTPUT = flags.DEFINE_string("output", None, "also write the report to this file")
ROOT = Path(__file__).parents[2]
WATCHED = ("/dev/null", "/dev/zero", "/dev/full", "/usr/bin/bash", sys.executable)


def host() -> dict[str, object]:
    """Returns what an attack might change on the host."""
    groups = [path for path in Path("/sys/fs/cgroup").rglob("echo_jax_sandbox-*") if path.is_dir()]
    names = [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    return {
        "control groups": len(groups),
        "bwrap processes": names.count("bwrap"),
        "files in the temporary folder": len(os.listdir(tempfile.gettempdir())),
        "modes": [(path, oct(os.stat(path).st_mode), os.stat(path).st_size) for path in WATCHED],
        "core pattern": Path("/proc/sys/kernel/core_pattern").read_text(),
    }


def train(workdir: Path) -> tuple[int, list[tuple[float, float]]]:
    """Returns the exit status, and (seconds, resident MiB of the trainer) once a second."""
    command = [sys.executable, "-m", "echo_jax.train", f"--config={ROOT}/experiments/hostile/config.py"]
    begin, sizes = time.monotonic(), []
    with subprocess.Popen(
        [*command, f"--workdir={workdir}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as run:
        while run.poll() is None:
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
            sizes.append((time.monotonic() - begin, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
            time.sleep(1)
    return run.returncode, sizes


def report(status: int, sizes: list[tuple[float, float]], workdir: Path) -> Iterator[str]:
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if "rollout/submitted" in r]
    rollouts = [
        t
        for path in sorted((workdir / "rollouts").glob("step_*"))
        for t in trajectory.load(path, vocab_size=load_tokenizer().vocab_size)
    ]
    honest = [t for t in rollouts if t.rollout % HONEST == 0]
    counts = ("submitted", "accepted", "rejected", "filtered", "raised")
    total = {name: int(sum(r[f"rollout/{name}"] for r in records)) for name in counts}
    calls = collections.Counter(attempt.status for t in rollouts for attempt in t.attempts)
    memory = [size for _, size in sizes]
    yield "# A run under a policy that attacks\n"
    yield (
        f"`python experiments/hostile/run.py`, {datetime.date.today()}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}. In nine of ten "
        f"rollouts, turns of {len(ATTACKS)} kinds in random order.\n"
    )
    yield "| | |\n|---|---|"
    yield f"| exit status | {status} |"
    yield f"| updates | {len(records)} |"
    yield f"| seconds | {sizes[-1][0]:.0f} |"
    yield f"| rollouts: {', '.join(counts[:4])} | {', '.join(str(total[name]) for name in counts[:4])} |"
    yield f"| honest rollouts: all, scored | {len(honest)}, {sum(t.scored for t in honest)} |"
    yield f"| rollouts with an exception out of a tool or score | {total['raised']} |"
    yield f"| calls by status | {', '.join(f'{name} {count}' for name, count in sorted(calls.items()))} |"
    yield f"| trainer's memory at half of the time, MiB | {memory[len(memory) // 2]:.0f} |"
    yield f"| trainer's memory at most, MiB | {max(memory):.0f} |"


def main(_) -> None:
    before = host()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        lines = list(report(*train(workdir), workdir))
    after = host()
    for name, value in after.items():
        lines.append(f"| host: {name} | {'as before' if value == before[name] else f'{before[name]} -> {value}'} |")
    print(*lines, sep="\n")
    if OUTPUT.value:
        Path(OUTPUT.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
