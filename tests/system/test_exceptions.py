"""What is said of an exception of the user's code, and what is kept."""

import json
import logging

import pytest

from echo_jax.system import user_code
from echo_jax.system.errors import ConfigError
from echo_jax.system.user_code import UserCodeError, calling, describe, log, log_to


def caught(function):
    try:
        function()
    except BaseException as error:
        return error


def test_the_place_is_in_the_users_own_code_not_in_a_library():
    headline, *trace = describe("the score", caught(lambda: json.loads("{"))).splitlines()
    assert headline.startswith(f"the score raised JSONDecodeError ({__file__}:")
    assert "json" in "".join(trace)


def test_a_long_message_is_cut_and_one_of_several_lines_becomes_one():
    def fail():
        raise ValueError("one\ntwo " + "x" * 1_000_000)

    text = describe("the tool", caught(fail))
    headline = text.splitlines()[0]
    assert "): one two xxx" in headline
    assert "characters" in headline
    assert len(text) < 10_000


def test_text_that_utf_8_cannot_encode_is_escaped_so_that_it_can_be_printed():
    def fail():
        raise ValueError("half an emoji: \ud83d, a byte: \udcff")

    text = describe("the score", caught(fail))
    assert "half an emoji: \\ud83d, a byte: \\udcff" in text.encode().decode()


def test_an_exception_that_cannot_tell_its_message_is_described():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def fail():
        raise Mute

    assert "the score raised Mute" in describe("the score", caught(fail))
    assert "its message raised RuntimeError" in describe("the score", caught(fail))


def test_errors_that_users_can_fix_pass_and_an_exit_does_not():
    with pytest.raises(ConfigError, match="^lambda$"), calling("the filter"):
        raise ConfigError("lambda")
    with pytest.raises(UserCodeError, match="the filter raised SystemExit"), calling("the filter"):
        raise SystemExit(0)
    with pytest.raises(KeyboardInterrupt), calling("the filter"):
        raise KeyboardInterrupt


def test_the_log_appears_with_its_first_text_and_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(user_code, "LOG_BYTES", 2000)
    path = tmp_path / "errors.log"
    with log_to(path):
        assert not path.exists()
        for i in range(100):
            log(f"text {i} " + "x" * 100)
    assert "text 99 " in path.read_text()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5000
    with log_to(path):
        log("later")
    assert "text 99 " in path.read_text()
    assert path.read_text().count("later") == 1
    assert not logging.getLogger("echo_jax.user_code").handlers
