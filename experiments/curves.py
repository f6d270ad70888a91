"""Draws metrics of finished runs: `python experiments/curves.py --output=plot.png --metrics=rollout/solve_rate
WORKDIR …`.

One panel per metric. Runs that differ only in their seed share a colour; thin lines are runs, the thick line is their
mean. Needs the extra `plots`.
"""

import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags

from echo_jax.system.metrics import read_metrics

OUTPUT = flags.DEFINE_string("output", None, "the PNG to write", required=True)
METRICS = flags.DEFINE_list("metrics", ["rollout/solve_rate"], "metrics to draw, one panel each")
SMOOTH = flags.DEFINE_integer("smooth", 5, "steps of the running mean")


def series(workdir: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[metric]) for r in read_metrics(workdir / "metrics.jsonl") if r.get(metric) is not None]
    steps, values = np.array(points).T if points else np.zeros((2, 0))
    width = min(SMOOTH.value, len(values))
    if width > 1:
        values = np.convolve(values, np.ones(width) / width, mode="valid")
        steps = steps[width - 1 :]
    return steps, values


def main(argv) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = defaultdict(list)
    for workdir in map(Path, argv[1:]):
        arms[re.sub(r",?seed=\d+", "", workdir.name)].append(workdir)
    figure, axes = pyplot.subplots(1, len(METRICS.value), figsize=(6 * len(METRICS.value), 4), squeeze=False)
    for axis, metric in zip(axes[0], METRICS.value, strict=True):
        for i, (arm, workdirs) in enumerate(sorted(arms.items())):
            curves = [series(workdir, metric) for workdir in workdirs]
            for steps, values in curves:
                axis.plot(steps, values, color=f"C{i}", alpha=0.3, linewidth=1)
            if len({tuple(steps) for steps, _ in curves}) == 1:
                mean = np.mean([values for _, values in curves], axis=0)
                axis.plot(curves[0][0], mean, color=f"C{i}", linewidth=2, label=f"{arm} (n={len(curves)})")
        axis.set(xlabel="update", title=metric)
        axis.legend()
    figure.tight_layout()
    figure.savefig(OUTPUT.value, dpi=100)


if __name__ == "__main__":
    app.run(main)
