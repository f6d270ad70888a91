"""SentencePiece models with this package's control symbols, which mark who speaks; one model is built in."""

import re
import shutil
from pathlib import Path

import sentencepiece

from echo_jax.tokenizer.base import TokenizerError

DEFAULT_MODEL = Path(__file__).with_name("small.model")
CONTROL_SYMBOLS = ("<|task|>", "<|assistant|>", "<|tool|>", "<|note|>", "<|end|>")

# SentencePiece writes a space as U+2581, so a literal U+2581 is encoded as bytes; so are bytes that are not UTF-8.
_AS_BYTES = re.compile("([\u2581\ud800-\udfff]+)")


class SentencePieces:
    """A SentencePiece model built as experiments/tokenizer/train.py does (identity normalisation, byte fallback)."""

    def __init__(self, path: str | Path = ""):
        self.path = path = Path(path) if path else DEFAULT_MODEL
        if not path.is_file():
            raise TokenizerError(
                f"no tokenizer model at {path}; leave config.tokenizer.path empty for the built-in one"
            )
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._pieces.vocab_size()
        names = [self._pieces.id_to_piece(i) for i in range(self.vocab_size)]
        self.vocabulary = {name: i for i, name in enumerate(names)}
        bytes_and_roles = {
            name for i, name in enumerate(names) if self._pieces.is_byte(i) or self._pieces.is_control(i)
        }
        needed = (*CONTROL_SYMBOLS, *(f"<0x{b:02X}>" for b in range(256)))
        missing = [name for name in needed if name not in bytes_and_roles]
        if missing:
            raise TokenizerError(
                f"{path} lacks the control symbols or byte pieces {missing[:8]}; build it with "
                "experiments/tokenizer/train.py"
            )
        self._byte_id = [names.index(f"<0x{b:02X}>") for b in range(256)]
        self._bytes = [
            bytes([int(name[3:5], 16)]) if self._pieces.is_byte(i) else name.replace("\u2581", " ").encode()
            for i, name in enumerate(names)
        ]
        self.pad = self._pieces.pad_id()
        self.task, self.assistant, self.tool, self.note, self.end = (names.index(s) for s in CONTROL_SYMBOLS)
        probe = " a  b\t\n\n\0\u2581\ufb01\U0001f9ff\udcff " + "".join(CONTROL_SYMBOLS)
        if (back := self.decode(self.encode(probe))) != probe:
            raise TokenizerError(
                f"{path} is lossy: {probe!r} comes back as {back!r}; build it with experiments/tokenizer/train.py"
            )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; control symbols spelled out in it become plain pieces."""
        ids = []
        for i, part in enumerate(_AS_BYTES.split(text)):
            if i % 2:
                ids += [self._byte_id[b] for b in part.encode("utf-8", "surrogateescape")]
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids) -> str:
        """Returns the text of `ids`: `decode(encode(text)) == text`. Control symbols appear by name."""
        return b"".join(self._bytes[i] for i in ids if i < self.vocab_size).decode("utf-8", "surrogateescape")

    def save(self, folder: Path) -> None:
        """Writes the model under the name that published models use."""
        shutil.copyfile(self.path, folder / "tokenizer.model")
