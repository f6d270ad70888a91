"""The tools' laws, tested in real sandboxes: each does what it says, and the agent sees its errors."""

import subprocess
import sys

import jsonschema
import pytest

from echo_jax.render.calls import describe
from echo_jax.tools import TOOLS
from echo_jax.tools.sandbox import Limits, Sandbox, Status

LIMITS = Limits(memory_bytes=256 << 20, disk_bytes=16 << 20, output_bytes=2048, timeout_seconds=3.0)


@pytest.fixture(scope="module")
def box():
    with Sandbox(limits=LIMITS, files={"notes.txt": b"one\ntwo\n", "d/f": b"x\n"}) as sandbox:
        yield sandbox


def call(box, tool, **arguments):
    jsonschema.validate(arguments, TOOLS[tool].parameters)
    result = TOOLS[tool].run(box, arguments)
    return result.status, (result.head + result.tail).decode("utf-8", "surrogateescape")


def test_every_tool_is_described_and_has_a_number():
    for entry in describe(TOOLS):
        function = entry["function"]
        assert function["description"].endswith(".")
        jsonschema.Draft202012Validator.check_schema(function["parameters"])
        assert function["parameters"]["required"]


def test_bash_returns_what_the_command_printed(box):
    assert call(box, "bash", command="export N=$(wc -l < notes.txt)") == (Status.OK, "")
    assert call(box, "bash", command="echo $N; exit 4") == (Status.NONZERO, "2\n")


def test_python_persists_between_calls(box):
    assert call(box, "python", code="x = open('notes.txt').read().split()") == (Status.OK, "")
    assert call(box, "python", code="x") == (Status.OK, "['one', 'two']\n")


def test_sqlite_runs_statements_and_keeps_their_changes(box):
    made = "create table t (a, b); insert into t values (1, 'x;y'), (2, null); select * from t"
    assert call(box, "sqlite", sql=made) == (Status.OK, "1|x;y\n2|\n")
    assert call(box, "sqlite", sql="select count(*) from t;") == (Status.OK, "2\n")
    assert call(box, "sqlite", sql="select sum(a) from t", database="data.db") == (Status.OK, "3\n")
    assert call(box, "sqlite", sql="update t set a = a * 10 -- all\n") == (Status.OK, "")
    assert call(box, "sqlite", sql="select a from t where b is null") == (Status.OK, "20\n")
    assert call(box, "sqlite", sql="-- nothing") == (Status.OK, "")
    assert call(box, "sqlite", sql="")[0] is Status.OK


def test_sqlite_prints_rows_before_the_error(box):
    status, text = call(box, "sqlite", sql="select 1; selekt 2")
    assert status is Status.NONZERO
    assert text.startswith('1\nError: near "selekt"')
    assert call(box, "sqlite", sql="select * from nowhere") == (Status.NONZERO, "Error: no such table: nowhere\n")
    assert call(box, "sqlite", sql="select 1", database="/proc/nothing")[0] is Status.NONZERO
    assert call(box, "sqlite", sql="with recursive c(x) as (select 1 union all select x from c) select 1 from c") in (
        (Status.OUTPUT_LIMIT, "1\n" * 1024),
        (Status.TIMEOUT, "1\n" * 1024),
    )


def test_read_shows_a_file_under_the_cap(box):
    assert call(box, "read", path="notes.txt") == (Status.OK, "one\ntwo\n")
    assert call(box, "read", path="/work/d/../notes.txt") == (Status.OK, "one\ntwo\n")
    box.write_files({"big": bytes(5000), "binary": b"a\xffb"})
    result = TOOLS["read"].run(box, {"path": "big"})
    assert (len(result.head), len(result.tail), result.dropped_bytes) == (1024, 1024, 5000 - 2048)
    assert call(box, "read", path="binary") == (Status.OK, "a\udcffb")


def test_write_and_edit_change_one_file(box):
    assert call(box, "write", path="new/dir/f", content="a\udcff b\n") == (Status.OK, "5 bytes written\n")
    assert box.read_file("new/dir/f", limit=99) == b"a\xff b\n"
    assert call(box, "edit", path="new/dir/f", old=" b\n", new=" c\nd\n") == (Status.OK, "1 place edited\n")
    assert box.read_file("new/dir/f", limit=99) == b"a\xff c\nd\n"
    for old, count in (("z", 0), ("", 0)):
        status, text = call(box, "edit", path="new/dir/f", old=old, new="")
        assert status is Status.NONZERO
        assert f"occurs {count} times" in text
    box.write_files({"twice": b"xx"})
    assert "occurs 2 times" in call(box, "edit", path="twice", old="x", new="y")[1]


def test_paths_are_relative_to_the_shells_directory(box):
    call(box, "bash", command="cd d")
    assert call(box, "read", path="f") == (Status.OK, "x\n")
    assert call(box, "read", path="../notes.txt") == (Status.OK, "one\ntwo\n")
    call(box, "bash", command="cd /work")


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "/work", "", ".", "/", "a\0b", "/workshop", "\ud800", "é" * 9000, "a" * 70_000]
)
def test_path_outside_work_gets_an_answer_not_a_crash(box, path):
    for tool, arguments in (("read", {}), ("write", {"content": ""}), ("edit", {"old": "a", "new": "b"})):
        status, text = call(box, tool, path=path, **arguments)
        assert (status, bool(text)) == (Status.NONZERO, True)


@pytest.mark.parametrize(
    "trap", ["ln -s /etc/passwd x", "ln -s /etc d2; ln -s d2/passwd x", "mkfifo x", "mkdir x", "truncate -s 8M x"]
)
def test_files_planted_by_the_agent_are_not_followed(box, trap):
    box.run(f"rm -rf x d2; {trap}")
    assert call(box, "read", path="x")[0] is Status.NONZERO
    assert call(box, "edit", path="x", old="root", new="toor")[0] is Status.NONZERO
    assert call(box, "bash", command="rm -rf x d2; grep -c root /etc/passwd") == (Status.OK, "1\n")


def test_a_full_disk_and_a_dead_sandbox_are_told_apart():
    with Sandbox(limits=Limits(disk_bytes=1 << 20)) as small:
        assert call(small, "write", path="f", content="x" * (2 << 20))[0] is Status.NONZERO
        small.close()
        assert call(small, "write", path="f", content="x")[0] is Status.INFRA
        assert call(small, "sqlite", sql="select 1")[0] is Status.INFRA


def test_importing_the_tools_starts_no_process_and_loads_no_jax():
    code = (
        "import sys, subprocess; subprocess.Popen = None; import echo_jax.tools, threading; "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules and threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
