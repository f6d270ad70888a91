"""The interface of every tokenizer: text to token ids and back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from echo_jax.system.errors import UserError


class TokenizerError(UserError, ValueError):
    """The tokenizer's files are unusable: missing, damaged, or lossy."""


class Tokenizer(Protocol):
    """Text is str, in which bytes that are not UTF-8 are surrogate escapes."""

    vocab_size: int
    vocabulary: dict[str, int]  # name -> id
    pad: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; a control symbol spelled out in it becomes plain pieces."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids: control symbols by name, nothing for an id without a piece (an embedding
        may have more rows than there are pieces)."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer files of a published model."""
        ...
