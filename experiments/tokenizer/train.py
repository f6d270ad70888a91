"""Trains the tokenizer that ships with the package: `python experiments/tokenizer/train.py --output=FILE`.

It is small on purpose (its embedding should not dwarf a tiny model) and lossless: identity normalisation, byte
fallback, no dummy prefix, roles as control symbols. The corpus is the words and commands of the built-in tasks, then
shell and Python text.
"""

import email
import io
import shlex
import shutil
import subprocess
import tarfile
import textwrap
from pathlib import Path

import sentencepiece
from absl import app, flags

from echo_jax.tasks.lookup import TEMPLATES
from echo_jax.tasks.rooms import EXITS, move
from echo_jax.tasks.words import WORDS
from echo_jax.tokenizer import CONTROL_SYMBOLS, DEFAULT_MODEL

OUTPUT = flags.DEFINE_string("output", str(DEFAULT_MODEL), "the model file to write")
VOCAB = flags.DEFINE_integer("vocab", 1280, "number of pieces, of which 256 are bytes")


def corpus():
    """Yields lines. Every word appears often enough, with and without a space before it, to become a piece."""
    for _ in range(1000):
        for word in WORDS:
            yield word
            yield f" {word}"
    for _ in range(2000):
        for prompt, command in TEMPLATES.values():
            yield prompt.format(key="", path="")
            yield "bash " + command.format(key="", path="")
        for name in EXITS:
            yield move(name)
        yield from (
            "submit",
            "submit .",
            "bash ls",
            "room to room",
            "./ . /",
            "lines in",
            "first value in",
            "last value in",
        )
        yield from ("exit", "timeout", "bytes dropped", "unknown tool", "no such file or directory", "Is a directory")
        yield from ("grep: ", "head: cannot open", "wc: ", "bash: line", "for reading")
    for module in (email, io, shlex, shutil, subprocess, tarfile, textwrap):
        yield from Path(module.__file__).read_text(encoding="utf-8").splitlines()


def main(_):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB.value,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=list(CONTROL_SYMBOLS),
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        minloglevel=1,
    )
    Path(OUTPUT.value).write_bytes(model.getvalue())
    print(f"{OUTPUT.value}: {VOCAB.value} pieces, {len(model.getvalue()):,} bytes")


if __name__ == "__main__":
    app.run(main)
