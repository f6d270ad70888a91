"""Text to token ids and back: any bytes a tool writes survive the round trip; no text becomes a control symbol.

In: str, in which bytes that are not UTF-8 are surrogate escapes (`bytes.decode("utf-8", "surrogateescape")`).
Out: ids. `load` opens a SentencePiece model or the tokenizer of a published model.
"""

from collections.abc import Mapping
from pathlib import Path

from echo_jax.system import paths
from echo_jax.tokenizer.base import Tokenizer, TokenizerError
from echo_jax.tokenizer.bpe import BytePairs, ends_of, gguf_vocabulary
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
      TokenizerError: it is missing or unusable.
    """
    path = Path(paths.expanded(path)) if path else DEFAULT_MODEL
    if path.suffix == ".gguf":
        return BytePairs.of_gguf(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        raise TokenizerError(f"{path}: a published tokenizer must be named tokenizer.json; give that or its folder")
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
        return BytePairs.of_folder(path.parent if path.suffix == ".json" else path)
    if path.is_dir() and not (path / "tokenizer.model").is_file():
        raise TokenizerError(
            f"{path} has neither tokenizer.json nor tokenizer.model; set config.tokenizer.path to a tokenizer"
        )
    return SentencePieces(path / "tokenizer.model" if path.is_dir() else path)


def find(path: str | Path, weights: str | Path = "") -> SentencePieces | BytePairs:
    """Returns the tokenizer of `path` or, if `path` is empty, the one published with `weights`.

    Raises:
      TokenizerError: it is unusable, or its vocabulary differs from that of the weights' tokenizer.
    """
    if not path:
        return load(weights)
    tokenizer = load(path)
    if weights and (theirs := vocabulary(weights)) and (difference := differing(tokenizer.vocabulary, theirs)):
        raise TokenizerError(f"{path} has a different vocabulary from the tokenizer of {weights}: {difference}")
    if weights and isinstance(tokenizer, BytePairs) and not tokenizer.ends:
        tokenizer.ends = ends_of(Path(paths.expanded(weights)))
    return tokenizer


def vocabulary(path: str | Path) -> dict[str, int]:
    """Returns name -> id of the tokenizer published with weights, even if `load` refuses it in a `.gguf` file; empty if
    the weights have no tokenizer.

    Raises:
      TokenizerError: one of its files is damaged.
    """
    path = Path(paths.expanded(path))
    if path.suffix == ".gguf":
        return gguf_vocabulary(path)
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load(path).vocabulary if has_tokenizer else {}


def differing(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Describes the first difference between two vocabularies; "" if there is none."""
    different = ours.items() ^ theirs.items()
    if not different:
        return ""
    name = min(different, key=lambda pair: pair[1])[0]
    return f"{name!r} is {ours.get(name, 'unknown')} in one and {theirs.get(name, 'unknown')} in the other"
