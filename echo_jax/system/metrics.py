"""Metrics of a run: one JSON object per step in `metrics.jsonl`, and the same numbers for TensorBoard.

A resumed run drops the records from the resume step on, so the file looks like that of an uninterrupted run.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from echo_jax.system.errors import UserError


class MetricsError(UserError, RuntimeError):
    """Metrics could not be written or read; the message says where, why, and what to do."""


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and to an event file in `workdir/tensorboard`."""

    def __init__(self, workdir: Path, *, resume_step: int):
        """Drops records of steps >= `resume_step`, and an incomplete last line; 0 starts afresh."""
        self._path = Path(workdir) / "metrics.jsonl"
        with _explained(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_from(self._path, resume_step)
            # Unbuffered: a line is in the file when `write` returns, so a full disk fails there and not in `close`.
            self._file = self._path.open("ab", buffering=0)
            # Not SummaryWriter: on a full disk its thread dies silently, and then its bounded queue blocks the run.
            folder = self._path.parent / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            self._events.write_event(
                Event(wall_time=time.time(), step=resume_step, session_log=SessionLog(status=SessionLog.START))
            )
            self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record. A non-finite value becomes null in JSON.

        Args:
          step: the record's step.
          values: name -> Python, numpy or JAX scalar. Integers stay integers.

        Raises:
          MetricsError: the disk is full, or the file cannot be written.
          ValueError: a value is not a scalar, or is named `step`.
        """
        if "step" in values:
            raise ValueError("a metric cannot be named 'step'")
        numbers = {name: _number(name, value) for name, value in values.items()}
        record = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = memoryview(_line({"step": int(step), **record}))
        with _explained(self._path):
            while line:
                line = line[self._file.write(line) :]
            for name, value in numbers.items():
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._events.flush()

    def close(self) -> None:
        """Closes both files; a second call does nothing."""
        if not self._file.closed:
            self._file.close()
            with _explained(self._path):
                self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, without an incomplete last line; none if the file does not exist.

    Raises:
      MetricsError: any other line is not a record.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        raise MetricsError(f"{path}, line {records.index(None) + 1} is not a record: fix or delete that line")
    return records


def _drop_from(path: Path, step: int) -> None:
    """Keeps the records before `step`, atomically: at any moment the file is either the old or the new one."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(_line(record) for record in read_metrics(path) if record["step"] < step))
    os.replace(temporary, path)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(f"metric {name} is not a scalar: its shape is {array.shape}")
    return int(array) if array.dtype.kind in "biu" else float(array)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetricsError(
            f"cannot write metrics to {path.parent}: {error.strerror or error}. "
            "Fix the disk or free space on it, then run the same command again: it resumes from the last checkpoint"
        ) from error
