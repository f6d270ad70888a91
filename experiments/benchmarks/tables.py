"""How the benchmarks show their tables."""

from collections.abc import Iterable
from pathlib import Path


def emit(lines: Iterable[str], path: str | None) -> None:
    """Prints lines as they come and, unless `path` is None, writes them there at the end."""
    emitted = []
    for line in lines:
        print(line, flush=True)
        emitted.append(line)
    if path is not None:
        Path(path).write_text("\n".join(emitted).rstrip() + "\n", encoding="utf-8")
