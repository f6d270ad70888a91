"""What a sandbox looks like from inside: bwrap's arguments.

`processes.py` starts bwrap with them, once per trainer (a fork server inside) or once per sandbox (a supervisor).
"""

import functools
import importlib.util
import marshal
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echo_jax.tools import seccomp, supervisor

_UID = str(supervisor.AGENT)
_STANDARD_LIBRARY = Path(os.__file__).resolve().parent
_LIBRARY = f"/opt/python/{_STANDARD_LIBRARY.parent.name}"  # lib, or lib64
_PYTHON = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
_PASSWD = b"root:x:0:0:root:/:/usr/sbin/nologin\nagent:x:1000:1000::/work:/bin/bash\n"
_GROUP = b"root:x:0:\nagent:x:1000:\n"
_DEVICES = ("null", "zero", "full", "random", "urandom")


@functools.cache
def _bytecode(name: str) -> bytes:
    """Returns a module as a .pyc: the same interpreter runs inside, and compiling would outlast its start-up."""
    source = Path(__file__).with_name(f"{name}.py")
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

    The fork server needs none: it mounts a /proc that is read-only as a whole, which bwrap cannot, in each sandbox. If
    we are root, the kernel treats the agent as root too (it only sees itself as uid 1000), and such a write needs no
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


@contextmanager
def command(
    bwrap: Path, disk_bytes: int | None, arguments: list[int], mapped: bool = False
) -> Iterator[tuple[list[str], list[int]]]:
    """Yields the command that starts bwrap with its PID 1, and the descriptors that it must inherit.

    PID 1 is the supervisor of one sandbox, with disks of `disk_bytes` and its own `arguments`; or, if `disk_bytes` is
    None, the fork server, which makes the disks of each sandbox.

    Args:
      mapped: bwrap is started as the root of a user namespace that maps more than one user; so the fork server can give
        each sandbox a user of its own.
    """
    files = [
        ("0444", _PASSWD, "/etc/passwd"),
        ("0444", _GROUP, "/etc/group"),
        ("0444", _bytecode("supervisor"), "/run/supervisor.pyc"),
        ("0555", _python_wrapper(), "/opt/python/bin/python3"),
    ]
    if disk_bytes is None:
        files.append(("0444", _bytecode("fork_server"), "/run/fork_server.pyc"))
    descriptors = []
    try:
        for content in (_filter(), *(content for _, content, _ in files)):
            descriptors.append(_memory_file(content))
        mounts = []
        for (mode, _, path), descriptor in zip(files, descriptors[1:], strict=True):
            mounts += ["--perms", mode, "--file", str(descriptor), path]
        isolation = _isolation(descriptors[0], mounts, disk_bytes, mapped)
        yield [str(bwrap), *isolation, *map(str, arguments)], descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _isolation(filter_descriptor: int, files: list[str], disk_bytes: int | None, mapped: bool) -> list[str]:
    if mapped:
        arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        arguments += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"):
            arguments += ["--cap-add", capability]
    else:
        arguments = ["--unshare-all", "--unshare-user", "--cap-drop", "ALL", "--uid", _UID, "--gid", _UID]
    arguments += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--as-pid-1", "--clearenv"]
    arguments += ["--seccomp", str(filter_descriptor)]
    for path in ("/dev", "/etc", "/opt", "/opt/python", "/opt/python/bin", "/run", "/var"):
        arguments += ["--perms", "0755", "--dir", path]
    arguments += [*_system_mounts(), *files, "--proc", "/proc"]
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
    disks = (("1777", "/tmp", disk_bytes), ("0755", "/work", disk_bytes), ("0755", "/run/shell", 1 << 20))
    for mode, path, size in disks:
        arguments += ["--perms", mode]
        arguments += ["--dir", path] if disk_bytes is None else ["--size", str(size), "--tmpfs", path]
    if disk_bytes is None:
        program = "fork_server"
    else:
        program = "supervisor"
        arguments += ["--disable-userns", *_proc_masks()]
    return [*arguments, "--remount-ro", "/", "--chdir", "/work", "--", _PYTHON, "-I", "-S", f"/run/{program}.pyc"]
