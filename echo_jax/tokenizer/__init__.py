"""Text to token ids and back: any bytes a tool writes come back, and no text passes for a control symbol.

In: str, where bytes that are not UTF-8 stand as surrogate escapes (`bytes.decode("utf-8", "surrogateescape")`).
Out: ids. `load` takes what a user names: a SentencePiece model, or the tokenizer of a published model.
"""

from pathlib import Path

from echo_jax.tokenizer.base import Tokenizer, TokenizerError
from echo_jax.tokenizer.bpe import BytePairs
from echo_jax.tokenizer.pieces import CONTROL_SYMBOLS, DEFAULT_MODEL, SentencePieces

__all__ = ["CONTROL_SYMBOLS", "DEFAULT_MODEL", "BytePairs", "SentencePieces", "Tokenizer", "TokenizerError", "load"]


def load(path: str | Path = "") -> SentencePieces | BytePairs:
    """Returns the tokenizer of a SentencePiece `.model`, of a `.gguf` file, or of a folder with a tokenizer.json; the
    built-in one for an empty path.

    Raises:
      TokenizerError: there is none, or it cannot serve.
    """
    path = Path(path) if path else DEFAULT_MODEL
    if path.suffix == ".gguf":
        return BytePairs.of_gguf(path)
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
        return BytePairs.of_folder(path.parent if path.suffix == ".json" else path)
    return SentencePieces(path)
