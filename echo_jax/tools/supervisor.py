"""PID 1 of a sandbox: starts each command, captures its output up to a cap, kills it at its time-out.

It runs inside the sandbox, from a byte-compiled copy: a fork of the fork server, or under `python -I -S`. It imports
only modules written in C, which keeps that start near 10 ms. The agent's code runs under the same uid but cannot reach
it: a signal from inside a pid namespace does not kill its PID 1, PR_SET_DUMPABLE=0 closes ptrace and /proc/1/{fd,mem},
and the seccomp filter refuses calls that take a bare pid, such as prlimit(2). So the host can trust its answers.

In: requests on file descriptor 0. Out, on file descriptor 1: a zero byte once it is ready, then one answer each. A
message is a list of byte strings; see `pack` and `unpack`, which the host uses too. End of file on 0 means that the
host is gone: the supervisor exits, and the kernel kills everything else in the namespace.
"""

import _signal
import posix
import resource
import select
import sys
import time

# contextlib.suppress would require importing contextlib and collections
# ruff: noqa: SIM105

WORK = b"/work"
BASH = b"/usr/bin/bash"
SHELL = b"/run/shell"  # a separate small tmpfs: a full disk must not lose the directory and the environment
# Bash reads this before each command (BASH_ENV), so that the command itself is an ordinary `bash -c`. The agent can
# write this state; if it corrupts it, only the agent's next call suffers. A call that replaces the EXIT trap, ends in
# `exec` or dies by SIGKILL leaves the state as it was.
RC = b"""unset BASH_ENV
[ -f /run/shell/env ] && . /run/shell/env
trap '{ builtin declare -px >|/run/shell/env; builtin pwd >|/run/shell/cwd; %s} 2>/dev/null' EXIT
"""
# Where places are asked for, the shell stops itself at its end until the supervisor has read from the kernel where it
# stands: a file may say anything. This costs a call about a millisecond.
STOP = b"builtin kill -STOP $$; "
# The agent's Python, one process for all its calls. The code is in a memory file that both sides hold open; a byte on
# one pipe starts it, a byte on another says how it ended. The agent can reach all of this; if it corrupts it, only its
# next call suffers. SystemExit ends the process, as it would anywhere.
INTERPRETER = b"""
import ast, linecache, os, sys, traceback
sys.path.insert(0, "")  # not before: a module of the agent's must not stand in for one of these
memory, start, ended = map(int, sys.argv[1:])
sys.argv[1:] = []
names = {"__name__": "__main__", "__builtins__": __builtins__}
number = 0
while os.read(start, 1):
    number += 1
    place = f"<call {number}>"
    failed = b"\\0"
    try:
        source = os.pread(memory, os.fstat(memory).st_size, 0).decode("utf-8", "surrogateescape")
        linecache.cache[place] = len(source), None, source.splitlines(True), place
        tree = compile(source, place, "exec", ast.PyCF_ONLY_AST)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, place, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
            if value is not None:
                print(repr(value))
    except (Exception, KeyboardInterrupt) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == "<string>":
            trace = trace.tb_next
        traceback.print_exception(error.with_traceback(trace))
        failed = b"\\1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(ended, failed)
"""
ENVIRONMENT = {
    b"PATH": b"/opt/python/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    b"HOME": WORK,
    b"USER": b"agent",
    b"LOGNAME": b"agent",
    b"LANG": b"C.UTF-8",
    b"TZ": b"UTC",
    b"TERM": b"dumb",
    b"PAGER": b"cat",
    b"GIT_PAGER": b"cat",
    b"PYTHONDONTWRITEBYTECODE": b"1",
}
AGENT = 1000  # uid and gid of the agent, as it sees them
USERS = 4096  # of the host, that sandboxes of a trainer that is root run as
CHUNK = 1 << 16
MAX_BACKGROUND_PIPES = 64
HIGHEST_SCORE = b"1000"  # of oom_score_adj: out of memory, the kernel kills this, not the trainer or the supervisor
MOST_DESCRIPTORS = 1 << 20  # larger than any of the supervisor's
REAP_SECONDS = 5.0


