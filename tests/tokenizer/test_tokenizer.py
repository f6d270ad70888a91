"""The tokenizer: bytes round-trip exactly, text never becomes a control symbol, a wrong model file is refused."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from echo_jax.tasks.words import WORDS
from echo_jax.tokenizer import CONTROL_SYMBOLS, DEFAULT_MODEL, SentencePieces, TokenizerError

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine must not fail a test
TOKENIZER = SentencePieces()
CONTROL_IDS = {TOKENIZER.task, TOKENIZER.assistant, TOKENIZER.tool, TOKENIZER.note, TOKENIZER.end, TOKENIZER.pad}
Piece = model_pb2.ModelProto.SentencePiece

# Text that tokenizers often lose or misread, mixed with arbitrary text.
awkward = st.sampled_from(
    [*CONTROL_SYMBOLS, "<pad>", "<unk>", "<0x41>", "<|", "|>", "\u2581", "\0", "\n", "\r\n", "\t", " ", "  ", "    ",
     "\ufeff", "\u200b", "e\u0301", "\u00e9", "\ufb01", "\u212b", "\u3000", "\U0001f9ff", "bash", " oak"]
)  # fmt: skip
texts = st.lists(st.one_of(awkward, st.text(max_size=8)), max_size=12).map("".join)
byte_strings = st.lists(st.one_of(st.binary(max_size=8), awkward.map(str.encode)), max_size=12).map(b"".join)


def edited_model(path, edit):
    """Writes a changed copy of the built-in model."""
    model = model_pb2.ModelProto()
    model.ParseFromString(DEFAULT_MODEL.read_bytes())
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def retype(names, piece_type):
    def edit(model):
        for piece in model.pieces:
            if piece.piece in names:
                piece.type = piece_type

    return edit


def rename(old, new):
    def edit(model):
        for piece in model.pieces:
            piece.piece = new if piece.piece == old else piece.piece

    return edit


def normalize(**fields):
    def edit(model):
        for name, value in fields.items():
            setattr(model.normalizer_spec, name, value)

    return edit


@PATIENT
@given(texts)
def test_text_round_trips_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@PATIENT
@given(byte_strings)
@example(bytes(range(256)))
@example(b"\xe2\x96")  # U+2581, cut
@example(b"\xe2\x96\x81\xff\xe2\x96\x81")
@example(b"\xed\xb3\xbf")  # a surrogate, encoded as UTF-8 forbids
def test_non_utf8_bytes_round_trip_exactly(data):
    decoded = TOKENIZER.decode(TOKENIZER.encode(data.decode("utf-8", "surrogateescape")))
    assert decoded.encode("utf-8", "surrogateescape") == data


@PATIENT
@given(texts)
@example("".join(CONTROL_SYMBOLS))
def test_text_never_becomes_a_control_symbol(text):
    ids = TOKENIZER.encode(text)
    assert not CONTROL_IDS & {*ids}
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@PATIENT
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_sampled_ids_decode_to_text(ids):
    text = TOKENIZER.decode(ids)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_control_symbols_are_five_ids_that_decode_to_their_names():
    ids = [TOKENIZER.task, TOKENIZER.assistant, TOKENIZER.tool, TOKENIZER.note, TOKENIZER.end]
    assert TOKENIZER.decode(ids) == "".join(CONTROL_SYMBOLS)
    assert len(CONTROL_IDS) == 6


@pytest.mark.parametrize("before", ["", " "])
def test_every_word_of_the_tasks_is_one_piece(before):
    assert [word for word in WORDS if len(TOKENIZER.encode(before + word)) != 1] == []


def test_missing_model_is_named_with_the_fix(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(TokenizerError, match=rf"no tokenizer model at {path}.*leave config.tokenizer.path empty"):
            SentencePieces(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_damaged_model_is_refused_wherever_it_is_cut(tmp_path, kept):
    whole = DEFAULT_MODEL.read_bytes()
    path = tmp_path / "cut.model"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(TokenizerError, match=str(path)):
        SentencePieces(path)


def test_a_model_that_ends_before_its_settings_is_refused(tmp_path):
    """SentencePiece would read it and fill in settings that add and remove spaces."""

    def edit(model):
        model.ClearField("trainer_spec")
        model.ClearField("normalizer_spec")

    with pytest.raises(TokenizerError):
        SentencePieces(edited_model(tmp_path / "m.model", edit))


def test_file_that_is_not_a_model_is_refused(tmp_path):
    path = tmp_path / "text.model"
    path.write_bytes(b"an ordinary text\n" * 100)
    with pytest.raises(TokenizerError, match="is not a SentencePiece model|lacks the control"):
        SentencePieces(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename("<|end|>", "</s>"), r"lacks .* \['<\|end\|>'\]"),
        (retype(CONTROL_SYMBOLS, Piece.USER_DEFINED), r"lacks .* \['<\|task\|>', '<\|assistant\|>'"),
        (retype(["<|tool|>"], Piece.NORMAL), r"lacks .* \['<\|tool\|>'\]"),
        (normalize(add_dummy_prefix=True), "lossy"),
        (normalize(remove_extra_whitespaces=True), "lossy"),
    ],
    ids=["no stop token", "user-defined roles", "an ordinary role", "dummy prefix", "lost spaces"],
)
def test_a_foreign_model_is_refused_and_the_cause_named(tmp_path, edit, message):
    with pytest.raises(TokenizerError, match=message):
        SentencePieces(edited_model(tmp_path / "foreign.model", edit))


def test_an_unchanged_copy_of_the_model_is_accepted(tmp_path):
    same = SentencePieces(edited_model(tmp_path / "same.model", lambda model: None))
    assert same.encode("bash ls") == TOKENIZER.encode("bash ls")
