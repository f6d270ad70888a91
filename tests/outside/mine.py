"""Parts of a run that a researcher might write; the package does not know this file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.objective.policy_losses import TokenLoss
from echo_jax.roles import Role
from echo_jax.rollout.trajectory import Sampled
from echo_jax.tasks.task import CannotScore, Task
from echo_jax.tokenizer import SentencePieces
from echo_jax.tools.sandbox import CommandResult, Status


def gated(tokens, *, sharpness=4.0):
    """A policy loss with a hyperparameter and a metric: a sigmoid instead of the clip."""
    ratio = jnp.exp(jnp.clip(tokens.logprob - tokens.old_logprob, -20.0, 20.0))
    gate = jax.nn.sigmoid(sharpness * (ratio - 1.0))
    return TokenLoss(-gate * tokens.advantage, {"gate": gate})


def ranks(rewards, *, spread=1.0):
    """An advantage: the rank of each reward within its group, around 0."""
    order = np.argsort(np.argsort(rewards))
    return spread * (order - order.mean())


def not_the_first(trajectory, mask, *, skipped=1):
    """An observation filter that skips the first trained tokens."""
    return mask & (np.cumsum(mask) > skipped)


class Count:
    """A tool that needs no sandbox."""

    description = "Counts the words of a text."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    def __init__(self, *, unit):
        self.unit = unit

    def run(self, world, arguments):
        text = f"{len(arguments['text'].split())} {self.unit}\n".encode()
        return CommandResult(Status.OK, 0, text, b"", 0, 0.0, world.cwd)


class Nowhere:
    """A world without files or processes."""

    timeout, cwd = 1.0, "/"

    def kill_processes(self):
        pass

    def close(self):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountTask(Task):
    """A task without a demonstrator, with another range of rewards; some of these tasks cannot be scored."""

    reward_range = (-1.0, 2.0)
    words: int
    judged: bool

    def world(self):
        return Nowhere()

    def score(self, episode):
        if not self.judged:
            raise CannotScore("the judge is out")
        used = any(message.role == Role.OBSERVATION for message in episode.transcript)
        return 2.0 if used and episode.answer == str(self.words) else -1.0


class CountFamily:
    def __init__(self, most):
        self.most = most

    def make(self, split, index):
        words = 1 + index % self.most
        text = " ".join(["oak"] * words)
        name = f"counting/{split}/{index}"
        return CountTask(name=name, prompt=f"count {text}", tools=("count",), words=words, judged=index % 3 != 2)


class Replay:
    """An engine that replays recorded conversations, one per rollout, in a cycle."""

    def __init__(self, setup, *, conversations):
        tokenizer = SentencePieces()
        self.sessions = setup.sessions
        self._turns = [[(*tokenizer.encode(text), tokenizer.end) for text in texts] for texts in conversations]
        self._open, self._due, self._version = {}, set(), 0

    def set_params(self, params, version):
        self._version = version

    def open(self, rollout, group):
        session = min(set(range(self.sessions)) - self._open.keys())
        self._open[session] = iter(self._turns[rollout % len(self._turns)])
        return session

    def extend(self, session, ids, max_new):
        self._due.add(session)

    @property
    def busy(self):
        return bool(self._due)

    def step(self):
        finished = {}
        for session in self._due:
            ids = next(self._open[session])
            unknown = (0.0,) * len(ids)
            finished[session] = Sampled(ids, unknown, unknown, (self._version,) * len(ids), stopped=True)
        self._due = set()
        return finished

    def close(self, session):
        del self._open[session]
        self._due.discard(session)
