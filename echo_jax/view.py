"""Shows saved rollouts as text, each stretch with its writer.

    python -m echo_jax.view --trajectories=runs/quickstart/rollouts/step_000300.jsonl.gz --show=3
    python -m echo_jax.view --trajectories=FILE --rollout=19204

In: a file that a run saved. Out: for each rollout what it was and how it ended, then its tokens as text: the prompt,
what the policy wrote, what the tools answered, what the harness added.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.text import Text

from echo_jax import trajectory as trajectory_lib
from echo_jax.cli import run_program
from echo_jax.roles import Role
from echo_jax.tokenizer import Tokenizer, TokenizerError
from echo_jax.tokenizer import load as load_tokenizer
from echo_jax.trajectory import Trajectory, TrajectoryError

STYLES = {Role.ACTION: "bold green", Role.OBSERVATION: "cyan", Role.PROMPT: "bold", Role.SCAFFOLD: "dim"}
OTHER_STYLE = "yellow"  # notices of the harness


def heading(trajectory: Trajectory) -> str:
    t = trajectory
    calls = ", ".join(f"{count} {status}" for status, count in t.calls.items())
    score = f"reward {t.reward:g}" if t.scored else "not scored"
    return (
        f"{t.task} · group {t.group} · rollout {t.rollout} · {score} · {t.outcome} · {t.turns} turns · "
        f"{len(t.ids)} tokens · policy of step {t.policy_version} · calls: {calls or 'none'}"
    )


def stretches(trajectory: Trajectory, tokenizer: Tokenizer) -> Iterator[tuple[Role, str, float]]:
    """Yields (role, text, mean log-prob) of each stretch of tokens with one writer."""
    at = 0
    for role, members in itertools.groupby(trajectory.role.tolist()):
        end = at + len(list(members))
        yield Role(role), tokenizer.decode(trajectory.ids[at:end].tolist()), float(trajectory.logprob[at:end].mean())
        at = end


def show(trajectory: Trajectory, tokenizer: Tokenizer, console: Console) -> None:
    console.rule(Text(heading(trajectory)))
    for role, text, logprob in stretches(trajectory, tokenizer):
        note = f"{role.name.lower()}, log-prob {logprob:.2f}" if role == Role.ACTION else role.name.lower()
        printable = text.encode("utf-8", "backslashreplace").decode()  # bytes that are no text stand as surrogates
        console.print(Text(f"{note:>28} | "), Text(printable, style=STYLES.get(role, OTHER_STYLE)), sep="", end="\n")


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
    flags.DEFINE_string("tokenizer", "", "The run's tokenizer.path; empty: the built-in one.")
    flags.DEFINE_integer("show", 3, "At most so many rollouts.", lower_bound=1)
    flags.DEFINE_integer("rollout", None, "Only the one with this index.")
    run_program(main, (TrajectoryError, TokenizerError), required=("trajectories",))
