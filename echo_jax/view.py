"""Shows saved rollouts as text, each part with its writer.

    python -m echo_jax.view --workdir=runs/quickstart
    python -m echo_jax.view --workdir=runs/quickstart --step=150 --show=1
    python -m echo_jax.view --trajectories=FILE --rollout=19204

In: a file that a run saved: with `--workdir` the rollouts of its newest saved step, or of `--step`. The tokenizer is
that of the run whose workdir holds the file. Out: for each rollout its task and outcome, then its tokens as text: the
prompt, the policy's turns, the tools' output, the harness's additions.
"""

import numpy as np
from absl import flags
from rich.console import Console

from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.trajectory import TrajectoryError
from echo_jax.rollout.transcripts import show
from echo_jax.run.viewer import chosen_file, tokenizer_of
from echo_jax.system.cli import define_path, run_program
from echo_jax.system.terminal import escaped


def main(args: flags.FlagValues) -> None:
    path = chosen_file(args.workdir, args.step, args.trajectories)
    tokenizer = tokenizer_of(path, args.tokenizer)
    trajectories = trajectory_lib.load(path, vocab_size=tokenizer.vocab_size, padded=True)
    console = Console(highlight=False, soft_wrap=True)
    rewards = [t.reward for t in trajectories if t.scored]
    mean = f", mean reward {np.mean(rewards):.3f}" if rewards else ""
    console.print(escaped(f"{path}: {len(trajectories)} rollouts{mean}"), markup=False)
    chosen = [t for t in trajectories if args.rollout in (None, t.rollout)][: args.show]
    if not chosen:
        raise TrajectoryError(f"{path} has no rollout {args.rollout}")
    for trajectory in chosen:
        show(trajectory, tokenizer, console)


if __name__ == "__main__":
    define_path("workdir", "Folder of a run: shows the rollouts of its newest saved step.")
    flags.DEFINE_integer("step", None, "With --workdir: show the rollouts of this step.", lower_bound=1)
    define_path("trajectories", "The file of saved rollouts.")
    define_path("tokenizer", "Path of a tokenizer; default: that of the run, or the built-in one.")
    flags.DEFINE_integer("show", 3, "Maximum number of rollouts to show.", lower_bound=1)
    flags.DEFINE_integer("rollout", None, "Show only the rollout with this index.")
    run_program(main, required=())
