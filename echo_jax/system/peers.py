"""The processes of one run: how they find each other, agree, and notice that one of them is gone.

In: the environment that a launcher set. Out: a `Peers`. The processes exchange only small values here, through JAX's
coordination service, which process 0 hosts; arrays go through the devices. A process that dies would leave the others
waiting in a collective forever. So each process has a thread that sends heartbeats, watches for those of the others,
and ends its process when another's stop. When process 0 itself dies, JAX ends the others at once, with JAX's message.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self

import jax

from echo_jax.system.errors import USER_ERRORS, UserError
from echo_jax.system.terminal import escaped

# Exit statuses of a run.
AGAIN = 75  # EX_TEMPFAIL: the same command resumes the run
TAKEN = 69  # EX_UNAVAILABLE: another process owns the run
_FOLDER = "echo_jax"  # prefix of our keys
_FAILED = "failed"  # key of an error among the values of `gather`
_START_SECONDS = 300.0  # within which all processes must start
_GRACE_SECONDS = 10.0  # for which a failed process 0 stays, so that the others can read why


class JointError(UserError, RuntimeError):
    """An error that all processes of a run raise at the same place."""


class PeerError(UserError, RuntimeError):
    """The processes of a run cannot work together; the message names the one that is missing or differs."""


class Peers:
    """This process among those of its run. All must make the same calls of `gather` and `first`, in the same order.

    A context manager: leaving it by an exception tells the others why and ends this process at once, since JAX would
    wait for processes that no longer come. For a single process it does nothing.
    """

    def __init__(
        self,
        *,
        silence_seconds: float = 30.0,
        barrier_seconds: float = 3600.0,
        client: Any = None,
        index: int = 0,
        count: int = 1,
    ):
        """
        Args:
          silence_seconds: after this long without a heartbeat, a process counts as dead.
          barrier_seconds: how late a live process may be for a `gather`.
          client: of JAX's coordination service; None for a single process.
        """
        self.index, self.count = index, count
        self._silence, self._barrier = silence_seconds, barrier_seconds
        self._client = client
        self._hosts = [socket.gethostname()] if count == 1 else ["an unknown host"] * count
        self._gathered = 0
        self._on_stop: Callable[[int], None] = lambda signal_number: None
        self._stop = 0  # the signal by which this process was asked to stop
        self._others_stop = 0  # the signal by which another process was asked to stop
        self._done = threading.Event()
        self._status = 0  # the exit status of this process, once decided
        self._looked = time.monotonic()  # when the watch last got an answer
        if count > 1:
            self._hosts = self.gather(socket.gethostname(), "start")
            self._threads = [
                threading.Thread(target=target, daemon=True) for target in (self._watch, self._watch_watch)
            ]
            for thread in self._threads:
                thread.start()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files that a run writes once."""
        return self.index == 0

    def gather(self, value: Any, what: str = "result") -> list[Any]:
        """Returns every process's value, by index, once all have sent theirs. `value`: anything that `json` can write.

        Raises:
          PeerError: a live process did not come within `barrier_seconds`; the message names `what` and its host.
          JointError: a process has called `fail_together`.
        """
        if self.count == 1:
            return [value]
        self._gathered += 1
        folder = f"{_FOLDER}_gather/{self._gathered}"
        self._client.key_value_set(f"{folder}/{self.index}", json.dumps(value))
        values = [value if i == self.index else self._await(f"{folder}/{i}", i, what) for i in range(self.count)]
        # A process that sends its n-th value has read all values n-1. So everyone has read the values n-2.
        if self._gathered > 2:
            self._client.key_value_delete(f"{_FOLDER}_gather/{self._gathered - 2}/{self.index}")
        if failures := [value[_FAILED] for value in values if isinstance(value, dict) and _FAILED in value]:
            raise JointError(failures[0])
        return values

    def fail_together(self, error: Exception) -> NoReturn:
        """Raises the error; with several processes, a `JointError` with its message in all of them: in this one now, in
        the others at their next `gather`."""
        if self.count > 1:
            self.gather({_FAILED: str(error)}, "an error")
        raise error

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Lets an error that a user can fix, raised inside by one process, end all of them together."""
        try:
            yield
        except JointError:
            raise
        except UserError as error:
            self.fail_together(error)

    def join(self, values: Sequence[Any], what: str = "results") -> list[Any]:
        """Returns the values of all processes in one list."""
        return [value for theirs in self.gather(list(values), what) for value in theirs]

    def share(self, everything: Sequence[Any]) -> Sequence[Any]:
        """Returns this process's share, dealt out in turn."""
        return everything[self.index :: self.count]

    def first(self, make: Callable[[], Any], what: str = "process 0") -> Any:
        """Returns what `make` returns on process 0, the only one that calls it."""
        return self.gather(make() if self.is_first else None, what)[0]

    def same(self, values: Mapping[str, Any], remedy: str) -> None:
        """Raises `PeerError`, naming process and key, if a process's values differ from those of process 0."""
        everyone = self.gather(dict(values), "comparison")
        for index, other in enumerate(everyone):
            for name in sorted(everyone[0].keys() | other.keys()):
                if everyone[0].get(name) != other.get(name):
                    raise PeerError(
                        f"{self._name(index)} has {name} = {other.get(name)!r}, but process 0 on {self._hosts[0]} has "
                        f"{everyone[0].get(name)!r}: {remedy}"
                    )

    def stop(self, signal_number: int) -> None:
        """Asks all processes to stop. Safe to call from a signal handler."""
        self._stop = self._stop or signal_number

    def on_stop(self, callback: Callable[[int], None]) -> None:
        """Calls `callback` in another thread, with the signal, when another process is asked to stop."""
        self._on_stop = callback
        if self._others_stop:
            callback(self._others_stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        if self.count == 1:
            return
        if error is None:
            self.gather(None, "end")
            self._done.set()
            for thread in self._threads:  # they must not use the service after its shutdown
                thread.join()
            jax.distributed.shutdown()
            return
        if self._of_a_collective(error):  # most likely another process is gone: the watch finds it and ends this one
            time.sleep(self._silence + 2 * self._period)
        if isinstance(error, USER_ERRORS):
            reason = str(error)
            print(f"error: {escaped(reason)}", file=sys.stderr)
        else:
            reason = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
        self._fail(reason, 130 if isinstance(error, KeyboardInterrupt) else 1)

    # Heartbeats.

    @property
    def _period(self) -> float:
        return min(self._silence / 10, 3.0)

    def _watch(self) -> None:
        """Sends heartbeats, and watches for those of the others."""
        heard = dict.fromkeys(range(self.count), (None, time.monotonic()))
        beat = 0
        while not self._done.wait(self._period):
            beat += 1
            try:
                self._say("alive", str(beat))
                if self._stop:
                    self._say("stop", str(self._stop))
                said = dict(self._client.key_value_dir_get(_FOLDER))
            except (RuntimeError, ValueError):
                continue  # a brief failure, or process 0 is gone: time will tell
            now = self._looked = time.monotonic()
            for index in (i for i in range(self.count) if i != self.index):
                theirs = {what: said.get(f"{_FOLDER}/{what}/{index}") for what in ("failed", "left", "stop", "alive")}
                if theirs["failed"] is not None:
                    failed = json.loads(theirs["failed"])
                    self._end(f"{self._name(index)} failed: {failed['reason']}", failed["status"])
                if theirs["left"] is not None:
                    self._end(f"{self._name(index)} has stopped")
                if theirs["stop"] and not self._others_stop:
                    self._others_stop = int(theirs["stop"])
                    if not self._stop:
                        self._on_stop(self._others_stop)
                if theirs["alive"] != heard[index][0]:
                    heard[index] = (theirs["alive"], now)
                elif now - heard[index][1] > self._silence:
                    self._end(f"{self._name(index)} sent no heartbeat for {self._silence:.0f} s")

    def _watch_watch(self) -> None:
        """Ends this process when the watch itself gets no answer: if process 0's host vanishes, the watch hangs."""
        while not self._done.wait(self._period):
            if time.monotonic() - self._looked > self._silence + self._period:
                self._end(f"{self._name(0)} has not answered for {self._silence:.0f} s", answers=False)

    def _say(self, what: str, text: str) -> None:
        self._client.key_value_set(f"{_FOLDER}/{what}/{self.index}", text, allow_overwrite=True)

    def _await(self, key: str, index: int, what: str) -> Any:
        deadline = time.monotonic() + self._barrier
        while True:
            seconds = max(0.01, min(5.0, deadline - time.monotonic()))
            try:
                return json.loads(self._client.blocking_key_value_get(key, int(1000 * seconds)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if time.monotonic() >= deadline:
                raise PeerError(
                    f"{self._name(index)} did not reach {what!r} within system.barrier_seconds = {self._barrier:.0f}"
                )

    def _name(self, index: int) -> str:
        return f"process {index} of {self.count} on {self._hosts[index]}"

    @staticmethod
    def _of_a_collective(error: BaseException) -> bool:
        while error is not None:
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _end(self, why: str, status: int = AGAIN, *, answers: bool = True) -> None:
        """Ends this process, whatever its other threads wait for: nothing else frees them from a collective."""
        if self._done.is_set() or (self._status and answers):  # already ending: another's exit changes nothing
            return
        advice = ". Everything saved is complete: run the same command again to resume" if status == AGAIN else ""
        print(f"error: {escaped(why)}; {self._name(self.index)} stops too{advice}", file=sys.stderr, flush=True)
        self._exit(status, others=self.count - 2, answers=answers)

    def _fail(self, reason: str, status: int) -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # process 0 is gone already
            self._say("failed", json.dumps({"reason": reason, "status": status}))
        self._exit(status, others=self.count - 1)

    def _exit(self, status: int, others: int, *, answers: bool = True) -> None:
        """Ends this process. Process 0, which hosts the service, first waits until `others` processes have left or the
        grace period is over. The first call decides the status."""
        self._status = self._status or status
        with contextlib.suppress(RuntimeError, ValueError):
            if answers:
                self._say("left", "")
            deadline = time.monotonic() + _GRACE_SECONDS * self.is_first
            while time.monotonic() < deadline and len(self._client.key_value_dir_get(f"{_FOLDER}/left")) <= others:
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._status)


def start(*, silence_seconds: float, barrier_seconds: float) -> Peers:
    """Joins the other processes of this run, if the environment declares any. Call it before any use of JAX's devices.

    The environment is one of: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; a SLURM step of
    several tasks; `ECHO_JAX_CLUSTER=auto`, which lets `jax.distributed.initialize` detect them (from a TPU pod's
    metadata).

    Raises:
      PeerError: the environment is incomplete, or the other processes did not come.
    """
    limits = {"silence_seconds": silence_seconds, "barrier_seconds": barrier_seconds}
    arguments = _arguments(os.environ)
    if arguments is None:
        return Peers(**limits)
    jax.config.update("jax_enable_preemption_service", False)  # it would take over SIGTERM, which we handle
    patience = min(barrier_seconds, _START_SECONDS)
    late = threading.Timer(patience, _give_up, (arguments, patience))
    late.daemon = True
    late.start()
    try:
        # JAX's limits are longer than ours: past one, JAX aborts the process without saying which one was lost.
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(2 * patience) + 60,
            heartbeat_timeout_seconds=int(2 * silence_seconds) + 30,
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"the processes of this run cannot find each other with {arguments}: {error}") from error
    finally:
        late.cancel()
    from jax._src import distributed  # the only way to get the client; orbax uses it too

    state = distributed.global_state
    return Peers(**limits, client=state.client, index=state.process_id, count=state.num_processes)


def _give_up(arguments: dict[str, Any], patience: float) -> None:
    """Ends a process whose peers did not come. JAX would go on waiting, and cannot tell who is missing before all have
    joined."""
    known = {
        n: os.environ[n] for n in ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID") if n in os.environ
    }
    print(
        f"error: after {patience:.0f} s this process on {socket.gethostname()} still waits for others of its run "
        f"({', '.join(f'{name} {value}' for name, value in (arguments | known).items())}): find the missing process "
        "by its log, which ends before the first step or does not exist",
        file=sys.stderr,
        flush=True,
    )
    os._exit(AGAIN)


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process."""
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        numbers = {}
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            if not environment.get(name, "").isdecimal():
                raise PeerError(
                    f"JAX_COORDINATOR_ADDRESS = {address}, but {name} = {environment.get(name, '')!r} is not a number"
                )
            numbers[name] = int(environment[name])
        count, index = numbers["JAX_NUM_PROCESSES"], numbers["JAX_PROCESS_ID"]
        if index >= count:
            raise PeerError(f"JAX_PROCESS_ID = {index}: it must be less than JAX_NUM_PROCESSES = {count}")
        explicit = {"coordinator_address": address, "num_processes": count, "process_id": index}
        return explicit | {"cluster_detection_method": "deactivate"}
    in_a_step = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"}
    if in_a_step <= environment.keys() and environment["SLURM_NTASKS"] != "1":
        return {"cluster_detection_method": "slurm"}
    if method := environment.get("ECHO_JAX_CLUSTER"):
        return {} if method == "auto" else {"cluster_detection_method": method}
    return None
