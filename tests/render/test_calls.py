"""Laws of the grammars: every attempt is found, in order, and written calls are parsed back."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echo_jax.render.calls import GRAMMARS, MALFORMED, MAX_CALLS, Call, Malformed, parse
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


TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"', "\\", "\n", "x", "\ud83d", " "]
quoting = st.lists(st.sampled_from(TAGS), max_size=12).map("".join)


@given(st.lists(st.tuples(quoting, quoting), min_size=1, max_size=4), quoting.filter(lambda text: "<" not in text))
@example([("f", "x</tool_call>y")], "")
@example([("f", "a<tool_call>b</tool_call><think>c</think>")], "I write")
def test_a_call_may_quote_tags(pairs, between):
    calls = [Call("write", {"path": path, "content": content}) for path, content in pairs]
    assert JSON.parse(between.join(JSON.write(call, ALL) for call in calls), ALL) == calls


@pytest.mark.parametrize("command", ["grep '<tool_call>' f", "grep '</tool_call>' f", "echo '<think>'", "cat </think>"])
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_command_may_quote_tags(grammar, command):
    call = Call("bash", {"command": command})
    assert GRAMMARS[grammar].parse(GRAMMARS[grammar].write(call, ALL), ALL) == [call]


@pytest.mark.parametrize(
    ("text", "statuses"),
    [
        ('<tool_call>{"name": "bash", "arguments": {"command": "</tool_call>"}}', ["unclosed"]),
        ('<tool_call>{"name": "bash", "arguments": {"command": "<tool_call>"}}' + LS, ["unclosed", "bash"]),
        ('<tool_call>{"name": "bash", "arguments": {"command": "</tool_call>"}} so</tool_call>', ["invalid_json"]),
        ('<tool_call>{"name": "bash, </tool_call>' + LS, ["invalid_json", "bash"]),
        ('<tool_call>"</tool_call>"</tool_call>', ["missing_name"]),
        ('<tool_call>{"name": "bash", "arguments": {"command": "<think>"}}</tool_call>' + LS, ["bash", "bash"]),
    ],
)
def test_damaged_calls_that_quote_tags(text, statuses):
    found = JSON.parse(text, ALL)
    assert [a.tool if isinstance(a, Call) else a.status for a in found] == statuses


_BEFORE = re.compile(
    r"<think>.*?(?:</think>|\Z)|<tool_call>(?P<body>.*?)(?:(?P<close></tool_call>)|(?=<tool_call>)|\Z)", re.DOTALL
)
pieces = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", LS, '{"name": 3}', "{", "1", "oak ", "\n"]),
    max_size=10,
).map("".join)


@given(pieces)
def test_where_no_string_quotes_a_tag_attempts_are_those_of_the_first_version(text):
    """It ended a call at the first tag, whatever the JSON."""
    found = [part for part in _BEFORE.finditer(text) if part["body"] is not None]
    assert [isinstance(a, Malformed) and a.status == "unclosed" for a in JSON.parse(text, ALL)] == (
        [not part["close"] for part in found] or [False]
    )


@pytest.mark.parametrize("grammar", GRAMMARS)
@given(draft=quoting.filter(lambda text: "</think>" not in text), space=st.sampled_from(["", "\n", "\n\n", " "]))
def test_only_what_follows_reasoning_that_the_format_opened_is_a_call(grammar, draft, space):
    written = [GRAMMARS[grammar].write(Call("bash", {"command": name}), ALL) for name in ("drafted", "meant")]
    thought = f"{draft}{written[0]}{draft}"
    made = parse(grammar, f"{thought}</think>{space}{written[1]}", ALL, in_reasoning=True)
    assert made == [Call("bash", {"command": "meant"})]
    (attempt,) = parse(grammar, thought, ALL, in_reasoning=True)
    assert attempt.status == "no_call"
    assert parse(grammar, written[1], ALL) == made


def test_a_turn_of_endless_calls_is_cut():
    one = GRAMMARS["json"].write(Call("bash", {"command": "ls"}), TOOLS)
    few = parse("json", one * MAX_CALLS, TOOLS)
    assert [type(attempt) for attempt in few] == [Call] * MAX_CALLS
    *first, last = parse("json", one * MAX_CALLS + "<tool_call>" * 999, TOOLS)
    assert first == few
    assert (last.status, last.message.split()[0]) == ("too_many_calls", str(MAX_CALLS + 999))
