"""PID 1 of the outer sandbox of one trainer: forks the sandbox of each episode, instead of starting Python in each.

The outer sandbox is made by bwrap: folders, devices, no network, the seccomp filter, and no capabilities but, under a
trainer that is root, those over users and mounts of its own user namespace. A request is one datagram on file
descriptor 0: the size of a disk and the arguments of `supervisor.main`, with two descriptors, the child's socket to the
host and its standard error. The child takes the rest: a user, mount, pid, network and ipc namespace of its own, /work,
/tmp and /proc, and no capability at the end. It serves only if all that took effect: any error ends it, and the host
reads the message. Nothing here runs while an agent's process can see it: those live in pid namespaces below. End of
file on 0 means that the host is gone: PID 1 exits, and the kernel kills every sandbox.

It imports only modules written in C: each call of a tool is a fork of a supervisor, and copies what stands in memory.
"""

import _ctypes
import _signal
import _socket
import itertools
import posix
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

import supervisor

MAX_REQUEST_BYTES = 4096
_SPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEW{USER,NS,PID,NET,IPC}
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC = 1, 2, 4, 8  # MS_RDONLY, …
_REMOUNT, _BIND, _PRIVATE_BELOW = 32, 4096, 1 << 18 | 1 << 14  # MS_REMOUNT, MS_BIND, MS_PRIVATE | MS_REC
_DETACH = 2  # MNT_DETACH
_DROP_BOUND, _AMBIENT, _AMBIENT_CLEAR = 24, 47, 4  # PR_CAPBSET_DROP, …
_CAPABILITIES_VERSION_3 = 0x20080522
_SET_FLAGS, _UP_AND_RUNNING = 0x8914, 0x41  # SIOCSIFFLAGS; IFF_UP | IFF_RUNNING
_NO_CAPABILITY = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)
_SAFE = {**_NO_CAPABILITY, "NoNewPrivs": "1", "Seccomp": "2"}  # of /proc/self/status
_DEVICES = (b"/dev/null", b"/dev/zero", b"/dev/full", b"/dev/random", b"/dev/urandom")
# The host's user has one quota of each of the first; no sandbox may use it up. Control groups of version 1 let the
# buffers of TCP pass their limit, so these are small.
_QUOTAS = {
    "user/max_user_namespaces": "0",
    "user/max_inotify_instances": "8",
    "user/max_inotify_watches": "1024",
    "user/max_fanotify_groups": "0",
    "net/ipv4/tcp_rmem": "4096 16384 16384",
    "net/ipv4/tcp_wmem": "4096 16384 16384",
}


class _Int(_ctypes._SimpleCData):
    _type_ = "i"


class _UnsignedLong(_ctypes._SimpleCData):
    _type_ = "L"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


def _call(name, *arguments):
    """Calls a function of the C library. Raises OSError unless it returns 0."""
    if _Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), name))(*arguments) != 0:
        error = _ctypes.get_errno()
        raise OSError(error, f"{name}{arguments}: {posix.strerror(error)}")


def _mount(source, target, kind, flags, options=None):
    _call("mount", source, target, kind, _UnsignedLong(flags), options)


