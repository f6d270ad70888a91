"""Trajectories as readable text, each part with its writer.

In: a `Trajectory`. Out: a heading, and its tokens as text on a console.
"""

import itertools
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from echo_jax.roles import Role
from echo_jax.rollout.trajectory import Trajectory
from echo_jax.system.terminal import escaped
from echo_jax.tokenizer import Tokenizer

STYLES = {
    Role.ACTION: "bold green",
    Role.OBSERVATION: "cyan",
    Role.PROMPT: "bold",
    Role.SCAFFOLD: "dim",
    Role.USER: "magenta",
    Role.SYSTEM: "blue",
}
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
    """Yields (role, text, mean log-prob) of each part with one writer."""
    at = 0
    for role, members in itertools.groupby(trajectory.role.tolist()):
        end = at + len(list(members))
        yield Role(role), tokenizer.decode(trajectory.ids[at:end].tolist()), float(trajectory.logprob[at:end].mean())
        at = end


def show(trajectory: Trajectory, tokenizer: Tokenizer, console: Console) -> None:
    console.rule(Text(escaped(heading(trajectory))))
    for role, text, logprob in stretches(trajectory, tokenizer):
        note = f"{role.name.lower()}, log-prob {logprob:.2f}" if role == Role.ACTION else role.name.lower()
        shown = Text(escaped(text), style=STYLES.get(role, OTHER_STYLE))
        console.print(Text(f"{note:>28} | "), shown, sep="", end="\n")
