"""One episode as a pure state machine: `advance(episode, event) -> episode`. No clock, no device, no subprocess.

In: events (what was sampled, what a tool answered). Out: the episode's next wish (sample so many tokens, run this
call, stop) and in the end a `Trajectory`. Every token's role is stamped here, when the token is born.
"""

import dataclasses
import enum

import numpy as np

from echo_jax.render import Part, Rendered, Renderer
from echo_jax.roles import Role
from echo_jax.tools import TOOL_IDS, TOOLS
from echo_jax.tools.sandbox import CommandResult, Status
from echo_jax.trajectory import Sampled, Trajectory

SUBMIT = "submit"


class Phase(enum.Enum):
    GENERATE = enum.auto()  # wants a turn from the policy
    CALL = enum.auto()  # wants `call` run
    DONE = enum.auto()


class Outcome(enum.StrEnum):
    RUNNING = "running"
    SUBMITTED = "submitted"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # the next observation or turn would not have fitted
    INFRA = "infra"  # the fault of the machine, not of the policy: kept, but not scored


@dataclasses.dataclass(frozen=True)
class Rules:
    """The budgets of an episode."""

    max_turns: int
    max_tokens: int  # of the whole trajectory
    max_turn_tokens: int  # sampled in one turn
    warn_last_turn: bool = False  # say so before it


@dataclasses.dataclass(frozen=True)
class Call:
    """One attempt at a tool call: `name` is a tool, `argument` what follows the first space."""

    name: str
    argument: str


@dataclasses.dataclass(frozen=True)
class Episode:
    """Where an episode stands. All fields are values; `advance` returns a new one."""

    renderer: Renderer
    rules: Rules
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    tools: tuple[int, ...]  # which tool wrote the token, as in TOOL_IDS; 0: none did
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    phase: Phase = Phase.GENERATE
    outcome: Outcome = Outcome.RUNNING
    turns: int = 0
    call: Call | None = None
    answer: str | None = None
    attempts: tuple[str, ...] = ()  # status of each tool-call attempt
    policy_version: int = -1

    @property
    def sample_budget(self) -> int:
        """Tokens the next turn may have."""
        return min(self.rules.max_turn_tokens, self.rules.max_tokens - len(self.ids))


def start(renderer: Renderer, rules: Rules, prompt: str) -> Episode:
    """Returns an episode that waits for its first turn.

    Raises:
      ValueError: the prompt alone leaves no room to act.
    """
    rendered = renderer.prompt(prompt) + renderer.generation_prompt()
    if len(rendered.ids) >= rules.max_tokens:
        raise ValueError(
            f"a prompt of {len(rendered.ids)} tokens leaves no room in rollout.max_tokens = {rules.max_tokens}"
        )
    return _append(Episode(renderer, rules, (), (), (), (), ()), rendered)


def advance(episode: Episode, event: Sampled | CommandResult) -> Episode:
    """Returns the episode after one event: a turn in phase GENERATE, a tool's result in phase CALL."""
    if isinstance(event, Sampled) and episode.phase is Phase.GENERATE:
        return _after_turn(episode, event)
    if isinstance(event, CommandResult) and episode.phase is Phase.CALL:
        return _after_call(episode, event)
    raise ValueError(f"an episode in phase {episode.phase.name} cannot take a {type(event).__name__}")


def abandon(episode: Episode) -> Episode:
    """Returns the episode ended by a fault of the infrastructure; its tokens are kept."""
    return dataclasses.replace(episode, phase=Phase.DONE, outcome=Outcome.INFRA)


def parse_call(text: str) -> Call | str:
    """Returns the call that a turn's text makes, or what is wrong with it. The grammar: NAME, a space, the argument."""
    name, _, argument = text.partition(" ")
    if name == SUBMIT or name in TOOLS:
        return Call(name, argument)
    return f"unknown tool; there are: {' '.join([*TOOLS, SUBMIT])}"


def _after_turn(episode: Episode, turn: Sampled) -> Episode:
    if not 0 < len(turn.ids) == len(turn.logprobs) == len(turn.entropies) <= episode.sample_budget:
        raise ValueError(
            f"a turn of {len(turn.ids)} ids, {len(turn.logprobs)} log-probs and {len(turn.entropies)} entropies, where "
            f"1 to {episode.sample_budget} tokens were asked for"
        )
    episode = dataclasses.replace(
        episode,
        ids=episode.ids + turn.ids,
        roles=episode.roles + (Role.ACTION,) * len(turn.ids),
        tools=episode.tools + (0,) * len(turn.ids),
        logprobs=episode.logprobs + turn.logprobs,
        entropies=episode.entropies + turn.entropies,
        turns=episode.turns + 1,
        policy_version=turn.policy_version,
    )
    if not turn.stopped:
        if len(episode.ids) >= episode.rules.max_tokens:
            return _end(episode, Outcome.MAX_TOKENS, attempt="unclosed")
        close = episode.renderer.close_turn()
        return _observe(_append(episode, close), [Part("the turn was cut off", Role.FEEDBACK)], attempt="unclosed")
    call = parse_call(episode.renderer.turn_text(turn.ids))
    if isinstance(call, str):
        return _observe(episode, [Part(call, Role.FEEDBACK)], attempt="unknown_tool")
    if call.name == SUBMIT:
        return dataclasses.replace(_end(episode, Outcome.SUBMITTED, attempt="submit"), answer=call.argument)
    return dataclasses.replace(episode, phase=Phase.CALL, call=call)


