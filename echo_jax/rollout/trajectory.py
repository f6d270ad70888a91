"""A rollout as tokens with their writers, and files of rollouts.

In: a finished episode. Out: a `Trajectory`, for packing.py to lay in rows, or a `.jsonl.gz` file with everything needed
to train on it.
"""

import collections
import contextlib
import dataclasses
import gzip
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echo_jax.roles import Role
from echo_jax.system.errors import UserError
from echo_jax.system.peers import Peers

FORMAT = "echo_jax.trajectories/3"
ENDED_BY_BUDGET = ("max_turns", "max_tokens", "max_seconds")  # outcomes of an overlong rollout


class TrajectoryError(UserError, ValueError):
    """A file of saved rollouts cannot be used."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The policy's tokens of one turn."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the tempered, untruncated distributions that they were sampled from
    entropies: tuple[float, ...]  # of those distributions, nats; nan if there is none, as for a script
    versions: tuple[int, ...]  # step of the run whose policy sampled each id; -1: a script
    stopped: bool  # True: ended by a stop token, the last of `ids`; False: its budget ran out


class Attempt(NamedTuple):
    """One attempt at a tool call."""

    turn: int  # from 1
    tool: str  # "" unless an existing tool was named
    status: str  # of `Status`, of `calls.MALFORMED`, or "submit"
    exit_code: int | None = None
    limit: str = ""  # the limit that the call hit, as in `CommandResult`
    dropped_bytes: int = 0  # from the middle of its output


DTYPES = {
    "ids": np.int32,
    "role": np.int8,
    "tool": np.int8,
    "logprob": np.float32,
    "entropy": np.float32,
    "version": np.int32,
}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout, or one branch of it. Token ids are the truth: sampled ids stay as sampled and are never
    re-encoded."""

    ids: np.ndarray  # int32 [T]
    role: np.ndarray  # int8 [T] Role
    tool: np.ndarray  # int8 [T] tool that wrote the token: `tools[i - 1]`; 0: none
    logprob: np.ndarray  # f32 [T] under the distribution that the token was sampled from; 0 where not sampled
    entropy: np.ndarray  # f32 [T] of that distribution, nats; 0 where not sampled, nan where not recorded
    version: np.ndarray  # int32 [T] step of the run whose policy sampled the token; -1 where none did
    task: str  # name of the task
    group: int  # rollouts of one group share their task and their baseline
    rollout: int  # global index; branches of one rollout share it and count as one in every normaliser
    shared: int  # leading tokens shared with an earlier branch of this rollout, which already trains them
    reward: float
    scored: bool  # False: neither success nor failure, left out of the group's baseline
    outcome: str  # why the episode ended
    turns: int
    attempts: tuple[Attempt, ...]  # at tool calls, in order
    limits_by: str  # how the sandbox enforced its limits, as `Sandbox.limits_by`; "" without a sandbox
    tools: tuple[str, ...]  # names of the run's tools, in the order in which `tool` numbers them
    reward_range: tuple[float, float] = (0.0, 1.0)  # lowest and highest reward of its task
    environment: str = ""  # entry of the task mixture that its task comes from; "" in older files

    def __post_init__(self):
        lengths = {name: len(getattr(self, name)) for name in DTYPES}
        if len(set(lengths.values())) > 1:
            raise TrajectoryError(f"lengths differ: {', '.join(f'{name} {n}' for name, n in lengths.items())}")

    @property
    def policy_version(self) -> int:
        """The step of the newest policy that sampled one of its tokens; -1 for a script."""
        return int(self.version.max(initial=-1))

    @property
    def solved(self) -> bool:
        """Whether the rollout earned the highest reward."""
        return self.reward >= self.reward_range[1]

    @property
    def calls(self) -> dict[str, int]:
        """{status: number of attempts}."""
        return dict(collections.Counter(attempt.status for attempt in self.attempts))

    def count(self, *roles: Role) -> int:
        """Returns how many tokens have one of these roles, without the first token, which is never predicted."""
        return int(np.isin(self.role[1:], roles).sum())


