"""Names and contents of the files in shell tasks."""

from collections.abc import Iterable, Sequence

import numpy as np

from echo_jax.tasks.procedural import by_level, draw, names, pick

COLUMNS = ("id", "city", "goods", "amount", "price")


def some_paths(rng: np.random.Generator, level: int, suffixes: Sequence[str]) -> tuple[str, list[str]]:
    """Returns a folder and paths below it, flat at level 1, in a tree at higher levels. No two files have the same
    name, and all suffixes are equally frequent."""
    words = names(rng)
    folders = [next(words)]
    for _ in range(by_level(level, 0, 3, 7)):
        folders.append(f"{pick(rng, folders)}/{next(words)}")
    count = by_level(level, 8, 16, 36)
    paths = [f"{pick(rng, folders)}/{next(words)}{suffixes[i % len(suffixes)]}" for i in range(count)]
    return folders[0], draw(rng, paths, count)


def table(rng: np.random.Generator, count: int, cities: Sequence[str], goods: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns rows of `COLUMNS`; no two ids and no two amounts are equal."""
    ids, amounts = sorted(draw(rng, range(100, 999), count)), draw(rng, range(5, 999), count)
    prices = rng.integers(1, 100, count)
    return [
        (str(number), pick(rng, cities), pick(rng, goods), str(amount), str(price))
        for number, amount, price in zip(ids, amounts, prices, strict=True)
    ]


def csv(rows: Iterable[Sequence[str]]) -> bytes:
    return text(",".join(row) for row in [COLUMNS, *rows])


def text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def filler(rng: np.random.Generator, size: int) -> bytes:
    return bytes(rng.integers(ord("a"), ord("z") + 1, size, dtype=np.uint8))