def pack(fields):
    """Returns length-prefixed fields, preceded by their total length. Each length is 4 bytes, little endian."""
    body = b"".join(len(field).to_bytes(4, "little") + field for field in fields)
    return len(body).to_bytes(4, "little") + body


def unpack(body):
    """The inverse of `pack`, without the outer length. Raises ValueError on a malformed body."""
    fields, at = [], 0
    while at < len(body):
        end = at + 4 + int.from_bytes(body[at : at + 4], "little")
        if at + 4 > len(body) or end > len(body):
            raise ValueError(f"field ends at {end} of {len(body)} bytes")
        fields.append(body[at + 4 : end])
        at = end
    return fields


class Refused(Exception):
    """The supervisor answers the request with this error message."""


class Capture:
    """Keeps the first and last bytes of a stream and counts those between."""

    def __init__(self, limit):
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        self.head_limit = limit // 2
        self.tail_limit = limit - self.head_limit

    def feed(self, data):
        self.total += len(data)
        room = self.head_limit - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > self.tail_limit + CHUNK:
            del self.tail[: len(self.tail) - self.tail_limit]

    def finish(self):
        """Returns (head, tail, number of dropped bytes)."""
        tail = self.tail[max(0, len(self.tail) - self.tail_limit) :]
        return bytes(self.head), bytes(tail), self.total - len(self.head) - len(tail)


def open_parent(path, create):
    """Returns a descriptor of the folder of `path` (relative to /work), and the last name in `path`. Follows no
    symbolic link."""
    *folders, name = path.split(b"/")
    flags = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC | posix.O_NOFOLLOW
    folder = posix.open(WORK, flags)
    try:
        for part in folders:
            if create:
                try:
                    posix.mkdir(part, 0o755, dir_fd=folder)
                except FileExistsError:
                    pass
            inner = posix.open(part, flags, dir_fd=folder)
            posix.close(folder)
            folder = inner
    except OSError:
        posix.close(folder)
        raise
    return folder, name


def read_ready(fd, size=CHUNK):
    """Returns the bytes available now: b"" at the end of file, None if there are none. It can return None even after a
    poll that reported data: through /proc, the agent can open its end of a pipe for reading and take the data."""
    try:
        return posix.read(fd, size)
    except BlockingIOError:
        return None


def read_up_to(fd, limit):
    """Returns at most `limit` + 1 bytes, so that the caller can tell that there was more."""
    data = bytearray()
    while len(data) <= limit:
        chunk = posix.read(fd, min(CHUNK, limit + 1 - len(data)))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def read_regular(name, limit, folder=None):
    """Returns the bytes of a regular file. O_NONBLOCK: opening a FIFO planted there must not wait for a writer."""
    fd = posix.open(name, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK, dir_fd=folder)
    try:
        if posix.fstat(fd).st_mode & 0o170000 != 0o100000:
            raise Refused("not a regular file")
        data = read_up_to(fd, limit)
    finally:
        posix.close(fd)
    if len(data) > limit:
        raise Refused(f"larger than {limit} bytes")
    return data


def write_regular(name, data, folder=None):
    """Creates a new file. Whatever had the name before (a link, a FIFO, a hard link elsewhere) is never written to."""
    try:
        posix.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    fd = posix.open(
        name, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o644, dir_fd=folder
    )
    try:
        view = memoryview(data)
        while view:
            view = view[posix.write(fd, view) :]
    finally:
        posix.close(fd)


