"""Text to token ids and back: any bytes a tool writes come back, and no text passes for a control symbol.

In: str, where bytes that are not UTF-8 stand as surrogate escapes (`bytes.decode("utf-8", "surrogateescape")`).
Out: ids. `load` takes what a user names: a SentencePiece model, or the tokenizer of a published model.
"""

from collections.abc import Mapping
from pathlib import Path

from echo_jax.tokenizer.base import Tokenizer, TokenizerError
from echo_jax.tokenizer.bpe import BytePairs, gguf_vocabulary
from echo_jax.tokenizer.pieces import CONTROL_SYMBOLS, DEFAULT_MODEL, SentencePieces

__all__ = [
    "CONTROL_SYMBOLS",
    "DEFAULT_MODEL",
    "BytePairs",
    "SentencePieces",
    "Tokenizer",
    "TokenizerError",
    "differing",
    "find",
    "load",
    "vocabulary",
]


def load(path: str | Path = "") -> SentencePieces | BytePairs:
    """Returns the tokenizer of a SentencePiece `.model`, of a `.gguf` file, or of a folder with a tokenizer.json or a
    tokenizer.model; the built-in one for an empty path.

    Raises:
      TokenizerError: there is none, or it cannot serve.
    """
    path = Path(path) if path else DEFAULT_MODEL
    if path.suffix == ".gguf":
        return BytePairs.of_gguf(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        raise TokenizerError(f"{path}: a published tokenizer is named tokenizer.json; name it, or its folder")
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
        return BytePairs.of_folder(path.parent if path.suffix == ".json" else path)
    if path.is_dir() and not (path / "tokenizer.model").is_file():
        raise TokenizerError(
            f"{path} has no tokenizer.json and no tokenizer.model; name a tokenizer in config.tokenizer.path"
        )
    return SentencePieces(path / "tokenizer.model" if path.is_dir() else path)


def find(path: str | Path, weights: str | Path = "") -> SentencePieces | BytePairs:
    """Returns the tokenizer of `path` or, if that is empty, the one that comes with published `weights`.

    Raises:
      TokenizerError: it cannot serve, or its vocabulary is not that of the weights' own tokenizer.
    """
    if not path:
        return load(weights)
    tokenizer = load(path)
    if weights and (theirs := vocabulary(weights)) and (difference := differing(tokenizer.vocabulary, theirs)):
        raise TokenizerError(f"{path} is of another vocabulary than the tokenizer of {weights}: {difference}")
    return tokenizer


def vocabulary(path: str | Path) -> dict[str, int]:
    """Returns name -> id of the tokenizer that comes with published weights, even of one that `load` refuses in a
    `.gguf` file; empty if none comes with them.

    Raises:
      TokenizerError: a file of it is damaged.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_vocabulary(path)
    comes_along = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load(path).vocabulary if comes_along else {}


def differing(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Returns the first difference of two vocabularies in words; "" if there is none."""
    odd = ours.items() ^ theirs.items()
    if not odd:
        return ""
    name = min(odd, key=lambda pair: pair[1])[0]
    return f"{name!r} is {ours.get(name, 'unknown')} in one and {theirs.get(name, 'unknown')} in the other"
