"""The system calls that a sandbox refuses, as a classic BPF program for `bwrap --seccomp`.

Namespaces provide the isolation. This filter closes what they leave open: key rings, which sandboxes of one uid would
share; socket families outside the network namespace (vsock reaches a virtual machine's host), or whose buffers no
control group counts (netlink); filters on sockets and contexts of asynchronous I/O, of which the host has one quota;
calls that change the supervisor's limits or scheduling by its pid, or take a descriptor out of another process; leases,
which stop whoever opens the file on the host; and a few large kernel interfaces that no command needs.
"""

import errno
import platform
import struct

# name -> (x86-64, aarch64), from the kernel's syscall tables
_REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "pidfd_getfd": (438, 438),
    "mq_open": (240, 180),
    "io_setup": (206, 0),
    "seccomp": (317, 277),
    "shmget": (29, 194),  # System V: its memory would outlive all processes, until the sandbox ends
    "msgget": (68, 186),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
# name -> (x86-64, aarch64, index of the pid among the arguments)
_REFUSED_FOR_PID_1 = {
    "prlimit64": (302, 261, 0),
    "sched_setparam": (142, 118, 0),
    "sched_setscheduler": (144, 119, 0),
    "sched_setaffinity": (203, 122, 0),
    "sched_setattr": (314, 274, 0),
    "setpriority": (141, 140, 1),
    "ioprio_set": (251, 30, 1),
}
# name -> the only value allowed for the first argument: one process, not all processes of a user
_ONE_PROCESS = {"setpriority": 0, "ioprio_set": 1}
_FCNTL = (72, 25)
_COMMANDS = (1024, 1026)  # F_SETLEASE, F_NOTIFY: refused
_PRCTL, _SET_SECCOMP = (157, 167), 22
_SETSOCKOPT, _SOL_SOCKET = (54, 208), 1
_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, …EBPF
_SOCKET = (41, 198)
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW = 0x7FFF0000
_X32_BIT = 0x40000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; the low word of an argument is first


def _refuse(code: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, 0x00050000 | code)


def program(machine: str | None = None) -> bytes:
    """Returns the filter for `machine` (default: this one). Raises OSError for an architecture without a table."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system call table for {machine}, only for {', '.join(_MACHINES)}")
    column, architecture = _MACHINES[machine]
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        _refuse(errno.ENOSYS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32_BIT),
        _refuse(errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        lines += [(_EQUAL, 0, 1, numbers[column]), _refuse(errno.EPERM)]
    for name, value in _ONE_PROCESS.items():
        lines += [
            (_EQUAL, 0, 4, _REFUSED_FOR_PID_1[name][column]),
            (_LOAD, 0, 0, _ARGUMENTS),
            (_EQUAL, 1, 0, value),
            _refuse(errno.EPERM),
            (_LOAD, 0, 0, _NUMBER),
        ]
    for row in _REFUSED_FOR_PID_1.values():
        number, argument = row[column], row[2]
        lines += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
            (_EQUAL, 0, 1, 1),
            _refuse(errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    lines += [(_EQUAL, 0, len(_COMMANDS) + 3, _FCNTL[column]), (_LOAD, 0, 0, _ARGUMENTS + 8)]
    lines += [(_EQUAL, len(_COMMANDS) - i, 0, command) for i, command in enumerate(_COMMANDS)]
    lines += [(_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)]
    lines += [
        (_EQUAL, 0, 4, _PRCTL[column]),
        (_LOAD, 0, 0, _ARGUMENTS),
        (_EQUAL, 0, 1, _SET_SECCOMP),
        _refuse(errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, len(_FILTERS) + 5, _SETSOCKOPT[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 8),
        (_EQUAL, 0, len(_FILTERS) + 1, _SOL_SOCKET),
        (_LOAD, 0, 0, _ARGUMENTS + 16),
    ]
    lines += [(_EQUAL, len(_FILTERS) - i, 0, option) for i, option in enumerate(_FILTERS)]
    lines += [(_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)]
    lines += [(_EQUAL, 0, len(_FAMILIES) + 2, _SOCKET[column]), (_LOAD, 0, 0, _ARGUMENTS)]
    lines += [(_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)]
    lines += [_refuse(errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
