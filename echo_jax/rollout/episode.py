"""One episode as a pure state machine: `advance(episode, event) -> episode`. No clock, no device, no subprocess.

In: events (a sampled turn, a tool's result). Out: the episode's next request (sample up to n tokens, run this call,
stop) and in the end a `Trajectory`. Every token gets its role here, when it is created.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping

import numpy as np

from echo_jax.render import Part, Rendered, Renderer, calls
from echo_jax.render.calls import Call, Malformed
from echo_jax.roles import BODIES, SPEAKERS, Role
from echo_jax.rollout.trajectory import Attempt, Sampled, Trajectory
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import CommandResult, Status
from echo_jax.tools.tool import Tool


class Phase(enum.Enum):
    GENERATE = enum.auto()  # waits for a turn of the policy
    CALL = enum.auto()  # waits for the result of the first call in `pending`
    DONE = enum.auto()


class Outcome(enum.StrEnum):
    RUNNING = "running"
    SUBMITTED = "submitted"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # the next observation or turn would not fit
    MAX_SECONDS = "max_seconds"  # its calls took too long in total
    FORMAT_ERRORS = "format_errors"  # too many turns in a row without a runnable call
    BROKEN = "broken"  # its sandbox broke after it had made a call, which may be its own deed: the lowest reward
    INFRA = "infra"  # a fault of the machine, not of the policy: kept, but not scored
    UNSCORED = "unscored"  # the task could not score it, through nobody's fault: kept, but not scored


FAULTS = (Outcome.BROKEN, Outcome.INFRA)  # a rollout that ends so is repeated


@dataclasses.dataclass(frozen=True)
class Rules:
    """The budgets and the tools of an episode."""

    max_turns: int
    max_tokens: int  # of the whole trajectory
    max_turn_tokens: int  # sampled in one turn
    warn_last_turn: bool = False  # announce the last turn to the agent
    max_seconds: float = math.inf  # total run time of its tool calls
    max_format_errors: int = 8  # turns in a row without a runnable call
    grammar: str = "plain"  # of GRAMMARS
    tools: Mapping[str, Tool] = dataclasses.field(default_factory=lambda: TOOLS)  # those that a task can name


@dataclasses.dataclass(frozen=True)
class Episode:
    """The state of an episode. All fields are immutable; `advance` returns a new episode."""

    renderer: Renderer
    rules: Rules
    available: Mapping[str, Tool]  # the agent's tools, by name
    listener: str = ""  # the tool that gets the text of a turn without a call; "": it is a format error
    ids: tuple[int, ...] = ()
    roles: tuple[Role, ...] = ()
    tools: tuple[int, ...] = ()  # which of the rules' tools wrote the token, from 1; 0: none did
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()  # of the policy that sampled the token; -1: none did
    phase: Phase = Phase.GENERATE
    outcome: Outcome = Outcome.RUNNING
    turns: int = 0
    pending: tuple[Call | Malformed, ...] = ()  # attempts of the last turn that have no observation yet
    answered: bool = False  # whether an attempt of the last turn already has one
    answer: str | None = None
    attempts: tuple[Attempt, ...] = ()  # those handled so far
    format_errors: int = 0  # turns in a row without a runnable call
    seconds: float = 0.0  # total run time of its calls

    @property
    def call(self) -> Call | None:
        """The call to run, in phase CALL."""
        return self.pending[0] if self.phase is Phase.CALL else None

    @property
    def sample_budget(self) -> int:
        """The maximum number of tokens of the next turn."""
        return min(self.rules.max_turn_tokens, self.rules.max_tokens - len(self.ids))

    @property
    def seconds_left(self) -> float:
        """Seconds left for its tool calls."""
        return self.rules.max_seconds - self.seconds


def start(
    renderer: Renderer, rules: Rules, prompt: str, tools: tuple[str, ...] = ("bash",), listener: str = ""
) -> Episode:
    """Returns an episode that waits for its first turn.

    Args:
      tools: names of the agent's tools, besides `submit`.
      listener: see `Task.listener`.

    Raises:
      ValueError: the prompt alone leaves no room to act.
    """
    available = {name: rules.tools[name] for name in (*tools, "submit")}
    rendered = renderer.prompt(prompt, available) + renderer.generation_prompt()
    if len(rendered.ids) >= rules.max_tokens:
        raise ValueError(
            f"a prompt of {len(rendered.ids)} tokens leaves no room in rollout.max_tokens = {rules.max_tokens}"
        )
    return _append(Episode(renderer, rules, available, listener), rendered)


def advance(episode: Episode, event: Sampled | CommandResult) -> Episode:
    """Returns the episode after one event: a turn in phase GENERATE, a tool's result in phase CALL."""
    if isinstance(event, Sampled) and episode.phase is Phase.GENERATE:
        return _after_turn(episode, event)
    if isinstance(event, CommandResult) and episode.phase is Phase.CALL:
        return _after_call(episode, event)
    raise ValueError(f"an episode in phase {episode.phase.name} cannot take a {type(event).__name__}")