class Interpreter:
    """The supervisor's ends of the pipes to a running INTERPRETER."""

    def __init__(self, output):
        self.pid = None
        self.output = output  # None once the interpreter has closed it
        self.memory = posix.memfd_create("call", posix.MFD_CLOEXEC)
        self.start_read, self.start = posix.pipe2(posix.O_CLOEXEC)
        self.ended, self.ended_write = posix.pipe2(posix.O_CLOEXEC)
        for fd in (self.start, self.ended):
            posix.set_blocking(fd, False)
        self.ends = self.memory, self.start, self.ended

    def begin(self, code):
        """Starts a call. Raises OSError if the interpreter no longer listens."""
        read_ready(self.ended)  # drops bytes that it sent outside a call
        posix.ftruncate(self.memory, 0)
        posix.pwrite(self.memory, code, 0)
        posix.write(self.start, b"\0")

    def said(self):
        """Returns how the call ended, as a wait status; None while it runs."""
        byte = read_ready(self.ended, 1)
        if byte == b"" and self.pid is not None:
            posix.kill(self.pid, _signal.SIGKILL)  # it has closed the pipe and could never report the end
        return 256 * (byte != b"\0") if byte else None


class Supervisor:
    """State between requests: the directories, the pipes that background processes still hold, the limits."""

    def __init__(self, score, output_bytes, flood_bytes, polled_processes, rlimits):
        self.score = score  # a descriptor of its own oom_score_adj; None: a child must write its own
        self.output_bytes = output_bytes
        self.flood_bytes = flood_bytes
        self.polled_processes = polled_processes  # 0: the kernel enforces the limit, no polling needed
        self.rlimits = [(which, value, resource.getrlimit(which)[1]) for which, value in rlimits]
        self.cwd = WORK  # where the next call starts, as the shell named it
        self.stands = WORK  # where the shell last stopped itself, from the kernel; no symbolic links
        self.child = self.status = None  # the process that the current call waits for, and its wait status
        self.shell = None  # that process, if it is the agent's shell
        self.interpreter = None
        self.background = []
        self.poller = select.poll()
        wake, signalled = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        self.wake = wake
        self.poller.register(wake, select.POLLIN)
        _signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)  # only a handler wakes the poll; a forged SIGCHLD is harmless

    # -- the protocol ------------------------------------------------------------------------------------------------

    def serve(self):
        answers = {
            b"run": self.run,
            b"python": self.python,
            b"read": self.read,
            b"write": self.write,
            b"kill": self.kill,
        }
        while True:
            self.wait_for_request()
            operation, *arguments = unpack(self.receive(int.from_bytes(self.receive(4), "little")))
            try:
                answer = [b"ok", *answers[operation](*arguments)]
            except (Refused, OSError) as error:
                answer = [b"error", str(error).encode("utf-8", "backslashreplace")[:1000]]
            view = memoryview(pack(answer))
            while view:
                view = view[posix.write(1, view) :]

    def receive(self, size):
        data = bytearray()
        while len(data) < size:
            chunk = posix.read(0, min(size - len(data), 1 << 20))
            if not chunk:
                posix._exit(0)
            data += chunk
        return bytes(data)

    def wait_for_request(self):
        self.poller.register(0, select.POLLIN)
        while True:
            alive = self.reap()
            ready = self.poll(None, watch=alive)
            if 0 in ready:
                return

    def poll(self, seconds, watch):
        """Returns the descriptors that are ready, after emptying the pipes of background processes. A server may log
        forever; if nobody read, it would stop at a full pipe."""
        if watch and self.polled_processes:
            seconds = min(0.05, 3600.0 if seconds is None else seconds)
        ready = {fd for fd, _ in self.poller.poll(None if seconds is None else max(0.0, seconds) * 1000)}
        if self.wake in ready:
            read_ready(self.wake)
        for fd in ready.intersection(self.background):
            if read_ready(fd) == b"":
                self.drop(fd)
        if watch and self.polled_processes:
            self.enforce_processes()
        return ready

    def drop(self, fd):
        if fd in self.background:
            self.background.remove(fd)
        if self.interpreter is not None and fd == self.interpreter.output:
            self.interpreter.output = None
        self.poller.unregister(fd)
        posix.close(fd)

    # -- processes ---------------------------------------------------------------------------------------------------

    def reap(self):
        """Collects every ended child, orphans too, and records the status of `child`. False when no child is left."""
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG | posix.WUNTRACED)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if posix.WIFSTOPPED(status):
                if pid == self.shell:
                    self.note_place(pid)
                continue
            if pid == self.child:
                self.status = status
            if self.interpreter is not None and pid == self.interpreter.pid:
                self.interpreter.pid = None

    def kill_all(self):
        """Kills every process of the namespace but this one. The signal also stops a fork in progress."""
        deadline = time.monotonic() + REAP_SECONDS
        while True:
            try:
                posix.kill(-1, _signal.SIGKILL)
            except ProcessLookupError:
                pass
            if not self.reap():
                return
            if time.monotonic() > deadline:
                sys.exit("a killed process does not end")  # better no sandbox than one with a survivor
            self.poller.poll(20)

    def enforce_processes(self):
        if threads() > self.polled_processes + 1:
            self.kill_all()

    def fork(self):
        """Forks; kills the agent's processes first if they leave no room. Returns (pid, whether it killed)."""
        if self.score is not None:
            posix.pwrite(self.score, HIGHEST_SCORE, 0)  # the child inherits it
        try:
            try:
                return posix.fork(), False
            except BlockingIOError:
                self.kill_all()
                return posix.fork(), True
        finally:
            if self.score is not None and posix.getpid() == 1:
                posix.pwrite(self.score, b"0", 0)

    # -- requests ----------------------------------------------------------------------------------------------------

    def kill(self):
        self.kill_all()
        return []

    def run(self, command, timeout, fresh):
        """Runs one `bash -c`; see `answer`."""
        deadline = time.monotonic() + float(timeout)
        fresh = fresh == b"1"
        capture = Capture(self.output_bytes)
        output, write_end = self.output_pipe()
        self.status = None
        try:
            self.child, killed = self.fork()
        except OSError as error:
            self.drop(output)
            posix.close(write_end)
            return self.not_started(error, capture)
        if self.child == 0:
            self.become([BASH, b"--norc", b"--noprofile", b"-c", command], write_end, fresh, float(timeout))
        posix.close(write_end)
        self.shell = None if fresh else self.child
        if killed:
            capture.feed(b"[no process was left for this command: background processes were ended]\n")
        stopped = self.watch(output, capture, deadline)
        if not fresh:
            self.note_directory()
        return self.answer(capture, stopped)

    def python(self, code, timeout):
        """Runs code in the agent's interpreter; see `answer`. Replaces one that has ended; the output then says so."""
        deadline = time.monotonic() + float(timeout)
        capture = Capture(self.output_bytes)
        self.reap()
        old = self.interpreter
        if old is not None and (old.pid is None or old.output is None):
            self.end_interpreter()
        if self.interpreter is None:
            try:
                self.start_interpreter()
            except OSError as error:
                return self.not_started(error, capture)
            if old is not None:
                capture.feed(b"[a fresh interpreter: the last one ended]\n")
        interpreter = self.interpreter
        self.background.remove(interpreter.output)
        self.child, self.status = interpreter.pid, None
        self.poller.modify(0, 0)  # hang-up only
        try:
            interpreter.begin(code)
        except (BlockingIOError, BrokenPipeError):  # the agent's code has closed or taken over its end
            posix.kill(interpreter.pid, _signal.SIGKILL)
        self.poller.register(interpreter.ended, select.POLLIN)
        stopped = self.watch(interpreter.output, capture, deadline, interpreter)
        self.poller.unregister(interpreter.ended)
        return self.answer(capture, stopped)

    def not_started(self, error, capture):
        """Answers a call for which the host has no process or memory left."""
        capture.feed(b"cannot start: %s\n" % error.strerror.encode())
        self.status = 126 << 8
        return self.answer(capture, b"")

    def output_pipe(self):
        output, write_end = posix.pipe2(posix.O_CLOEXEC)
        posix.set_blocking(output, False)
        self.poller.register(output, select.POLLIN)
        self.poller.modify(0, 0)  # hang-up only
        return output, write_end

    def start_interpreter(self):
        output, write_end = self.output_pipe()
        interpreter = Interpreter(output)
        try:
            interpreter.pid, _ = self.fork()
        except OSError:
            self.drop(output)
            for fd in (write_end, interpreter.start_read, interpreter.ended_write, *interpreter.ends):
                posix.close(fd)
            raise
        if interpreter.pid == 0:
            inherited = (interpreter.memory, interpreter.start_read, interpreter.ended_write)
            for fd in inherited:
                posix.set_inheritable(fd, True)
            fds = [b"%d" % fd for fd in inherited]
            command = [b"/opt/python/bin/python3", b"-u", b"-P", b"-c", INTERPRETER, *fds]
            self.become(command, write_end, fresh=False, kept=inherited)
        for fd in (write_end, interpreter.start_read, interpreter.ended_write):
            posix.close(fd)
        self.background.append(output)
        self.interpreter = interpreter

    def end_interpreter(self):
        interpreter, self.interpreter = self.interpreter, None
        if interpreter.pid is not None:
            posix.kill(interpreter.pid, _signal.SIGKILL)
        for fd in interpreter.ends:
            posix.close(fd)

    def watch(self, output, capture, deadline, interpreter=None):
        """Reads output until the child ends or the interpreter reports that the call did. Returns b"", or why it killed
        everything first: b"timeout", b"output"."""
        stopped, is_open = b"", True
        while True:
            self.reap()
            if interpreter is not None and self.status is None:
                self.status = interpreter.said()
            if self.status is not None:
                break
            if time.monotonic() >= deadline:
                stopped = b"timeout"
                break
            if capture.total > self.flood_bytes:
                stopped = b"output"
                break
            ready = self.poll(deadline - time.monotonic(), watch=True)
            if 0 in ready:
                posix._exit(0)
            if output in ready:
                data = read_ready(output)
                if data == b"":
                    self.drop(output)
                    is_open = False
                capture.feed(data or b"")
        if stopped:
            self.kill_all()
        if is_open:
            self.finish_pipe(output, capture)
        self.child = self.shell = None
        return stopped

    def answer(self, capture, stopped):
        """Returns wait status (empty: killed before its end), why it was killed, which disk is full, dropped bytes,
        directory, the place where the shell stands, head, tail."""
        status = b"" if stopped else b"%d" % self.status
        head, tail, dropped = capture.finish()
        return [status, stopped, full_disk(), b"%d" % dropped, self.cwd, self.stands, head, tail]

    def become(self, command, output, fresh, timeout=0.0, kept=()):
        """Executes `command` in the child, with the descriptors `kept`; never returns."""
        try:
            posix.setsid()
            if self.polled_processes:
                posix.nice(19)  # a fork bomb must not starve the supervisor that counts its processes
            null = posix.open("/dev/null", posix.O_RDONLY)
            for source, target in ((null, 0), (output, 1), (output, 2)):
                posix.dup2(source, target)
            for which, value, ceiling in self.rlimits:
                hard = value
                if which == resource.RLIMIT_CPU:
                    value = max(value, int(timeout) + 1)
                    hard = value + 1  # the soft limit's SIGXCPU says why; the hard limit would send SIGKILL
                if ceiling != resource.RLIM_INFINITY:
                    value, hard = min(value, ceiling), min(hard, ceiling)
                resource.setrlimit(which, (value, hard))
            # From set_dumpable to execve the agent's processes can take this one over. It holds nothing of the
            # supervisor's any more: no pipe whose flags they could change, no descriptor that they do not have.
            first = 3
            for fd in (*sorted(kept), MOST_DESCRIPTORS):
                posix.closerange(first, fd)
                first = fd + 1
            set_dumpable(1)
            if self.score is None:
                score = posix.open("/proc/self/oom_score_adj", posix.O_WRONLY | posix.O_CLOEXEC)
                posix.write(score, HIGHEST_SCORE)
            posix.chdir(WORK)
            environment = dict(ENVIRONMENT)
            if not fresh:
                if command[0] == BASH:
                    environment[b"BASH_ENV"] = SHELL + b"/rc"
                try:
                    posix.chdir(self.cwd)
                except OSError:
                    pass  # the folder is gone: stay in /work
            posix.execve(command[0], [command[0].rpartition(b"/")[2], *command[1:]], environment)
        except OSError as error:
            posix.write(2, b"bash: %s\n" % error.strerror.encode())
        finally:
            posix._exit(126)

    def finish_pipe(self, output, capture):
        """Captures what is in the pipe now, up to its capacity. A background process may hold the pipe open, so it does
        not wait for the end of file; later bytes are read and dropped."""
        for _ in range(16):
            data = read_ready(output)
            if data is None:
                break
            if data == b"":
                return self.drop(output)
            capture.feed(data)
        self.background.append(output)
        if len(self.background) > MAX_BACKGROUND_PIPES:
            interpreter_output = None if self.interpreter is None else self.interpreter.output
            self.drop(next(fd for fd in self.background if fd != interpreter_output))

    def note_place(self, pid):
        """Notes where the stopped shell stands, and lets it go on."""
        try:
            self.stands = posix.readlink(b"/proc/%d/cwd" % pid)
        except OSError:  # it made itself unreadable: it stands where it was last seen
            pass
        posix.kill(pid, _signal.SIGCONT)

    def note_directory(self):
        try:
            cwd = read_regular(SHELL + b"/cwd", 4096)[:-1]
        except (Refused, OSError):
            return
        if cwd.startswith(b"/") and b"\0" not in cwd:
            self.cwd = cwd

    def read(self, path, limit):
        folder, name = open_parent(path, create=False)
        try:
            return [read_regular(name, int(limit), folder)]
        finally:
            posix.close(folder)

    def write(self, *entries):
        """Writes `entries`: triples of kind (b"file", b"link"), path, and content or target."""
        for kind, path, content in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
            folder, name = open_parent(path, create=True)
            try:
                if kind == b"file":
                    write_regular(name, content, folder)
                else:
                    posix.symlink(content, name, dir_fd=folder)
            finally:
                posix.close(folder)
        return []