def save(path: Path, trajectories: Sequence[Trajectory], *, vocab_size: int) -> None:
    """Writes a gzipped JSON-lines file, whole or not at all: one header, one line per trajectory.

    Raises:
      TrajectoryError: the file cannot be written, for example on a full disk.
    """
    scratch = path.with_name(path.name + ".tmp")
    trajectories = list(trajectories)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(scratch, "wt", compresslevel=3, encoding="utf-8") as file:
            tools = list(dict.fromkeys(name for trajectory in trajectories for name in trajectory.tools))
            file.write(json.dumps(_header(vocab_size, tools)) + "\n")
            for trajectory in trajectories:
                file.write(json.dumps(_to_record(trajectory, tools)) + "\n")
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise TrajectoryError(
            f"{path} could not be written: {error.strerror or error}. Free some space or fix the cause, "
            "then run the same command again: it resumes from the last checkpoint"
        ) from error


def save_shares(path: Path, trajectories: Sequence[Trajectory], *, vocab_size: int, peers: Peers) -> None:
    """Saves the trajectories of all processes in one file, sorted by group and rollout. Each process writes its share
    to a file in the same folder, which all must see; process 0 joins them."""
    if peers.count == 1:
        save(path, trajectories, vocab_size=vocab_size)
        return
    parts = [path.with_name(f".{i}-{path.name}") for i in range(peers.count)]
    save(parts[peers.index], trajectories, vocab_size=vocab_size)
    peers.gather(None, f"{path.name} written by all")
    if peers.is_first:
        everyone = [t for part in parts for t in load(part, vocab_size=vocab_size)]
        save(path, sorted(everyone, key=lambda t: (t.group, t.rollout)), vocab_size=vocab_size)
        for part in parts:
            part.unlink()
    peers.gather(None, f"{path.name} joined")


def remove_shares(folder: Path) -> None:
    """Removes the shares that `save_shares` wrote but never joined."""
    for part in folder.glob(".*-*.jsonl.gz"):
        part.unlink()