def _after_call(episode: Episode, result: CommandResult) -> Episode:
    if result.status is Status.INFRA:
        return abandon(dataclasses.replace(episode, attempts=(*episode.attempts, str(result.status))))
    tool = TOOL_IDS[episode.call.name]
    episode = dataclasses.replace(episode, call=None)
    return _observe(episode, observation_parts(result), tool=tool, attempt=str(result.status))


def observation_parts(result: CommandResult) -> list[Part]:
    """Returns what the agent is shown of a result: body, notice of a cut, and how it ended when not well."""
    bodies = [result.head, result.tail] if result.dropped_bytes else [result.head + result.tail]
    parts = [Part(body.decode("utf-8", "surrogateescape"), Role.OBSERVATION) for body in bodies]
    if result.dropped_bytes:
        parts.insert(1, Part(f"{result.dropped_bytes} bytes dropped", Role.TRUNCATION))
    if result.status is not Status.OK:
        notice = str(result.status) if result.exit_code is None else f"exit {result.exit_code}"
        parts.append(Part(notice, Role.BOILERPLATE))
    return parts


def _observe(episode: Episode, parts: list[Part], *, attempt: str, tool: int = 0) -> Episode:
    """Appends an observation and asks for the next turn, unless a budget ends the episode first."""
    if episode.rules.warn_last_turn and episode.turns == episode.rules.max_turns - 1:
        parts = [*parts, Part("last turn", Role.WARNING)]
    observation = episode.renderer.observation(parts)
    if len(episode.ids) + len(observation.ids) > episode.rules.max_tokens:
        return _end(episode, Outcome.MAX_TOKENS, attempt=attempt)
    episode = _append(episode, observation, tool)
    if episode.turns >= episode.rules.max_turns:
        return _end(episode, Outcome.MAX_TURNS, attempt=attempt)
    next_turn = episode.renderer.generation_prompt()
    if len(episode.ids) + len(next_turn.ids) >= episode.rules.max_tokens:
        return _end(episode, Outcome.MAX_TOKENS, attempt=attempt)
    return dataclasses.replace(_append(episode, next_turn), phase=Phase.GENERATE, attempts=(*episode.attempts, attempt))


def _append(episode: Episode, new: Rendered, tool: int = 0) -> Episode:
    """Adds what was not sampled; of it, the tool wrote its output and what its wrapper adds to that."""
    by_tool = (Role.OBSERVATION, Role.BOILERPLATE, Role.TRUNCATION)
    zeros = (0.0,) * len(new.ids)
    return dataclasses.replace(
        episode,
        ids=episode.ids + new.ids,
        roles=episode.roles + new.roles,
        tools=episode.tools + tuple(tool if role in by_tool else 0 for role in new.roles),
        logprobs=episode.logprobs + zeros,
        entropies=episode.entropies + zeros,
    )


def _end(episode: Episode, outcome: Outcome, *, attempt: str) -> Episode:
    return dataclasses.replace(
        episode, phase=Phase.DONE, outcome=outcome, call=None, attempts=(*episode.attempts, attempt)
    )


def to_trajectory(episode: Episode, *, task: str, group: int, rollout: int, reward: float) -> Trajectory:
    """Returns a finished episode as numpy arrays."""
    if episode.phase is not Phase.DONE:
        raise ValueError(f"an episode in phase {episode.phase.name} is not finished")
    return Trajectory(
        ids=np.asarray(episode.ids, np.int32),
        role=np.asarray(episode.roles, np.int8),
        tool=np.asarray(episode.tools, np.int8),
        logprob=np.asarray(episode.logprobs, np.float32),
        entropy=np.asarray(episode.entropies, np.float32),
        task=task,
        group=group,
        rollout=rollout,
        shared=0,
        policy_version=episode.policy_version,
        reward=reward,
        scored=episode.outcome is not Outcome.INFRA,
        outcome=str(episode.outcome),
        turns=episode.turns,
        calls={status: episode.attempts.count(status) for status in sorted(set(episode.attempts))},
    )