def _put(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def uncover():
    """Takes bwrap's covers off /proc: below a /proc with covers the kernel allows no new one. Nobody sees this one."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for point in [line.split(" ")[4] for line in file]:
            if point.startswith("/proc/"):
                _call("umount2", point.encode(), _DETACH)


def leave(number, disk_bytes):
    """Enters new namespaces, with disks of its own; the next child is PID 1 of the new pid namespace.

    As root, it becomes another user first: one of `supervisor.USERS` users of the host, that run nothing else.
    """
    if posix.getuid() == 0:
        user = supervisor.AGENT + number % supervisor.USERS
        posix.setgroups([])
        posix.setresgid(user, user, user)
        posix.setresuid(user, user, user)
    uid, gid = posix.getuid(), posix.getgid()
    supervisor.set_dumpable(1)  # else the maps belong to root
    _call("unshare", _SPACES)
    _put("/proc/self/setgroups", "deny")
    _put("/proc/self/uid_map", f"{supervisor.AGENT} {uid} 1")
    _put("/proc/self/gid_map", f"{supervisor.AGENT} {gid} 1")
    _mount(None, b"/", None, _PRIVATE_BELOW)
    disks = ((b"/tmp", 0o1777, disk_bytes), (b"/work", 0o755, disk_bytes), (b"/run/shell", 0o755, 1 << 20))
    for path, mode, size in disks:
        options = b"mode=%o,size=%d,nr_inodes=%d" % (mode, size, max(1024, size >> 11))
        _mount(b"tmpfs", path, b"tmpfs", _NO_SUID | _NO_DEVICES, options)
    for name in _DEVICES:  # read-only: one can read and write the device, but not change its mode on the host
        kept = posix.statvfs(name).f_flag & (_NO_SUID | _NO_EXEC)
        _mount(None, name, None, _BIND | _REMOUNT | _READ_ONLY | kept)
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    interface = b"lo".ljust(16, b"\0") + _UP_AND_RUNNING.to_bytes(2, sys.byteorder) + bytes(22)  # struct ifreq
    _call("ioctl", any_socket.fileno(), _SET_FLAGS, interface)
    any_socket.close()


def settle():
    """Makes /proc that of the new pid namespace, read-only; gives up every capability, and checks that it did.

    Returns a descriptor of its oom_score_adj, for the supervisor. /proc/1 is hidden: the host's root owns its files,
    and to the kernel the agent may be the host's root.
    """
    sealed = _NO_SUID | _NO_DEVICES | _NO_EXEC
    _mount(b"proc", b"/proc", b"proc", sealed)
    for name, value in _QUOTAS.items():  # of these namespaces; raising them takes a capability
        _put(f"/proc/sys/{name}", value)
    score = posix.open("/proc/self/oom_score_adj", posix.O_RDWR | posix.O_CLOEXEC)
    status = posix.open("/proc/self/status", posix.O_RDONLY | posix.O_CLOEXEC)
    _mount(b"/proc", b"/proc", None, _BIND)
    _mount(None, b"/proc", None, _BIND | _REMOUNT | _READ_ONLY | sealed)
    _mount(b"tmpfs", b"/proc/1", b"tmpfs", _READ_ONLY | sealed, b"size=4096")
    with open("/proc/sys/kernel/cap_last_cap", encoding="utf-8") as file:
        for capability in range(int(file.read()) + 1):
            _call("prctl", _DROP_BOUND, capability, 0, 0, 0)
    _call("prctl", _AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    _call("capset", _CAPABILITIES_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4), bytes(24))
    with open(status, encoding="utf-8") as file:
        found = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    for name, value in _SAFE.items():
        if found[name] != value:
            raise OSError(f"{name} is {found[name]}, not {value}")
    return score


def begin(number, request, connection, errors):
    """Becomes the sandbox; never returns."""
    try:
        for source, target in ((connection, 0), (connection, 1), (errors, 2)):
            posix.dup2(source, target)
        posix.close(connection)
        posix.close(errors)
        disk_bytes, *arguments = map(int, request.split())
        leave(number, disk_bytes)
        if posix.fork() == 0:
            posix.setsid()  # the kernel shares out the CPU among sessions: not one share for all supervisors
            supervisor.main(settle(), arguments)
    except BaseException as error:
        posix.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        posix._exit(1)


def main():
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel reaps; a supervisor sets its own handler
    requests = _socket.socket(fileno=0)
    if posix.getuid() == 0:
        uncover()
    requests.send(b"ready")
    for number in itertools.count():
        request, ancillary, _, _ = requests.recvmsg(MAX_REQUEST_BYTES, _socket.CMSG_SPACE(8))
        fds = [fd for _, _, data in ancillary for fd in memoryview(data).cast("i")]
        if not request:
            posix._exit(0)
        try:
            if posix.fork() == 0:
                begin(number, request, *fds)
        except OSError as error:  # no process or memory is left: this sandbox does not start, the others live on
            posix.write(fds[1], str(error).encode())
        for fd in fds:
            posix.close(fd)


if __name__ == "__main__":
    main()