def abandon(episode: Episode, outcome: Outcome = Outcome.INFRA) -> Episode:
    """Ends the episode for a fault, by default for one of the machine; keeps its tokens."""
    return _end(episode, outcome)


def _after_turn(episode: Episode, turn: Sampled) -> Episode:
    columns = (turn.ids, turn.logprobs, turn.entropies, turn.versions)
    if len(set(map(len, columns))) > 1 or not 0 < len(turn.ids) <= episode.sample_budget:
        raise ValueError(
            f"a turn has {', '.join(str(len(column)) for column in columns)} ids, log-probs, entropies and versions; "
            f"these numbers must be equal, from 1 to {episode.sample_budget}"
        )
    episode = dataclasses.replace(
        episode,
        ids=episode.ids + turn.ids,
        roles=episode.roles + (Role.ACTION,) * len(turn.ids),
        tools=episode.tools + (0,) * len(turn.ids),
        logprobs=episode.logprobs + turn.logprobs,
        entropies=episode.entropies + turn.entropies,
        versions=episode.versions + turn.versions,
        turns=episode.turns + 1,
        answered=False,
    )
    if not turn.stopped:
        if len(episode.ids) >= episode.rules.max_tokens:
            return _end(_note(episode, "unclosed"), Outcome.MAX_TOKENS)
        episode = _append(episode, episode.renderer.close_turn())
        attempts = [Malformed("unclosed", "the turn was cut off")]
    else:
        text, reasons = episode.renderer.turn_text(turn.ids), episode.renderer.opens_reasoning
        attempts = calls.parse(episode.rules.grammar, text, episode.available, in_reasoning=reasons)
        if episode.listener:
            attempts = _heard(episode, attempts, calls.said(text, in_reasoning=reasons))
    runs = any(isinstance(attempt, Call) for attempt in attempts)
    errors = 0 if runs else episode.format_errors + 1
    return _next(dataclasses.replace(episode, pending=tuple(attempts), format_errors=errors))


def _heard(episode: Episode, attempts: list[Call | Malformed], message: str) -> list[Call | Malformed]:
    """Returns the attempts of a turn or, if it calls no tool but says something, a call of the listener."""
    no_call = calls.GRAMMARS[episode.rules.grammar].no_call
    speaks = all(isinstance(attempt, Malformed) and attempt.status == no_call for attempt in attempts)
    if not (message and speaks):
        return attempts
    (argument,) = episode.rules.tools[episode.listener].parameters["required"]
    return [Call(episode.listener, {argument: message})]


def _after_call(episode: Episode, result: CommandResult) -> Episode:
    tool = episode.call.tool
    episode = _note(episode, str(result.status), tool, result.exit_code, result.limit, result.dropped_bytes)
    if result.status is Status.INFRA:
        return abandon(episode)
    # Another's turn cannot stand between answers of tools: among several, each answer has the wrapper of a tool's.
    speaker = "tool" if episode.answered or len(episode.pending) > 1 else result.speaker
    episode = dataclasses.replace(episode, pending=episode.pending[1:], seconds=episode.seconds + result.seconds)
    number = list(episode.rules.tools).index(tool) + 1
    return _next(_observe(episode, observation_parts(result), number, speaker))


def _next(episode: Episode) -> Episode:
    """Handles the attempts of the turn up to the first one that must run; after the last, starts the next turn."""
    while episode.phase is not Phase.DONE and episode.pending:
        attempt, *rest = episode.pending
        if isinstance(attempt, Call):
            if attempt.tool == "submit":
                episode = _note(episode, "submit", attempt.tool)
                return dataclasses.replace(_end(episode, Outcome.SUBMITTED), answer=attempt.arguments["answer"])
            if episode.seconds >= episode.rules.max_seconds:
                return _end(episode, Outcome.MAX_SECONDS)
            return dataclasses.replace(episode, phase=Phase.CALL)
        episode = _note(dataclasses.replace(episode, pending=tuple(rest)), attempt.status)
        episode = _observe(episode, [Part(attempt.message, Role.FEEDBACK)])
    if episode.phase is Phase.DONE:
        return episode
    rules = episode.rules
    for spent, outcome in (
        (episode.turns >= rules.max_turns, Outcome.MAX_TURNS),
        (episode.format_errors >= rules.max_format_errors, Outcome.FORMAT_ERRORS),
        (episode.seconds >= rules.max_seconds, Outcome.MAX_SECONDS),
    ):
        if spent:
            return _end(episode, outcome)
    next_turn = episode.renderer.generation_prompt()
    if len(episode.ids) + len(next_turn.ids) >= rules.max_tokens:
        return _end(episode, Outcome.MAX_TOKENS)
    return dataclasses.replace(_append(episode, next_turn), phase=Phase.GENERATE)


