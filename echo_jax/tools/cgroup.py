"""Memory and process limits for a whole sandbox, by control groups where the host allows them.

Version 2 needs a delegated, writable group (root, or `systemd-run --user --scope`); version 1 needs root. Elsewhere
only per-process limits apply, see `sandbox.py`. Each folder's name contains the pid of its owner, so that the leftovers
of a killed process can be recognised and removed.
"""

import errno
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "echo_jax_sandbox"
_counter = itertools.count()
REMOVE_SECONDS = 1.0
_left: list[Path] = []  # folders that could not be removed when their processes had ended


class Cgroup:
    """The folders of one sandbox: one in version 2, one per controller in version 1."""

    def __init__(self, version: int, parents: tuple[Path, ...], *, memory_bytes: int, processes: int):
        """Raises OSError where the host does not allow it, and then leaves nothing behind."""
        for folder in list(_left):
            if _removed(folder) and folder in _left:  # another thread may have been first
                _left.remove(folder)
        name = f"{_PREFIX}-{os.getpid()}-{next(_counter)}"
        self.folders = [parent / name for parent in dict.fromkeys(parents)]
        try:
            for folder in self.folders:
                folder.mkdir()
            if version == 2:
                self._write("memory.max", memory_bytes)
                self._write("memory.swap.max", 0, optional=True)
            else:
                self._write("memory.limit_in_bytes", memory_bytes)
                self._write("memory.memsw.limit_in_bytes", memory_bytes, optional=True)
                # Version 1 counts the buffers of network sockets apart.
                self._write("memory.kmem.tcp.limit_in_bytes", memory_bytes // 8, optional=True)
            self._write("pids.max", processes)
            self._events = self._find("memory.events" if version == 2 else "memory.oom_control")
            self._refusals = next((f / "pids.events" for f in self.folders if (f / "pids.events").exists()), None)
        except OSError:
            self.remove()
            raise

    def _find(self, name: str) -> Path:
        for folder in self.folders:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(errno.ENOENT, "the controller is not enabled", str(self.folders[0] / name))

    def _write(self, name: str, value: int, optional: bool = False) -> None:
        if not optional or any((folder / name).exists() for folder in self.folders):
            _put(self._find(name), value)

    def add(self, pid: int) -> None:
        for folder in self.folders:
            _put(folder / "cgroup.procs", pid)

    def oom_kills(self) -> int:
        """Returns how many processes of the group the kernel's OOM killer has ended."""
        found = re.search(rb"^oom_kill (\d+)$", _read(self._events), re.MULTILINE)
        return int(found[1]) if found else 0

    def refused_forks(self) -> int:
        """Returns how many forks the limit has refused; 0 where the kernel does not count them."""
        if self._refusals is None:
            return 0
        return int(_read(self._refusals).split()[1])  # "max 3"

    def remove(self) -> None:
        """Removes the folders. Call it once the processes have ended; the kernel may take a moment to notice. One that
        it does not let go is tried again when the next group is made."""
        for folder in self.folders:
            deadline = time.monotonic() + REMOVE_SECONDS
            while not _removed(folder):
                if time.monotonic() > deadline:
                    _left.append(folder)
                    break
                time.sleep(0.01)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _read(path: Path) -> bytes:
    """Returns a small file; in half the time of `read_bytes`: the counters are read after every call."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _put(path: Path, value: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % value)
    finally:
        os.close(fd)


def choices(process: Path = Path("/proc/self")) -> Iterator[tuple[int, tuple[Path, ...]]]:
    """Yields (version, parent folders) that may work, the strictest first. Only using one shows whether it works."""
    if not (process / "cgroup").exists():
        return
    mounts = _mounts(process / "mountinfo")
    groups = dict(_groups(process / "cgroup"))
    if "" in mounts and "" in groups:
        group = _below(mounts[""], groups[""])
        # This process's group contains a process. Below the root, such a group may not enable controllers for its
        # children; a sibling may. We must be able to write to its parent too, or moving a process there fails.
        for parent in (group, group.parent):
            control = parent / "cgroup.subtree_control"
            if control.exists() and {"memory", "pids"} <= set(control.read_text(encoding="utf-8").split()):
                yield 2, (parent,)
    if all(name in mounts and name in groups for name in ("memory", "pids")):
        yield 1, tuple(_below(mounts[name], groups[name]) for name in ("memory", "pids"))


def sweep(parents: tuple[Path, ...]) -> None:
    """Removes folders whose owner no longer runs. A folder that still has processes stays until the next sweep."""
    for parent in parents:
        for folder in parent.glob(f"{_PREFIX}-*"):
            owner = folder.name.split("-")[1]
            if not Path("/proc", owner).exists():
                try:
                    folder.rmdir()
                except OSError:
                    continue


def _lines(table: Path) -> list[str]:
    """Returns the lines of a table that holds paths, of which a user's disk may have one that is not UTF-8."""
    return os.fsdecode(table.read_bytes()).split("\n")[:-1]


def _mounts(table: Path) -> dict[str, tuple[str, Path]]:
    """Returns controller ("" for version 2) -> (root of the mount within its hierarchy, mount point)."""
    found: dict[str, tuple[str, Path]] = {}
    for line in _lines(table):
        fields, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        root, target = fields.split(" ")[3:5]
        if kind == "cgroup2":
            found.setdefault("", (root, Path(target)))
        elif kind == "cgroup":
            for controller in options.split(","):
                found.setdefault(controller, (root, Path(target)))
    return found


def _groups(table: Path) -> Iterator[tuple[str, str]]:
    """Yields (controller, group of this process)."""
    for line in _lines(table):
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _below(mount: tuple[str, Path], group: str) -> Path:
    """Returns the folder of `group`, or the mount point where a container shows only part of the hierarchy."""
    root, target = mount
    inside = os.path.relpath(group, root)
    return target if inside.startswith("..") else target / inside
