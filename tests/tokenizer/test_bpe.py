"""Published tokenizers: ids match the real tokenizer's, text never becomes an added token, bytes round-trip."""

import json
import os
import re
import subprocess
import sys
import unicodedata

import gguf_files
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from published_tokenizers import KINDS, edit, write
from tokenizers import Tokenizer as RealTokenizer

from echo_jax import tokenizer as tokenizers
from echo_jax.tokenizer import BytePairs, SentencePieces, TokenizerError
from echo_jax.tokenizer.bpe import _bytes_to_unicode

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
NAMES = sorted({name for special, plain, _ in KINDS.values() for name in special + plain})
awkward = st.sampled_from(
    [*NAMES, "<|im_", "end|>", "<", "\0", "\n", "\r\n", "\t", " ", "  ", "e\u0301", "\u00e9", "\u212b", "\u3000",
     "\U0001f9ff", "12345", "don't", "DON'T", "exit status", "\ufeff", "\U000f0001"]
)  # fmt: skip
texts = st.lists(st.one_of(awkward, st.text(max_size=6)), max_size=10).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Returns (ours, the real one) for each kind."""
    folder = write(tmp_path_factory.mktemp("published") / request.param, request.param)
    return tokenizers.load(folder), RealTokenizer.from_file(str(folder / "tokenizer.json"))


def ids(tokens):
    return [token.id for token in tokens]


@PATIENT
@given(text=texts)
def test_template_text_has_the_ids_of_the_real_tokenizer(pair, text):
    ours, real = pair
    assert ids(ours.encode_spans([(text, True)])) == real.encode(text, add_special_tokens=False).ids


@PATIENT
@given(text=texts)
def test_text_never_becomes_an_added_token(pair, text):
    ours, real = pair
    found = ours.encode(text)
    assert not any(ours.is_added(i) for i in found)
    if not any(name in text for name in NAMES):
        assert found == real.encode(text, add_special_tokens=False).ids


@PATIENT
@given(text=texts)
def test_text_round_trips_up_to_normalization(pair, text):
    ours, real = pair
    once = ours.decode(ours.encode(text))
    assert once == (text if real.normalizer is None else unicodedata.normalize("NFC", text))
    assert ours.decode(ours.encode(once)) == once


@PATIENT
@given(data=st.binary(max_size=10))
@example(data=bytes(range(128, 256)))
@example(data=b"\xed\xb3\xbf")
def test_non_utf8_bytes_round_trip_exactly(pair, data):
    ours, real = pair
    text = data.decode("utf-8", "surrogateescape")
    if real.normalizer is None or unicodedata.is_normalized("NFC", text):
        assert ours.decode(ours.encode(text)).encode("utf-8", "surrogateescape") == data


@PATIENT
@given(data=st.data())
def test_any_sampled_ids_decode_to_text(pair, data):
    ours, _ = pair
    sampled = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    text = ours.decode(sampled)
    assert isinstance(text, str)
    for name in NAMES:
        if ours.id_of(name) in sampled:
            assert name in text


@PATIENT
@given(spans=st.lists(st.tuples(texts, st.booleans()), max_size=5))
@example(spans=[("<|im_", True), ("end|>", False)])
@example(spans=[("<|im_", True), ("end|>", True)])
@example(spans=[("exit sta", True), ("tus", False)])
def test_only_trusted_spans_contain_added_tokens(pair, spans):
    ours, _ = pair
    text = "".join(part for part, _ in spans)
    trusted = [flag for part, flag in spans for _ in part]
    tokens = ours.encode_spans(spans)
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)
    for token in tokens:
        if ours.is_added(token.id):
            name = ours.decode([token.id])
            assert text[token.start :].startswith(name)
            assert all(trusted[token.start : token.start + len(name)])
    if not any(trusted):
        assert ids(tokens) == ours.encode(text)
    if all(trusted):
        assert ids(tokens) == ids(ours.encode_spans([(text, True)]))


def test_trusted_token_is_found_after_a_half_trusted_one(tmp_path):
    def change(definition):
        last = definition["added_tokens"][-1]
        definition["added_tokens"].append(last | {"id": last["id"] + 1, "content": "x<|im"})

    ours = tokenizers.load(edit(write(tmp_path / "t", "chatml"), change))
    tokens = ours.encode_spans([("x", False), ("<|im_end|>", True)])
    assert ids(tokens) == [*ours.encode("x"), ours.id_of("<|im_end|>")]


def test_merges_cross_span_boundaries(pair):
    ours, _ = pair
    whole = ours.encode("exit status")
    assert ids(ours.encode_spans([("exit st", True), ("atus", False)])) == whole
    assert len(whole) < len(ours.encode("exit st")) + len(ours.encode("atus"))


def test_added_token_inside_a_longer_one_is_not_matched(tmp_path):
    """At each position the longest added token wins."""

    def change(definition):
        last = definition["added_tokens"][-1]
        definition["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<|im_end|>x"})

    folder = edit(write(tmp_path / "t", "chatml"), change)
    ours, real = tokenizers.load(folder), RealTokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a<|im_end|>xb<|im_end|>c"
    assert ids(ours.encode_spans([(text, True)])) == real.encode(text, add_special_tokens=False).ids


def test_an_agents_markup_becomes_tokens_but_never_an_end_of_turn(tmp_path):
    ours = tokenizers.load(write(tmp_path / "t", "qwen3"))
    found = ours.encode_markup('<tool_call>\n{"a": "<|im_end|>"}\n</tool_call>')
    assert found[0] == ours.id_of("<tool_call>")
    assert found[-1] == ours.id_of("</tool_call>")
    assert ours.id_of("<|im_end|>") not in found
    assert ours.decode(found) == '<tool_call>\n{"a": "<|im_end|>"}\n</tool_call>'


def test_path_decides_the_kind_of_tokenizer(tmp_path):
    folder = write(tmp_path / "t", "chatml")
    assert isinstance(tokenizers.load(folder), BytePairs)
    assert isinstance(tokenizers.load(folder / "tokenizer.json"), BytePairs)
    assert isinstance(tokenizers.load(), SentencePieces)
    with pytest.raises(TokenizerError, match="no tokenizer model at .*none"):
        tokenizers.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty has neither tokenizer\.json nor tokenizer\.model"):
        tokenizers.load(tmp_path / "empty")
    assert tokenizers.vocabulary(tmp_path / "empty") == {}
    tokenizers.load().save(tmp_path / "empty")
    assert isinstance(tokenizers.load(tmp_path / "empty"), SentencePieces)
    assert tokenizers.vocabulary(tmp_path / "empty") == tokenizers.load().vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same(tmp_path, kind):
    ours = tokenizers.load(write(tmp_path / "t", kind))
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    copy = tokenizers.load(tmp_path / "copy")
    assert copy.vocabulary == ours.vocabulary
    assert (copy.template, copy.end, copy.pad) == (ours.template, ours.end, ours.pad)


def test_different_vocabulary_is_reported_by_its_first_difference(tmp_path):
    ours, other = (tokenizers.load(write(tmp_path / kind, kind)) for kind in ("chatml", "llama_3"))
    found = tokenizers.differing(ours.vocabulary, other.vocabulary)
    assert re.fullmatch(r"'<\|.*\|>' is (\d+|unknown) in one and (\d+|unknown) in the other", found)
    assert tokenizers.differing(ours.vocabulary, dict(ours.vocabulary)) == ""


def test_special_tokens_and_templates_are_found_in_every_published_layout(tmp_path):
    folder = write(tmp_path / "t", "chatml")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    mapped = {"eos_token": {"content": config.pop("eos_token")}, "bos_token": "<|im_start|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(mapped))
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": config["chat_template"]}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": None, "bos_token": "<|endoftext|>", "chat_template": several})
    )
    ours = tokenizers.load(folder)
    assert ours.name_of("bos_token") == "<|endoftext|>"  # tokenizer_config.json overrides the map
    assert ours.end == ours.pad == ours.id_of("<|im_end|>")
    assert ours.template == config["chat_template"]


def test_template_in_a_separate_file_is_used(tmp_path):
    folder = write(tmp_path / "t", "chatml")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizers.load(folder).template == "{{ messages }}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["added_tokens"][0].update(lstrip=True), r"\['<\|endoftext\|>'\] set one of lstrip, rstrip"),
        (lambda d: d["model"].update(type="Unigram"), "not a byte-level BPE tokenizer.json"),
        (lambda d: d.pop("added_tokens"), "lacks 'added_tokens'"),
        (lambda d: d["added_tokens"][0].update(id="5"), r"has the added token \{'id': '5'"),
        (lambda d: d["added_tokens"][0].update(content=5), "has the added token"),
        (lambda d: d["added_tokens"][0].update(content="\ud800"), "it is damaged: it has the added token"),
        (lambda d: d["added_tokens"][0].pop("special"), "has the added token"),
        (lambda d: d["added_tokens"].append(7), "has the added token 7"),
        (lambda d: d.pop("model"), "not a byte-level BPE tokenizer.json"),
        (lambda d: d["model"]["vocab"].update({"\u2581the": 490}), "its pieces contain the character '\u2581'"),
        (lambda d: (d["model"]["vocab"].pop("Q"), d["model"].update(merges=[])), "'Q' have no pieces"),
    ],
    ids=["takes spaces in", "unigram", "no added tokens", "id", "content", "surrogate", "no kind", "number",
         "no model", "SentencePiece", "no Q"],
)  # fmt: skip
def test_unusable_tokenizer_is_refused_and_its_file_named(tmp_path, change, message):
    folder = edit(write(tmp_path / "t", "chatml"), change)
    with pytest.raises(TokenizerError, match=message) as raised:
        tokenizers.load(folder)
    assert str(folder / "tokenizer.json") in str(raised.value)


def test_gguf_file_yields_the_same_tokenizer(tmp_path):
    folder = write(tmp_path / "t", "qwen3")
    ours, definition = tokenizers.load(folder), json.loads((folder / "tokenizer.json").read_text())
    found = tokenizers.load(gguf_files.write_tokenizer(tmp_path / "x.gguf", ours, definition, pre="qwen2", unused=7))
    assert (found.vocabulary, found.vocab_size) == (ours.vocabulary, ours.vocab_size)
    assert (found.template, found.end) == (ours.template, ours.end)
    assert (found.name_of("bos_token"), found.pad) == ("<|im_start|>", ours.pad)
    text = "e\u0301 <tool_call>exit status 2<|im_end|> DON'T 12345\r\n \U0001f9ff"
    assert ids(found.encode_spans([(text, True)])) == ids(ours.encode_spans([(text, True)]))
    assert found.encode_markup(text) == ours.encode_markup(text)
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy")
    assert tokenizers.load(tmp_path / "copy").encode_markup(text) == ours.encode_markup(text)


def test_llama_words_in_the_vocabulary_skip_merges(tmp_path):
    """`ignore_merges`: a word of the vocabulary is one token even if no merge produces it."""
    folder = write(tmp_path / "t", "llama_3")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["zqx"] = last = 1 + max(tokenizers.load(folder).vocabulary.values())
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for pre, expected in (("llama-bpe", [last]), ("gpt-2", None)):
        path = gguf_files.write_tokenizer(tmp_path / pre, tokenizers.load(folder), definition, pre=pre, unused=0)
        found = tokenizers.load(path.rename(path.with_suffix(".gguf"))).encode("zqx")
        assert found == expected or (expected is None and len(found) == 3)


def test_unsupported_gguf_tokenizer_is_refused_but_its_vocabulary_is_readable(tmp_path):
    folder = write(tmp_path / "t", "qwen3")
    ours, definition = tokenizers.load(folder), json.loads((folder / "tokenizer.json").read_text())
    path = gguf_files.write_tokenizer(tmp_path / "x.gguf", ours, definition, pre="deepseek", unused=7)
    with pytest.raises(TokenizerError, match=r"x\.gguf: .*'gpt2' with 'deepseek'.*config\.tokenizer\.path"):
        tokenizers.load(path)
    assert tokenizers.vocabulary(path) == ours.vocabulary


def test_bytes_without_a_piece_vanish_as_in_the_real_tokenizer(tmp_path):
    lost = "\x04"
    stand_in = next(name for byte, name in _bytes_to_unicode().items() if byte == ord(lost))
    folder = edit(write(tmp_path / "t", "chatml"), lambda definition: definition["model"]["vocab"].pop(stand_in))
    ours, real = tokenizers.load(folder), RealTokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"a{lost}b"
    assert ours.encode(text) == real.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == "ab"


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "t", "chatml")
    whole = (folder / "tokenizer.json").read_text()
    for text, message in (
        (whole[:-20], "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "lacks 'added_tokens'"),
    ):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(TokenizerError, match=message):
            tokenizers.load(folder)
    (folder / "tokenizer.json").write_text(whole)
    for config, message in (
        ({"eos_token": "<|stop|>"}, r"eos_token = '<\|stop\|>' is not in its vocabulary"),
        ({"eos_token": ["<|im_end|>"]}, r"eos_token = \['<\|im_end\|>'\] is not a token name"),
        ({"eos_token": "<|im_end|>", "chat_template": {"a": 1}}, "chat_template is {'a': 1}, not text"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(TokenizerError, match=message):
            tokenizers.load(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": ["x"]}))
    assert tokenizers.load(folder).template == ""
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not text"):
        tokenizers.load(folder)
    (folder / "other.json").write_text(whole)
    with pytest.raises(TokenizerError, match=r"other\.json: a published tokenizer must be named tokenizer\.json"):
        tokenizers.load(folder / "other.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match=r"x\.gguf is damaged"):
        tokenizers.load(tmp_path / "x.gguf")


def saved_after(folder, change):
    """Saves a tokenizer.json with the state that a use leaves in it."""
    real = RealTokenizer.from_file(str(folder / "tokenizer.json"))
    change(real)
    real.save(str(folder / "tokenizer.json"))
    return folder


@PATIENT
@given(
    length=st.integers(1, 64),
    side=st.sampled_from(["left", "right"]),
    strategy=st.sampled_from(["longest_first", "only_first"]),
    pad=st.one_of(st.none(), st.integers(1, 128)),
    multiple=st.one_of(st.none(), st.sampled_from([8, 64])),
    dropout=st.one_of(st.none(), st.sampled_from([0.1, 1.0])),
    text=texts,
)
@example(16, "right", "longest_first", None, None, None, "Count the lines of notes/plan.txt. " * 8)
@example(16, "right", "longest_first", 64, None, None, "Count")
@example(64, "right", "longest_first", None, None, 1.0, "Count the lines of notes/plan.txt")
def test_what_a_use_leaves_in_tokenizer_json_changes_no_ids(
    pair, tmp_path, length, side, strategy, pad, multiple, dropout, text
):
    def use(real):
        real.enable_truncation(length, direction=side, strategy=strategy)
        real.enable_padding(direction=side, length=pad, pad_to_multiple_of=multiple)

    kind = "qwen3" if pair[1].normalizer else "llama_3" if pair[0].id_of("<|eot_id|>") else "chatml"
    folder = saved_after(write(tmp_path / kind, kind), use)
    edit(folder, lambda said: said["model"].update(dropout=dropout))
    ours = tokenizers.load(folder)
    assert ours.encode(text) == pair[0].encode(text)
    assert ours.encode_spans([(text, True)]) == pair[0].encode_spans([(text, True)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "it changes text, .*: 'ABC.* becomes 'abc"),
        (lambda d: d.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}), "it changes text"),
        (lambda d: d.update(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": ""}), "changes text"),
        (lambda d: d.update(normalizer={"type": "Prepend", "prepend": "_"}), "it changes text"),
        (lambda d: d.update(pre_tokenizer=None), "it changes text"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "it changes text"),
        (lambda d: d["model"].update(continuing_subword_prefix="##"), "not a byte-level BPE"),  # the package panics
    ],
    ids=["lower case", "strips", "no spaces", "prepends", "no bytes", "suffix", "panics"],
)
def test_a_tokenizer_that_would_change_what_a_tool_wrote_is_refused(tmp_path, change, message):
    folder = edit(write(tmp_path / "t", "chatml"), change)
    with pytest.raises(TokenizerError, match=message):
        tokenizers.load(folder)


def test_an_empty_token_is_never_found(tmp_path):
    def add(said):
        token = {**said["added_tokens"][0], "content": "", "special": True}
        said["added_tokens"] += [token | {"id": 600}, token | {"id": 601}]
        said["model"]["vocab"][""] = 602

    folder = write(tmp_path / "t", "chatml")
    plain = tokenizers.load(folder)
    ours = tokenizers.load(edit(folder, add))
    text = "<|im_start|>user\nhi<|im_end|>"
    assert ours.encode_spans([(text, True)]) == plain.encode_spans([(text, True)])
    assert ours.encode_markup(text) == plain.encode_markup(text)
    assert ours.starts_with_added("hi") is None
    assert ours.decode([600, *ours.encode("hi"), 602]) == "hi"
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "", "unk_token": ""}))
    assert tokenizers.load(folder).pad == plain.end


def test_files_are_utf8_whatever_the_locale(tmp_path):
    folder = write(tmp_path / "t", "chatml")
    (folder / "chat_template.jinja").write_text("tr\u00e8s {{ messages }}", encoding="utf-8")
    code = f"import echo_jax.tokenizer as t; print(ascii(t.load({str(folder)!r}).template))"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_locale, capture_output=True, text=True)
    assert ended.stdout == "'tr\\xe8s {{ messages }}'\n", ended.stderr


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"generation_config": [3, 1]}, (3, 1)),
        ({"generation_config": 3}, (3,)),
        ({"generation_config": [3], "config": [1, 2]}, (3,)),
        ({"generation_config": None, "config": [1, 2]}, (1, 2)),
        ({"config": 0}, (0,)),
        ({}, ()),
    ],
)
def test_the_ends_are_those_of_generation_config_or_else_of_config(tmp_path, said, ends):
    folder = write(tmp_path / "t", "chatml")
    for name, value in said.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    assert tokenizers.load(folder).ends == ends
    assert tokenizers.find(write(tmp_path / "other", "chatml"), folder).ends == ends  # of the weights


@pytest.mark.parametrize("value", ["<|im_end|>", [1, "2"], True, [-1], 1.5])
def test_ends_that_are_no_ids_are_refused(tmp_path, value):
    folder = write(tmp_path / "t", "chatml")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError, match="eos_token_id = .* must be the id of a token"):
        tokenizers.load(folder)