def threads():
    """Counts the threads of all processes, as the kernel's limit does; skips a process that ends meanwhile."""
    count = 0
    for name in posix.listdir("/proc"):
        if name.isdigit():
            try:
                count += len(posix.listdir("/proc/" + name + "/task"))
            except OSError:
                pass
    return count


def full_disk():
    """Returns what is used up on one of the agent's disks: b"disk" (space), b"inodes", or b"" for neither."""
    for path in (WORK, b"/tmp", SHELL):
        left = posix.statvfs(path)
        if left.f_bavail == 0:
            return b"disk"
        if left.f_ffree == 0:
            return b"inodes"
    return b""


def set_dumpable(value):
    """Calls prctl(PR_SET_DUMPABLE, value) through the C half of ctypes: importing ctypes itself would take 3 ms."""
    import _ctypes

    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
    if _ctypes.call_function(prctl, (4, value, 0, 0, 0)) != 0:
        sys.exit("prctl(PR_SET_DUMPABLE) failed")


def main(score, arguments):
    """Serves requests for the sandbox's life; `score`: see `Supervisor`."""
    set_dumpable(0)
    # Python ignores or handles these. Children would inherit the ignored ones; the agent could send a handled SIGINT.
    for number in (_signal.SIGINT, _signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    output_bytes, flood_bytes, polled_processes, places, *rlimits = arguments
    limits = list(zip(rlimits[::2], rlimits[1::2], strict=True))
    write_regular(SHELL + b"/rc", RC % (STOP if places else b""))
    supervisor = Supervisor(score, output_bytes, flood_bytes, polled_processes, limits)
    posix.write(1, b"\0")  # ready
    supervisor.serve()


if __name__ == "__main__":
    main(None, list(map(int, sys.argv[1:])))
