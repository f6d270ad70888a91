"""Shows saved rollouts as text, each part with its writer.

    python -m echo_jax.view --trajectories=runs/quickstart/rollouts/step_000300.jsonl.gz --show=3
    python -m echo_jax.view --trajectories=FILE --rollout=19204

In: a file that a run saved. Out: for each rollout its task and outcome, then its tokens as text: the prompt, the
policy's turns, the tools' output, the harness's additions.
"""

from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console

from echo_jax.rollout import trajectory as trajectory_lib
from echo_jax.rollout.trajectory import TrajectoryError
from echo_jax.rollout.transcripts import show
from echo_jax.system.cli import run_program
from echo_jax.tokenizer import load as load_tokenizer


def main(args: flags.FlagValues) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    trajectories = trajectory_lib.load(Path(args.trajectories), vocab_size=tokenizer.vocab_size, padded=True)
    console = Console(highlight=False, soft_wrap=True)
    rewards = [t.reward for t in trajectories if t.scored]
    mean = f", mean reward {np.mean(rewards):.3f}" if rewards else ""
    console.print(f"{args.trajectories}: {len(trajectories)} rollouts{mean}")
    chosen = [t for t in trajectories if args.rollout in (None, t.rollout)][: args.show]
    if not chosen:
        raise TrajectoryError(f"{args.trajectories} has no rollout {args.rollout}")
    for trajectory in chosen:
        show(trajectory, tokenizer, console)


if __name__ == "__main__":
    flags.DEFINE_string("trajectories", None, "The file of saved rollouts.")
    flags.DEFINE_string("tokenizer", "", "tokenizer.path of the run; empty: the built-in tokenizer.")
    flags.DEFINE_integer("show", 3, "Maximum number of rollouts to show.", lower_bound=1)
    flags.DEFINE_integer("rollout", None, "Show only the rollout with this index.")
    run_program(main, required=("trajectories",))