def load(path: Path, *, vocab_size: int, padded: bool = False) -> list[Trajectory]:
    """Reads a file that `save` wrote, also in an earlier version with fewer roles, tools or columns.

    Args:
      padded: accepts a file with more ids than `vocab_size`, as from an embedding with more rows than its tokenizer
        has pieces.

    Raises:
      TrajectoryError: the file is damaged, or has another format or vocabulary.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header, *records = [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TrajectoryError(
            f"{path} is not a file of saved rollouts or is damaged ({error}). If it is in a run's workdir, delete it "
            "and run the same command again to recreate it"
        ) from error
    reader = _Reader(path, header, vocab_size, padded)
    trajectories = []
    for record in records:
        try:
            trajectories.append(reader.trajectory(record))
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError) as error:
            raise TrajectoryError(f"{path} does not hold trajectories ({error})") from error
        if wrong := _wrong(trajectories[-1], reader.vocab_size):
            raise TrajectoryError(f"{path}: {trajectories[-1].task}: {wrong}")
    return trajectories


class _Reader:
    """Reads the records under one header. Maps the file's numbers of roles and tools to those of this version, by
    name."""

    def __init__(self, path: Path, header: Any, vocab_size: int, padded: bool):
        start = str(header)[:200]
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise TrajectoryError(f"{path} begins with {start}; a file of saved rollouts has the format {FORMAT!r}")
        rows = header.get("vocab_size")
        self.vocab_size = rows if padded and isinstance(rows, int) and rows >= vocab_size else vocab_size
        if rows != self.vocab_size:
            raise TrajectoryError(f"{path} was saved with a vocabulary of {rows!r} ids; this run has {vocab_size}")
        roles, tools = header.get("roles"), header.get("tools")
        if not (_is_numbering(roles, first=0) and _is_numbering(tools, first=1)):
            raise TrajectoryError(f"{path} begins with {start}, which does not number roles from 0 and tools from 1")
        self._names = sorted(roles, key=roles.get)
        self._roles = np.asarray([Role.__members__.get(name, -1) for name in self._names], np.int8)
        self._tools = tuple(sorted(tools, key=tools.get))

    def trajectory(self, record: dict) -> Trajectory:
        fields = dict(record)
        # Older files have one version per rollout, not one per token.
        version = fields.pop("policy_version", -1)
        fields = {name: np.asarray(x, DTYPES[name]) if name in DTYPES else x for name, x in fields.items()}
        if fields["role"].size and not 0 <= fields["role"].min() <= fields["role"].max() < len(self._roles):
            raise ValueError(f"role must be from 0 to {len(self._roles) - 1}")
        if unknown := [self._names[i] for i in np.unique(fields["role"]) if self._roles[i] < 0]:
            raise ValueError(f"tokens of the roles {', '.join(unknown)}, which this version lacks")
        fields["role"] = self._roles[fields["role"]]
        if "version" not in fields:
            fields["version"] = np.where(fields["role"] == Role.ACTION, version, -1).astype(DTYPES["version"])
        fields["attempts"] = tuple(Attempt(*attempt) for attempt in fields["attempts"])
        if "reward_range" in fields:
            low, high = map(float, fields["reward_range"])
            fields["reward_range"] = (low, high)
        return Trajectory(**fields, tools=self._tools)


def _is_numbering(numbers: Any, *, first: int) -> bool:
    """Returns whether it is {name: number}, with each number from `first` on used once."""
    if not isinstance(numbers, dict) or not all(type(number) is int for number in numbers.values()):
        return False
    return sorted(numbers.values()) == list(range(first, first + len(numbers)))


def _wrong(t: Trajectory, vocab_size: int) -> str:
    """Returns what is wrong with a trajectory; "" if nothing is."""
    if any(getattr(t, name).ndim != 1 for name in DTYPES):
        return "its arrays must have one dimension"
    for name, values, end in (("ids", t.ids, vocab_size), ("tool", t.tool, len(t.tools) + 1)):
        if len(values) and not 0 <= values.min() <= values.max() < end:
            return f"{name} must be from 0 to {end - 1}"
    if isinstance(t.reward, bool) or not isinstance(t.reward, int | float) or not math.isfinite(t.reward):
        return f"reward {t.reward!r} is not a finite number"
    low, high = t.reward_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return f"reward_range {t.reward_range} must be two finite numbers, the lower first"
    if not isinstance(t.environment, str):
        return f"environment {t.environment!r} is not a name"
    if not (isinstance(t.shared, int) and 0 <= t.shared <= len(t.ids)):
        return f"shared {t.shared!r} must be from 0 to {len(t.ids)}"
    return ""


def _header(vocab_size: int, tools: Sequence[str]) -> dict:
    return {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "roles": {role.name: int(role) for role in Role},
        "tools": {name: i for i, name in enumerate(tools, start=1)},
    }


def _to_record(trajectory: Trajectory, tools: Sequence[str]) -> dict:
    record = dataclasses.asdict(trajectory)
    del record["tools"]  # it is in the header
    for name in DTYPES:
        record[name] = getattr(trajectory, name).tolist()
    record["tool"] = renumbered(trajectory, tools).tolist()
    record["entropy"] = [None if np.isnan(x) else x for x in record["entropy"]]  # JSON has no nan
    return record


def renumbered(trajectory: Trajectory, tools: Sequence[str]) -> np.ndarray:
    """Returns `trajectory.tool` renumbered for `tools`: int8 [T], 0 also where the tool is not among them."""
    if trajectory.tools == tuple(tools):
        return trajectory.tool
    numbers = {name: i for i, name in enumerate(tools, start=1)}
    return np.asarray([0, *(numbers.get(name, 0) for name in trajectory.tools)], np.int8)[trajectory.tool]