def observation_parts(result: CommandResult) -> list[Part]:
    """Returns what the agent sees of a result: body, notice of dropped bytes and, unless it succeeded, its status."""
    bodies = [result.head, result.tail] if result.dropped_bytes else [result.head + result.tail]
    parts = [Part(body.decode("utf-8", "surrogateescape"), SPEAKERS[result.speaker]) for body in bodies]
    if result.dropped_bytes:
        parts.insert(1, Part(f"{result.dropped_bytes} bytes dropped", Role.TRUNCATION))
    if result.status is not Status.OK:
        notice = str(result.status) if result.exit_code is None else f"exit {result.exit_code}"
        notice += f", limit of {result.limit}" if result.limit else ""
        parts.append(Part(notice, Role.BOILERPLATE))
    return parts


def _observe(episode: Episode, parts: list[Part], tool: int = 0, speaker: str = "tool") -> Episode:
    """Appends an observation or, if it does not fit, ends the episode."""
    if episode.rules.warn_last_turn and episode.turns == episode.rules.max_turns - 1 and not episode.pending:
        parts = [*parts, Part("last turn", Role.WARNING)]
    first, last = not episode.answered, not episode.pending
    observation = episode.renderer.observation(parts, first=first, last=last, speaker=speaker)
    if len(episode.ids) + len(observation.ids) > episode.rules.max_tokens:
        return _end(episode, Outcome.MAX_TOKENS)
    return dataclasses.replace(_append(episode, observation, tool), answered=True)


def _note(episode: Episode, status: str, tool: str = "", *details) -> Episode:
    attempt = Attempt(episode.turns, tool, status, *details)
    return dataclasses.replace(episode, attempts=(*episode.attempts, attempt))


def _append(episode: Episode, new: Rendered, tool: int = 0) -> Episode:
    """Adds tokens that were not sampled. Counts as written by `tool`: its output, and what its wrapper adds to that."""
    by_tool = (*BODIES, Role.BOILERPLATE, Role.TRUNCATION)
    zeros = (0.0,) * len(new.ids)
    return dataclasses.replace(
        episode,
        ids=episode.ids + new.ids,
        roles=episode.roles + new.roles,
        tools=episode.tools + tuple(tool if role in by_tool else 0 for role in new.roles),
        logprobs=episode.logprobs + zeros,
        entropies=episode.entropies + zeros,
        versions=episode.versions + (-1,) * len(new.ids),
    )


def _end(episode: Episode, outcome: Outcome) -> Episode:
    return dataclasses.replace(episode, phase=Phase.DONE, outcome=outcome, pending=())


def to_trajectory(
    episode: Episode,
    *,
    task: str,
    group: int,
    rollout: int,
    reward: float,
    reward_range: tuple[float, float] = (0.0, 1.0),
    limits_by: str = "",
    environment: str = "",
) -> Trajectory:
    """Returns a finished episode as numpy arrays."""
    if episode.phase is not Phase.DONE:
        raise ValueError(f"an episode in phase {episode.phase.name} is not finished")
    return Trajectory(
        ids=np.asarray(episode.ids, np.int32),
        role=np.asarray(episode.roles, np.int8),
        tool=np.asarray(episode.tools, np.int8),
        logprob=np.asarray(episode.logprobs, np.float32),
        entropy=np.asarray(episode.entropies, np.float32),
        version=np.asarray(episode.versions, np.int32),
        task=task,
        group=group,
        rollout=rollout,
        shared=0,
        reward=reward,
        scored=episode.outcome not in (Outcome.INFRA, Outcome.UNSCORED),
        outcome=str(episode.outcome),
        turns=episode.turns,
        attempts=episode.attempts,
        limits_by=limits_by,
        tools=tuple(episode.rules.tools),
        reward_range=reward_range,
        environment=environment,
    )
