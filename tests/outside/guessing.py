"""An environment without a tool to call: the agent guesses a number, and a user says how the guess was.

`tiny` on it, with the agent's turns recorded. A guess that is no number is answered by the system.
"""

import dataclasses

from mine import Nowhere

from configs import tiny
from echo_jax.tasks.task import Task
from echo_jax.tools.sandbox import CommandResult, Status

TURNS = (("guess: 2", "5", "submit"), ("well", "2", "6"))


class Room(Nowhere):
    """A world with a secret number."""

    def __init__(self, secret):
        self.secret, self.found = secret, False


class Listen:
    """Hears what the agent says. It is no tool of the agent's, which is not told of it."""

    description = "Hears a guess."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    def run(self, world, arguments):
        guess = arguments["text"].removeprefix("guess:").strip()
        if not guess.isdecimal():
            return answer("write a number", world, speaker="system")
        world.found = int(guess) == world.secret
        return answer("yes" if world.found else f"no, not {guess}", world, speaker="user")


def answer(text, world, *, speaker):
    return CommandResult(Status.OK, 0, text.encode(), b"", 0, 0.0, world.cwd, speaker=speaker)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuessTask(Task):
    tools: tuple[str, ...] = ()
    secret: int

    def world(self):
        return Room(self.secret)

    def score(self, episode):
        return float(episode.world.found)

    def demonstrate(self, rng, *, solve):
        yield "well"
        yield str(self.secret if solve else self.secret + 1)
        yield "submit "


class GuessFamily:
    def __init__(self, listener="listen"):
        self.listener = listener

    def make(self, split, index):
        name = f"guessing/{split}/{index}"
        return GuessTask(name=name, prompt="guess", secret=5 + index % 2, listener=self.listener)


def get_config():
    c = tiny.get_config()
    c.num_steps = 1
    c.warm_start.num_steps = 0
    c.task.guessing = {"family": "guessing:GuessFamily"}
    c.task.mixture = {"guessing": 1.0}
    c.tools = {"listen": {"tool": "guessing:Listen"}}
    c.rollout.max_turns = 3
    c.rollout.engine = "mine:Replay"
    c.rollout.engine_options = {"conversations": TURNS}
    c.loss.old_logprobs = "recomputed"
    c.loss.kl_weight = 0.0
    c.loss.class_weights = {"user": 1.0, "system": 0.5}
    c.loss.tool_weights = {"listen": 0.5}
    return c
