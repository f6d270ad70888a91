"""Laws of the grammars: every attempt is found, in order, and written calls are parsed back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.render.calls import GRAMMARS, MALFORMED, Call, Malformed
from echo_jax.tools import TOOLS

PLAIN, JSON = GRAMMARS["plain"], GRAMMARS["json"]
ALL = TOOLS


def block(**call):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


LS = block(name="bash", arguments={"command": "ls"})


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("bash ls -l", Call("bash", {"command": "ls -l"})),
        ("bash", Call("bash", {"command": ""})),
        ("bash  x ", Call("bash", {"command": " x "})),
        ("bash a\nb", Call("bash", {"command": "a\nb"})),
        ("submit ./a b", Call("submit", {"answer": "./a b"})),
        ("write a b.txt\none\ntwo\n", Call("write", {"path": "a b.txt", "content": "one\ntwo\n"})),
        ("edit f\nold\nnew\nlines", Call("edit", {"path": "f", "old": "old", "new": "new\nlines"})),
        ("sqlite select 1;\nselect 2", Call("sqlite", {"sql": "select 1;\nselect 2"})),
    ],
)
def test_plain_call_is_a_name_and_one_line_per_argument(text, call):
    assert PLAIN.parse(text, ALL) == [call]
    assert PLAIN.parse(PLAIN.write(call, ALL), ALL) == [call]


@pytest.mark.parametrize(
    ("text", "status"),
    [("Bash ls", "unknown_tool"), ("", "unknown_tool"), ("bash\nls", "unknown_tool"), ("write f", "invalid_arguments")],
)
def test_malformed_plain_call_reports_its_error(text, status):
    (attempt,) = PLAIN.parse(text, ALL)
    assert attempt.status == status
    assert attempt.message


def test_only_the_tasks_tools_exist():
    for grammar in (PLAIN, JSON):
        (attempt,) = grammar.parse(
            grammar.write(Call("python", {"code": "1"}), ALL), {name: ALL[name] for name in ("bash", "submit")}
        )
        assert attempt == Malformed("unknown_tool", "unknown tool; there are: bash submit")


@pytest.mark.parametrize(
    ("text", "statuses"),
    [
        (LS, ["ok"]),
        (f"Let me look.\n{LS}{LS}\n{LS} done", ["ok"] * 3),
        ("no call at all", ["no_call"]),
        ("", ["no_call"]),
        (LS.removesuffix("</tool_call>"), ["unclosed"]),
        (f"<tool_call>{LS}", ["unclosed", "ok"]),
        ("<tool_call>{'name': 'bash'}</tool_call>", ["invalid_json"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["invalid_json"]),
        ("<tool_call></tool_call>" + LS, ["invalid_json", "ok"]),
        ('<tool_call>{"name": "bash", "arguments": ' + "[" * 990 + "]" * 990 + "}</tool_call>", None),
        ("<tool_call>[]</tool_call>", ["missing_name"]),
        (block(arguments={}), ["missing_name"]),
        (block(name=3), ["missing_name"]),
        (block(name="rm"), ["unknown_tool"]),
        (block(name="bash"), ["invalid_arguments"]),
        (block(name="bash", arguments="ls"), ["invalid_arguments"]),
        (block(name="bash", arguments={"command": 3}), ["invalid_arguments"]),
        (block(name="bash", arguments={"command": "ls", "cwd": "/"}), ["invalid_arguments"]),
        (block(name="sqlite", arguments={"sql": "s", "database": "d"}), ["ok"]),
        (f"<think>{LS}</think>", ["no_call"]),
        (f"<think>first {LS}", ["no_call"]),
        (f"<think>a</think>{LS}<think>{LS}", ["ok"]),
        (LS.replace("ls", "echo <think>") + LS, ["ok", "ok"]),
    ],
)
def test_json_attempts_are_found_in_order_but_not_inside_reasoning(text, statuses):
    attempts = JSON.parse(text, ALL)
    if statuses is None:  # the depth that is too deep depends on the stack
        assert attempts[0].status in ("invalid_json", "invalid_arguments")
        return
    assert ["ok" if isinstance(a, Call) else a.status for a in attempts] == statuses
    assert all(a.message for a in attempts if isinstance(a, Malformed))


@pytest.mark.parametrize("before", ["", " \n", "<|python_tag|>", " <|python_tag|> "])
def test_llama_call_may_start_with_the_python_tag(before):
    llama, call = GRAMMARS["llama"], Call("bash", {"command": "ls"})
    assert llama.parse(before + llama.write(call, ALL), ALL) == [call]


def test_arguments_survive_write_and_parse():
    awkward = 'echo "é\\n\n" # \ud83e\udd91 \x00'
    assert JSON.parse(JSON.write(Call("bash", {"command": awkward}), ALL), ALL) == [Call("bash", {"command": awkward})]


@given(
    st.text() | st.sampled_from([LS, "<tool_call>", "</tool_call>", "<think>", "{}"]), st.sampled_from(sorted(GRAMMARS))
)
def test_any_text_gives_at_least_one_attempt_of_a_known_kind(text, grammar):
    attempts = GRAMMARS[grammar].parse(text, ALL)
    assert attempts
    assert all(isinstance(a, Call) or a.status in MALFORMED for a in attempts)
