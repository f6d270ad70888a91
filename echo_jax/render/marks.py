"""Marks in a text that show who wrote each part of it, for templates that do not track roles.

In: the parts of a message. Out: one text with private-use characters between the parts, which a template copies; then
ids, encoded in one pass without the marks, each stamped with its writer. Text after a part's mark never encodes to an
added token, whatever it spells.
"""

import itertools
import re
from collections.abc import Iterable

from echo_jax.render.base import Part
from echo_jax.roles import Role
from echo_jax.tokenizer import BytePairs

# Planes without characters of any language, private-use ones first: JSON writers do not escape them, and no Unicode
# normal form changes them. A text that contains all of them has a megabyte.
_PLANES = (range(0xF0000, 0x110000), range(0x40000, 0xE0000))


class Stamped(int):
    """A token id with its writer. `None`: the template."""

    role: Role | None

    def __new__(cls, value: int, role: Role | None):
        self = super().__new__(cls, value)
        self.role = role
        return self


class Marks:
    """Marks that do not occur in the given texts."""

    def __init__(self, texts: Iterable[str]):
        taken = set().union(*texts)
        free = (mark for mark in map(chr, itertools.chain(*_PLANES)) if mark not in taken)
        self._of = dict(zip(Role, free, strict=False))
        self._close = next(free)  # ends a body
        self._writer: dict[str, Role | None] = {mark: role for role, mark in self._of.items()} | {self._close: None}
        self._split = re.compile(f"[{''.join(self._writer)}]")

    def body(self, parts: Iterable[Part]) -> str:
        """Returns the parts of a message as one marked text."""
        return "".join(self._of[part.role] + part.text for part in parts) + self._close

    def of(self, text: str) -> str:
        """Returns the marks of a text, in order. If a template changes them, it has cut a message."""
        return "".join(character for character in text if character in self._writer)

    def fill(self, text: str, marked: str) -> str:
        """Inserts the text after each mark of `marked` after the same mark of `text`, whose messages hold only
        marks."""
        written = self._split.split(marked)[1:]
        around = self._split.split(text)
        return around[0] + "".join(map("".join, zip(self.of(text), written, around[1:], strict=True)))

    def encode(self, tokenizer: BytePairs, marked: str) -> tuple[list[Stamped], list[int]]:
        """Returns stamped ids, and the start of each in the marked text."""
        spans: list[tuple[str, Role | None]] = []
        writer: Role | None = None
        where: list[int] = []  # position of each character that is not a mark
        start = 0
        for i, character in enumerate(marked):
            if character in self._writer:
                spans.append((marked[start:i], writer))
                writer, start = self._writer[character], i + 1
            else:
                where.append(i)
        spans.append((marked[start:], writer))
        writers = [role for text, role in spans for _ in text]
        tokens = tokenizer.encode_spans([(text, role is None) for text, role in spans])
        ids = [Stamped(token.id, writers[token.start]) for token in tokens]
        return ids, [where[token.start] for token in tokens]
