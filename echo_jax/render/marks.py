"""Marks in a text that say who wrote which stretch of it, for templates that know nothing of roles.

In: the parts of a message. Out: one text with private-use characters at its seams, which a template carries along; then
ids encoded in one pass without the marks, each stamped with its writer. What is between marks is a body: whatever it
spells, it gives no added token.
"""

from collections.abc import Iterable

from echo_jax.render.base import Part
from echo_jax.roles import Role
from echo_jax.tokenizer import BytePairs

_FIRST, _LAST = 0xF0000, 0xFFFF0  # Supplementary Private Use Area-A: no JSON writer escapes it
_CLOSE = len(Role)  # a body ends


class Stamped(int):
    """A token id that knows who wrote it. `None`: the template."""

    role: Role | None

    def __new__(cls, value: int, role: Role | None):
        self = super().__new__(cls, value)
        self.role = role
        return self


class Marks:
    """Marks that occur in none of the given texts."""

    def __init__(self, texts: Iterable[str]):
        taken = {ord(character) for text in texts for character in text if ord(character) >= _FIRST}
        self._base = next(
            base for base in range(_FIRST, _LAST, _CLOSE + 1) if taken.isdisjoint(range(base, base + _CLOSE + 1))
        )

    def body(self, parts: Iterable[Part]) -> str:
        """Returns the parts of a message as one marked text."""
        marked = "".join(chr(self._base + part.role) + part.text for part in parts)
        return marked + chr(self._base + _CLOSE)

    def end_of(self, marked: str) -> int:
        """Returns where the last body of a text has ended."""
        return marked.rindex(chr(self._base + _CLOSE)) + 1

    def encode(self, tokenizer: BytePairs, marked: str) -> tuple[list[Stamped], list[int]]:
        """Returns stamped ids, and where each begins in the marked text."""
        spans: list[tuple[str, Role | None]] = []
        writer: Role | None = None
        where: list[int] = []  # of each character that is no mark
        start = 0
        for i, character in enumerate(marked):
            mark = ord(character) - self._base
            if 0 <= mark <= _CLOSE:
                spans.append((marked[start:i], writer))
                writer, start = (None if mark == _CLOSE else Role(mark)), i + 1
            else:
                where.append(i)
        spans.append((marked[start:], writer))
        writers = [own for text, own in spans for _ in text]
        tokens = tokenizer.encode_spans([(text, own is None) for text, own in spans])
        ids = [Stamped(token.id, writers[token.start]) for token in tokens]
        return ids, [where[token.start] for token in tokens]
