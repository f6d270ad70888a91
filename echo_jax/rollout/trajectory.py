"""One rollout, as tokens with their writers; and rollouts on disk.

In: what episode.py built. Out: what packing.py lays in rows, or a `.jsonl.gz` file with everything needed to train
on them.
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
from typing import NamedTuple

import numpy as np

from echo_jax.roles import Role
from echo_jax.system.errors import UserError
from echo_jax.system.peers import Peers
from echo_jax.tools import TOOL_IDS

FORMAT = "echo_jax.trajectories/3"
ENDED_BY_BUDGET = ("max_turns", "max_tokens", "max_seconds")  # outcomes of an overlong rollout


class TrajectoryError(UserError, ValueError):
    """A saved-rollouts file that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What the policy wrote in one turn."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the tempered, untruncated distribution each was drawn from
    entropies: tuple[float, ...]  # of that distribution, nats; nan where there was none, as for a script
    stopped: bool  # ended by the stop token, which is the last of `ids`
    policy_version: int


class Attempt(NamedTuple):
    """One attempt at a tool call."""

    turn: int  # from 1
    tool: str  # "" where none was named that exists
    status: str  # of `Status`, of `calls.MALFORMED`, or "submit"
    exit_code: int | None = None
    limit: str = ""  # which one it met, as in `CommandResult`
    dropped_bytes: int = 0  # of its output, in the middle


