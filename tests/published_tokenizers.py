"""Small byte-level BPE tokenizers in the files of published models, with their special tokens and word splitting."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "The tool wrote: exit status 2, no such file or directory. Count the lines of notes/plan.txt, submit the answer. "
    "def add(a, b):\n    return a + b\n\nuser assistant system tool response call name arguments parameters command\n"
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# kind -> (special tokens, added tokens that decode as text, end of a turn)
KINDS = {
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
        "<|im_end|>",
    ),
    "llama_3": (
        [
            f"<|{name}|>"
            for name in ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id"]
        ],
        [],
        "<|eot_id|>",
    ),
}


def write(folder: Path, kind: str, *, template: str = CHATML) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; returns the folder."""
    special, plain, end = KINDS[kind]
    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": end, "pad_token": special[0], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def edit(folder: Path, change) -> Path:
    """Changes the tokenizer.json of a folder."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return folder
