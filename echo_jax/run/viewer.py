"""Finds what `echo_jax.view` shows.

In: a workdir or a file. Out: the file of saved rollouts and the tokenizer of its run.
"""

from pathlib import Path

from echo_jax import tokenizer as tokenizers
from echo_jax.rollout.trajectory import TrajectoryError
from echo_jax.run.workdir import recorded_config
from echo_jax.tokenizer import Tokenizer


def chosen_file(workdir: Path | None, step: int | None, trajectories: Path | None) -> Path:
    """Returns the file to show: the one given or, of a workdir, the rollouts of a step or of its newest saved one.

    Raises:
      TrajectoryError: neither it nor a workdir is given, or the workdir has no such file.
    """
    if trajectories:
        if step is not None:
            raise TrajectoryError("--step chooses among the rollouts of --workdir; leave out --trajectories")
        return trajectories
    if not workdir:
        raise TrajectoryError("set --workdir=RUN or --trajectories=FILE")
    folder = workdir / "rollouts"
    recorded_config(workdir)  # or it is no run
    saved = sorted(folder.glob("step_*.jsonl.gz"))
    wanted = [path for path in saved if step in (None, int(path.name[len("step_") :].split(".")[0]))]
    if not wanted:
        others = ", ".join(path.name for path in sorted(folder.glob("*.jsonl.gz"))) or "none"
        of_step = "" if step is None else f" of step {step}"
        raise TrajectoryError(
            f"{folder} has no rollouts{of_step}; its files: {others} (choose one with --trajectories)"
        )
    return wanted[-1]


def tokenizer_of(path: Path, named: Path | None) -> Tokenizer:
    """Returns the tokenizer that `--tokenizer` names or, without it, that of the run whose workdir holds the file."""
    workdir = path.absolute().parent.parent
    if named or not (workdir / "config.json").exists():
        return tokenizers.load(named or "")
    config = recorded_config(workdir)
    return tokenizers.find(config.tokenizer.path, config.model.weights)
