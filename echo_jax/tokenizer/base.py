"""What every tokenizer does: text to token ids and back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from echo_jax.system.errors import UserError


class TokenizerError(UserError, ValueError):
    """The tokenizer's files cannot serve: missing, damaged, or lossy."""


class Tokenizer(Protocol):
    """Text is str, where bytes that are not UTF-8 stand as surrogate escapes."""

    vocab_size: int
    vocabulary: dict[str, int]  # name -> id
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; what spells a control symbol in it becomes plain pieces."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids: control symbols by name; nothing for an id that is no piece, as one
        of an embedding with more rows than pieces."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the files that a published model has of its tokenizer."""
        ...
