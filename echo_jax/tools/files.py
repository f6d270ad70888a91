"""The tools that handle one file below /work, without shell quoting: `read`, `write`, `edit`."""

import posixpath
import time

from echo_jax.tools.sandbox import CommandResult, Sandbox, SandboxError, Status, failure, to_bytes
from echo_jax.tools.supervisor import Capture
from echo_jax.tools.tool import Tool, strings

MAX_BYTES = 1 << 20  # largest file that can be read or edited
MAX_PATH = 1024


class Read(Tool):
    description = "Prints a file."
    parameters = strings("path")

    def run(self, world: Sandbox, arguments) -> CommandResult:
        return _answer(world, lambda: world.read_file(_inner(world, arguments["path"]), limit=MAX_BYTES))


class Write(Tool):
    description = "Writes a file, over what was there; makes the folders on the way."
    parameters = strings("path", "content")

    def run(self, world: Sandbox, arguments) -> CommandResult:
        def write() -> bytes:
            content = to_bytes(arguments["content"])
            world.write_files({_inner(world, arguments["path"]): content})
            return b"%d bytes written\n" % len(content)

        return _answer(world, write)


class Edit(Tool):
    description = "Replaces a text that occurs exactly once in a file."
    parameters = strings("path", "old", "new")

    def run(self, world: Sandbox, arguments) -> CommandResult:
        def edit() -> bytes:
            path, old = _inner(world, arguments["path"]), to_bytes(arguments["old"])
            content = world.read_file(path, limit=MAX_BYTES)
            count = content.count(old) if old else 0
            if count != 1:
                raise ValueError(f"{arguments['path']}: the old text occurs {count} times, not once")
            world.write_files({path: content.replace(old, to_bytes(arguments["new"]))})
            return b"1 place edited\n"

        return _answer(world, edit)


def _answer(world: Sandbox, action) -> CommandResult:
    """Runs an action on files. Its errors become the agent's observation, unless the sandbox itself is dead."""
    start = time.monotonic()
    passed = lambda: {"seconds": time.monotonic() - start, "cwd": world.cwd}  # noqa: E731
    try:
        output = action()
    except (ValueError, SandboxError) as error:
        return failure(error, str(error), world.limits.output_bytes, **passed())
    capture = Capture(world.limits.output_bytes)
    capture.feed(output)
    return CommandResult(Status.OK, 0, *capture.finish(), **passed())


def _inner(world: Sandbox, path: str) -> str:
    """Resolves `path` against the agent's working directory; returns it relative to /work."""
    whole = posixpath.normpath(posixpath.join("/work", world.cwd, path))
    if not whole.startswith("/work/") or len(whole) > MAX_PATH:
        raise ValueError(f"{path[:100]}: not a path of at most {MAX_PATH} letters below /work")
    return whole.removeprefix("/work/")
