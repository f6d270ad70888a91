"""The process of a sandbox: a fork of this trainer's fork server, or a bwrap of its own.

In: the arguments of a supervisor, and its ends of the socket and of the pipe for errors. Out: its process, which the
host can wait for and kill. Starting Python takes most of the time of a start, so one bwrap a trainer holds a fork
server, and each sandbox is a fork of it in namespaces of its own (`fork_server.py`). Where the kernel allows no
namespaces within a sandbox, each sandbox is a bwrap of its own.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from echo_jax.tools import isolation, supervisor

START_SECONDS = 30.0  # a start takes milliseconds, but may take seconds on a host that starts hundreds at once
CLOSE_SECONDS = 5.0


class Process(Protocol):
    """The supervisor's process, however it was started: with a socket to the host as its standard input and output."""

    def found(self, pid: int) -> None:
        """Its pid, once it has said that it is ready."""

    def wait(self, seconds: float) -> bool:
        """Returns whether it has ended, with every process of its namespace."""

    def kill(self) -> None:
        """Kills it, and waits until it has ended."""

    def close(self) -> None:
        """Frees what watches it, once it has ended."""


class BwrapProcess:
    """PID 1 of a bwrap of its own."""

    def __init__(self, bwrap: Path, disk_bytes: int, arguments: list[int], connection: socket.socket, errors: int):
        with isolation.command(bwrap, disk_bytes, arguments) as (command, descriptors):
            self._bwrap = _start(command, descriptors, stdin=connection, stdout=connection, stderr=errors)
        self._pid: int | None = None

    def found(self, pid: int) -> None:
        self._pid = pid

    def wait(self, seconds: float) -> bool:
        return _ends(self._bwrap, seconds)

    def kill(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # the pid is not reused: bwrap, its parent, was running a moment ago
                self.wait(CLOSE_SECONDS)
        self._bwrap.kill()
        self._bwrap.wait()

    def close(self) -> None:
        pass


class ForkedProcess:
    """A fork of this trainer's fork server."""

    def __init__(
        self, bwrap: Path, apart: bool, disk_bytes: int, arguments: list[int], connection: socket.socket, errors: int
    ):
        self._server = _fork_server(bwrap, apart)
        self._server.fork([disk_bytes, *arguments], connection, errors)
        self._pidfd: int | None = None

    def found(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)  # the pid is not reused: it has just sent a message, and waits for ours

    def wait(self, seconds: float) -> bool:
        if self._pidfd is None:  # it was never ready. Perhaps the server is ending, and the next start needs another
            self._server.wait(seconds)
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.wait(CLOSE_SECONDS)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)


# As root: enters a user namespace, waits until the trainer has mapped its users, and becomes the command.
_IN_USER_NAMESPACE = """
import ctypes, os, sys
if ctypes.CDLL(None).unshare(0x10000000) != 0:
    sys.exit("unshare(CLONE_NEWUSER) failed")
os.write(0, b"unshared")
os.read(0, 16)
os.execve(sys.argv[1], sys.argv[1:], {})
"""
# The users of the host that sandboxes run as: ids that no system gives out, by systemd's table of uids. A trainer takes
# one of the blocks by chance, so that trainers on one host do not share users.
_FIRST_USER, _BLOCKS = 1_879_048_192, 65_000


class _ForkServer:
    """A bwrap with a fork server inside, shared by the sandboxes of this process."""

    def __init__(self, bwrap: Path, apart: bool):
        """Starts it and waits until it is ready. Raises OSError with bwrap's message."""
        with contextlib.ExitStack() as failed:
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            failed.callback(self._requests.close)
            with theirs, isolation.command(bwrap, None, [], mapped=apart) as (command, descriptors):
                if apart:
                    command = [os.path.realpath(sys.executable), "-I", "-S", "-c", _IN_USER_NAMESPACE, *command]
                standard = {"stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                self._bwrap = _start(command, descriptors, **standard)
            failed.callback(self.close)
            if apart:
                self._await_message()
                first = _FIRST_USER + supervisor.USERS * secrets.randbelow(_BLOCKS)
                users = f"0 0 1\n{supervisor.AGENT} {first} {supervisor.USERS}\n"  # inside, outside, how many
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{self._bwrap.pid}/{name}").write_text(users, encoding="ascii")
                self._requests.send(b"mapped")
            self._await_message()
            failed.pop_all()

    def _await_message(self) -> None:
        await_ready(self._requests.fileno(), select.POLLIN, time.monotonic() + START_SECONDS)
        if not self._requests.recv(16):
            raise OSError(self._bwrap.stderr.read(1 << 16).decode("utf-8", "replace").strip())

    def fork(self, arguments: list[int], connection: socket.socket, errors: int) -> None:
        """Asks for a sandbox. Raises OSError if the server has ended."""
        request = b" ".join(b"%d" % argument for argument in arguments)
        socket.send_fds(self._requests, [request], [connection.fileno(), errors])

    def wait(self, seconds: float) -> bool:
        """Returns whether it has ended."""
        return _ends(self._bwrap, seconds)

    def close(self) -> None:
        """Ends it, and with it every sandbox."""
        self._requests.close()
        self._bwrap.kill()
        self._bwrap.wait()
        self._bwrap.stderr.close()


_fork_servers: dict[tuple[int, Path, bool], _ForkServer] = {}  # by owner: a forked child makes its own
_starting = threading.Lock()


def _fork_server(bwrap: Path, apart: bool) -> _ForkServer:
    """Returns this process's, or a new one if that has ended. Raises OSError if it does not start."""
    key = os.getpid(), bwrap, apart
    with _starting:
        server = _fork_servers.get(key)
        if server is not None and server.wait(0):
            _fork_servers.pop(key).close()
            server = None
        if server is None:
            server = _fork_servers[key] = _ForkServer(bwrap, apart)
        return server


@atexit.register
def _end_fork_servers() -> None:
    for (owner, *_), server in _fork_servers.items():
        if owner == os.getpid():
            server.close()


def await_ready(fd: int, events: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(fd, events)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("no answer in time")


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _start(command: list[str], descriptors: list[int], **standard) -> subprocess.Popen:
    # From a thread that lives as long as this process: --die-with-parent watches the parent *thread*.
    return (
        _spawner(os.getpid())
        .submit(
            subprocess.Popen,
            command,
            bufsize=0,
            pass_fds=descriptors,
            env={},
            cwd="/",
            start_new_session=True,  # ^C at the terminal must reach only the trainer
            **standard,
        )
        .result()
    )


@functools.cache
def _spawner(owner: int) -> concurrent.futures.ThreadPoolExecutor:
    del owner  # part of the cache key: a forked child inherits the cache but not the thread
    return concurrent.futures.ThreadPoolExecutor(1, "sandbox-spawner")