DTYPES = {"ids": np.int32, "role": np.int8, "tool": np.int8, "logprob": np.float32, "entropy": np.float32}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids are the truth: sampled ids are kept as sampled and never encoded again."""

    ids: np.ndarray  # int32 [T]
    role: np.ndarray  # int8 [T] Role
    tool: np.ndarray  # int8 [T] which tool wrote it, as in TOOL_IDS; 0: none did
    logprob: np.ndarray  # f32 [T] under the distribution it was sampled from; 0 where not sampled
    entropy: np.ndarray  # f32 [T] of that distribution, nats; 0 where not sampled, nan where not recorded
    task: str  # name of the task
    group: int  # rollouts of one group share their task and their baseline
    rollout: int  # global index; branches of one rollout share it, and count as one in every normaliser
    shared: int  # leading tokens that an earlier branch of this rollout has too: trained there, and only there
    policy_version: int  # step of the run whose policy sampled it; -1: scripted
    reward: float
    scored: bool  # False: an infrastructure fault, left out of the group's baseline
    outcome: str  # why it ended
    turns: int
    attempts: tuple[Attempt, ...]  # at tool calls, in order
    limits_by: str  # how the sandbox held its limits, as `Sandbox.limits_by`; "" where there was none

    def __post_init__(self):
        lengths = {name: len(getattr(self, name)) for name in DTYPES}
        if len(set(lengths.values())) > 1:
            raise TrajectoryError(f"lengths differ: {', '.join(f'{name} {n}' for name, n in lengths.items())}")

    @property
    def calls(self) -> dict[str, int]:
        """How many attempts had each status."""
        return dict(collections.Counter(attempt.status for attempt in self.attempts))

    def count(self, *roles: Role) -> int:
        """Returns how many tokens have one of these roles, the first token (never predicted) left out."""
        return int(np.isin(self.role[1:], roles).sum())


def save(path: Path, trajectories: Sequence[Trajectory], *, vocab_size: int) -> None:
    """Writes a gzipped JSON-lines file, whole or not at all: one header, one line a trajectory.

    Raises:
      TrajectoryError: the file cannot be written, as on a full disk.
    """
    scratch = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(scratch, "wt", compresslevel=3) as file:
            file.write(json.dumps(_header(vocab_size)) + "\n")
            for trajectory in trajectories:
                file.write(json.dumps(_to_record(trajectory)) + "\n")
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise TrajectoryError(
            f"{path} could not be written: {error.strerror or error}. Free some space or mend the cause, "
            "then run the same command again: it resumes from the last checkpoint"
        ) from error


def save_shares(path: Path, own: Sequence[Trajectory], *, vocab_size: int, peers: Peers) -> None:
    """Saves the trajectories of all processes in one file, by group and rollout: each writes its own beside it, process
    0 joins them. The folder is one that all see."""
    if peers.count == 1:
        save(path, own, vocab_size=vocab_size)
        return
    parts = [path.with_name(f".{i}-{path.name}") for i in range(peers.count)]
    save(parts[peers.index], own, vocab_size=vocab_size)
    peers.gather(None, f"{path.name} written by all")
    if peers.is_first:
        everyone = [t for part in parts for t in load(part, vocab_size=vocab_size)]
        save(path, sorted(everyone, key=lambda t: (t.group, t.rollout)), vocab_size=vocab_size)
        for part in parts:
            part.unlink()
    peers.gather(None, f"{path.name} joined")


def remove_shares(folder: Path) -> None:
    """Removes what `save_shares` left of files that were never joined."""
    for part in folder.glob(".*-*.jsonl.gz"):
        part.unlink()


def load(path: Path, *, vocab_size: int, padded: bool = False) -> list[Trajectory]:
    """Reads what `save` wrote.

    Args:
      padded: whether it may have been written with more ids than `vocab_size`, as of an embedding that has more rows
        than its tokenizer has pieces.

    Raises:
      TrajectoryError: the file is damaged, of another format, or of another vocabulary.
    """
    try:
        with gzip.open(path, "rt") as file:
            header, *records = [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TrajectoryError(
            f"{path} is not a saved-rollouts file or is damaged ({error}). In the workdir of a run: delete it, "
            "then run the same command again, which makes it anew"
        ) from error
    expected = _header(vocab_size)
    if padded and isinstance(header, dict) and isinstance(rows := header.get("vocab_size"), int) and rows >= vocab_size:
        expected = _header(vocab_size := rows)
    if header != expected:
        raise TrajectoryError(f"{path} begins with {str(header)[:200]}; here it must be {expected}")
    try:
        trajectories = [_from_record(record) for record in records]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise TrajectoryError(f"{path} holds something else than trajectories ({error})") from error
    for trajectory in trajectories:
        if wrong := _wrong(trajectory, vocab_size):
            raise TrajectoryError(f"{path}: {trajectory.task}: {wrong}")
    return trajectories


def _wrong(t: Trajectory, vocab_size: int) -> str:
    """Returns what cannot be in a trajectory; "" for nothing."""
    if any(getattr(t, name).ndim != 1 for name in DTYPES):
        return "its arrays must have one dimension"
    for name, values, end in (
        ("ids", t.ids, vocab_size),
        ("role", t.role, len(Role)),
        ("tool", t.tool, len(TOOL_IDS) + 1),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < end:
            return f"{name} must be from 0 to {end - 1}"
    if isinstance(t.reward, bool) or not isinstance(t.reward, int | float) or not math.isfinite(t.reward):
        return f"reward {t.reward!r} is no finite number"
    if not (isinstance(t.shared, int) and 0 <= t.shared <= len(t.ids)):
        return f"shared {t.shared!r} must be from 0 to {len(t.ids)}"
    return ""


def _header(vocab_size: int) -> dict:
    return {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "roles": {role.name: int(role) for role in Role},
        "tools": TOOL_IDS,
    }


def _to_record(trajectory: Trajectory) -> dict:
    record = dataclasses.asdict(trajectory)
    for name in DTYPES:
        record[name] = getattr(trajectory, name).tolist()
    record["entropy"] = [None if np.isnan(x) else x for x in record["entropy"]]  # JSON knows no nan
    return record


def _from_record(record: dict) -> Trajectory:
    fields = {name: np.asarray(x, DTYPES[name]) if name in DTYPES else x for name, x in record.items()}
    return Trajectory(**fields | {"attempts": tuple(Attempt(*attempt) for attempt in record["attempts"])})
