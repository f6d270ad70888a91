"""The byte-level BPE of published models (Llama 3, Qwen, SmolLM2), through the `tokenizers` package.

In: the files of a published model, or a GGUF file that holds their lists. Out: a tokenizer whose `encode` never returns
an added token such as `<|im_end|>`, and whose `encode_spans` does so only where a template, not a tool, wrote it.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from echo_jax.tokenizer.base import TokenizerError

_SURROGATES = re.compile("([\ud800-\udfff]+)")
# The tokenizer files of a published folder.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# `tokenizer.ggml.pre` of a GGUF file -> how text is split into words before merges
PRE_TOKENIZERS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _split(_GPT2), _BYTES],
    "gpt-2": [_split(_GPT2), _BYTES],
    "qwen2": [_split(_WORDS % r"\p{N}"), _BYTES],
    "llama-bpe": [_split(_WORDS % r"\p{N}{1,3}"), _BYTES],
}


class Token(NamedTuple):
    id: int
    start: int  # index of its first character in the text


class BytePairs:
    """A tokenizer.json with its tokenizer_config.json."""

    ends: tuple[int, ...] = ()  # ids that end a text, as the generation_config.json of its model lists them

    def __init__(self, definition: dict[str, Any], settings: dict[str, Any], origin: Path):
        """
        Args:
          definition: a tokenizer.json.
          settings: a tokenizer_config.json.
          origin: the file that errors name.
        """
        self._definition, self._settings, self._origin = definition, settings, origin
        added = self._added()
        try:
            vocabulary = {n: i for n, i in definition["model"]["vocab"].items() if n not in added}
            self._plain = self._build(vocabulary)
        except BaseException as error:  # `tokenizers` raises no narrower class than Exception, and panics are none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise self._error(f"not a byte-level BPE tokenizer.json: {error}") from error
        self.vocabulary = vocabulary | added
        self.vocab_size = 1 + max(self.vocabulary.values())
        self._bytes = self._byte_table(vocabulary, added)
        self._byte_id = self._byte_ids(vocabulary)
        self._markup = _alternatives(added)
        self._special = frozenset(a["id"] for a in definition["added_tokens"] if a["special"])
        self._added_ids = frozenset(added.values())
        self.template = self._default_template(settings.get("chat_template") or "")
        self.end = self._named("eos_token")
        self.pad = self._named("pad_token", self.end)
        self._check_keeps_text()

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Reads the files of a published model.

        Raises:
          TokenizerError: one is missing or damaged, or the tokenizer is not a byte-level BPE.
        """
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second overrides the first
            if (folder / name).is_file():
                settings |= _json(folder / name)
        if (template := folder / "chat_template.jinja").is_file():
            settings["chat_template"] = _text(template)
        tokenizer = cls(_json(folder / "tokenizer.json"), settings, folder / "tokenizer.json")
        tokenizer._folder = folder
        tokenizer.ends = ends_of(folder)
        return tokenizer

    @classmethod
    def of_gguf(cls, path: Path) -> Self:
        """Rebuilds it from the lists of a GGUF file.

        Raises:
          TokenizerError: the file cannot be read, or the tokenizer is not a byte-level BPE of a known kind.
        """
        fields = _gguf_fields(path)
        get = lambda name, default=None: fields.get(f"tokenizer.ggml.{name}", default)  # noqa: E731
        pre = get("pre")
        if get("model") != "gpt2" or pre not in PRE_TOKENIZERS:
            raise TokenizerError(
                f"{path}: its tokenizer is {get('model')!r} with {pre!r}; supported is 'gpt2' with one of "
                f"{', '.join(PRE_TOKENIZERS)}. Set config.tokenizer.path to a folder with a tokenizer.json"
            )
        vocabulary = _vocabulary_of(fields, path)
        names, kinds = get("tokens"), get("token_type")
        added = [
            {"id": i, "content": name, "special": kind == _CONTROL, "normalized": False} | dict.fromkeys(_FLAGS, False)
            for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        definition = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
            "post_processor": None,
            "decoder": _BYTES,
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": get("merges", []),
                "ignore_merges": pre == "llama-bpe",
            },
        }
        name_of = {str(i): name for name, i in vocabulary.items()}
        token = lambda name: name_of.get(str(get(f"{name}_token_id")))  # noqa: E731
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "pad_token": token("padding"),
            "chat_template": fields.get("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
        }
        tokenizer = cls(definition, {name: value for name, value in settings.items() if value is not None}, path)
        ends = [get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        tokenizer.ends = tuple(end for end in ends if isinstance(end, int))
        return tokenizer

    _folder: Path | None = None

    def encode(self, text: str) -> list[int]:
        return [token.id for token in self.encode_spans([(text, False)])]

    def encode_markup(self, text: str) -> list[int]:
        """Returns the ids of an agent's text: markup such as `<tool_call>` becomes its token; tokens that end a turn or
        change the speaker stay plain text."""
        pieces, end = [], 0
        for match in self._matches(text):
            if self.vocabulary[match.group()] not in self._special:
                pieces += [(text[end : match.start()], False), (match.group(), True)]
                end = match.end()
        return [token.id for token in self.encode_spans([*pieces, (text[end:], False)])]

    def encode_spans(self, spans: Sequence[tuple[str, bool]]) -> list[Token]:
        """Encodes (text, trusted) spans in one pass: merges cross the boundaries between them. An added token is
        recognised where all of its characters are trusted; elsewhere its name is text."""
        text = "".join(part for part, _ in spans)
        trusted = [flag for part, flag in spans for _ in part]
        tokens, end, at = [], 0, 0
        while self._markup and (match := self._markup.search(text, at)):
            if all(trusted[match.start() : match.end()]):
                tokens += self._plainly(text[end : match.start()], end)
                tokens.append(Token(self.vocabulary[match.group()], match.start()))
                at = end = match.end()
            else:  # a trusted one may begin inside
                at = match.start() + 1
        return tokens + self._plainly(text[end:], end)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "surrogateescape")

    def id_of(self, name: str) -> int | None:
        """Returns the id of the token with this name."""
        return self.vocabulary.get(name)

    def name_of(self, field: str) -> str:
        """Returns the name of the token that a field such as `bos_token` sets; "" if there is none."""
        value = self._settings.get(field)
        value = (value.get("content") if isinstance(value, dict) else value) or ""
        if not isinstance(value, str):
            raise self._error(f"{field} = {value!r} is not a token name")
        return value

    def is_added(self, token: int) -> bool:
        return token in self._added_ids

    def starts_with_added(self, text: str) -> str | None:
        """Returns the added token that `text` starts with."""
        match = self._markup.match(text) if self._markup else None
        return match.group() if match else None

    def save(self, folder: Path) -> None:
        if self._folder is not None:
            for name in FILES:
                if (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, folder / name)
            return
        definition = json.dumps(self._definition, ensure_ascii=False)
        settings = json.dumps(self._settings, ensure_ascii=False, indent=2)
        (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    def _plainly(self, text: str, start: int) -> list[Token]:
        """Encodes text without recognising added tokens; bytes that are not UTF-8 become single-byte pieces."""
        tokens = []
        for i, part in enumerate(_SURROGATES.split(text)):
            if i % 2:
                tokens += [
                    Token(self._byte_id[b], start + k)
                    for k, b in enumerate(part.encode("utf-8", "surrogateescape"))
                    if b in self._byte_id
                ]
            elif part:
                found = self._plain.encode(part, add_special_tokens=False)
                pairs = zip(found.ids, found.offsets, strict=True)
                tokens += [Token(token, start + first) for token, (first, _) in pairs]
            start += len(part)
        return tokens

    def _matches(self, text: str) -> Iterable[re.Match]:
        return self._markup.finditer(text) if self._markup else ()

    def _added(self) -> dict[str, int]:
        added = self._definition.get("added_tokens")
        if not isinstance(added, list):
            raise self._error("not a tokenizer.json: it lacks 'added_tokens'")
        for token in added:
            kinds = {"id": int, "content": str, "special": bool} | dict.fromkeys(_FLAGS, bool)
            if not isinstance(token, dict) or any(type(token.get(key)) is not kind for key, kind in kinds.items()):
                raise self._error(f"not a tokenizer.json: it has the added token {str(token)[:200]}")
            if _SURROGATES.search(token["content"]) or token["id"] < 0:
                raise self._error(f"it is damaged: it has the added token {token['content']!r} = {token['id']}")
        if greedy := [token["content"] for token in added if any(token[flag] for flag in _FLAGS)]:
            raise self._error(f"its added tokens {greedy[:4]} set one of {', '.join(_FLAGS)}, which is not supported")
        return {token["content"]: token["id"] for token in added}

    def _default_template(self, template: Any) -> str:
        if isinstance(template, list):  # several, by name
            default = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = default[0].get("template") if default else ""
        if not isinstance(template, str):
            raise self._error(f"its chat_template is {str(template)[:100]}, not text")
        return template

    def _build(self, vocabulary: dict[str, int]):
        """Returns the same tokenizer, but without added tokens, without the tokens it would put around a text, and
        without what the file keeps of its last use in a batch or in training."""
        model = self._definition["model"] | {"vocab": vocabulary, "dropout": None}
        plain = self._definition | _NO_STATE | {"added_tokens": [], "post_processor": None, "model": model}
        return _tokenizers().Tokenizer.from_str(json.dumps(plain))

    def _byte_table(self, vocabulary: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
        byte_of = {character: byte for byte, character in _bytes_to_unicode().items()}
        try:
            table = {i: bytes(byte_of[character] for character in name) for name, i in vocabulary.items()}
        except KeyError as error:
            raise self._error(f"not a byte-level BPE: its pieces contain the character {error}") from error
        return table | {i: name.encode() for name, i in added.items()}

    def _byte_ids(self, vocabulary: dict[str, int]) -> dict[int, int]:
        """Returns byte -> its piece. SmolLM2 lacks some, such as 0x04; those bytes vanish, as in `tokenizers`."""
        found = {byte: vocabulary[name] for byte, name in _bytes_to_unicode().items() if name in vocabulary}
        missing = [chr(byte) for byte in range(ord(" "), 0x7F) if byte not in found]
        if missing:
            raise self._error(f"not a byte-level BPE: {''.join(missing)!r} have no pieces")
        return found

    def _check_keeps_text(self) -> None:
        """Raises `TokenizerError` if the file's normalizer or pre-tokenizer drops, adds or changes characters: the
        agent would not read what a tool wrote. Unicode's normal forms, which concern few texts, are left alone."""
        ascii = "".join(map(chr, range(ord(" "), 0x7F)))
        text = f"  {ascii}{ascii.swapcase()}  x\n\t é ☃\n "
        text = "".join(letter for letter in text if all(byte in self._byte_id for byte in letter.encode()))
        found = self.decode(self.encode(text))
        if found != text:
            at = next(i for i in range(len(text) + 1) if found[: i + 1] != text[: i + 1])
            raise self._error(
                f"it changes text, which must stay as it is: {text[at : at + 8]!r} becomes {found[at : at + 8]!r}; "
                "look at its normalizer, its pre_tokenizer and the suffixes of its model"
            )

    def _named(self, field: str, default: int | None = None) -> int:
        name = self.name_of(field)
        if name and name in self.vocabulary:
            return self.vocabulary[name]
        if default is None:
            raise self._error(f"{field} = {name!r} is not in its vocabulary")
        return default

    def _error(self, cause: str) -> TokenizerError:
        return TokenizerError(f"{self._origin}: {cause}")


_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # `tokenizer.ggml.token_type`
_FLAGS = ("lstrip", "rstrip", "single_word")
# A tokenizer.json that was saved after a call with `max_length` or `padding` still has them; transformers ignores both.
_NO_STATE = {"truncation": None, "padding": None}


def _alternatives(added: dict[str, int]) -> re.Pattern | None:
    """Returns the pattern that finds added tokens, the longest at each position. An empty name is never found."""
    names = sorted(filter(None, added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _bytes_to_unicode() -> dict[int, str]:
    """Returns GPT-2's printable stand-in for each byte; byte-level vocabularies are written in them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def ends_of(folder: Path) -> tuple[int, ...]:
    """Returns the ids that end a text of the model in a folder: those of its generation_config.json or, without one,
    of its config.json.

    Raises:
      TokenizerError: the file is damaged.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        ends = _json(path).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            ends = tuple(ends) if isinstance(ends, list) else (ends,)
            if not all(type(end) is int and end >= 0 for end in ends):
                raise TokenizerError(f"{path}: eos_token_id = {ends} must be the id of a token, or a list of ids")
            return ends
    return ()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not text: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    return found


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError("published tokenizers need the package tokenizers: pip install -e '.[hf]'") from error
    return tokenizers


def gguf_vocabulary(path: Path) -> dict[str, int]:
    """Returns name -> id of a GGUF file's tokens, without the unused ones that pad its embedding.

    Raises:
      TokenizerError: the file cannot be read, or has no tokenizer.
    """
    return _vocabulary_of(_gguf_fields(path), path)


def _vocabulary_of(fields: dict[str, Any], path: Path) -> dict[str, int]:
    names, kinds = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if not isinstance(names, list) or not isinstance(kinds, list) or not names or len(names) != len(kinds):
        raise TokenizerError(f"{path} has no tokenizer; set config.tokenizer.path to one")
    return {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind != _UNUSED}


def _gguf_fields(path: Path) -> dict[str, Any]:
    try:
        import gguf
    except ImportError as error:
        raise TokenizerError("a GGUF file needs the package gguf: pip install -e '.[hf]'") from error
    try:
        return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise TokenizerError(f"{path} is damaged: {error}") from error
