"""What an agent leaves may be hostile: reading it takes bounded time and memory, and never the trainer's."""

import contextlib
import functools
import gzip
import io
import resource
import sqlite3
import tarfile
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring import score

from echo_jax.tasks import FAMILIES, procedural, readers
from echo_jax.tasks.procedural import read_inside
from echo_jax.tools.sandbox import Limits, Sandbox, SandboxError
from echo_jax.tools.shell import DATABASE

LIMITS = Limits(timeout_seconds=20.0, memory_bytes=256 << 20, disk_bytes=16 << 20, processes=32, output_bytes=256)
IN_SANDBOX = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def box():
    with pytest.MonkeyPatch.context() as patch, Sandbox(limits=LIMITS) as sandbox:
        patch.setattr(procedural, "READER_SECONDS", 1)
        yield sandbox


@functools.cache
def task_of(family, template):
    tasks = (FAMILIES[family](level=1).make("train", i) for i in range(500))
    return next(task for task in tasks if task.template == template)


@contextlib.contextmanager
def bounded():
    """Checks that the trainer's own process spends next to no time and memory."""
    before, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - used < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10  # KiB


def reward_of(box, template, data):
    """Returns the reward of an agent that leaves `data` as the archive or the database of a task, all else done."""
    task = task_of("shell" if template == "archive" else "sqlite", template)
    path = task.problem.goal.archive if template == "archive" else DATABASE
    box.write_files({**task.files, path: data})
    with bounded():
        return score(task, "", box)


# -- archives ----------------------------------------------------------------------------------------------------------


def header(kind, size, name=b"a", more=b""):
    """Returns the 512 bytes of a tar header; `size` as bytes is taken as it is, `more` stands where old GNU headers
    have the map of a sparse file."""
    size = b"%011o\0" % size if isinstance(size, int) else size[:12].ljust(12, b"\0")
    made = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"0" * 11 + b"\0" + b" " * 8 + kind
    made = (made.ljust(257, b"\0") + b"ustar  \0").ljust(386, b"\0") + more
    made = made[:512].ljust(512, b"\0")
    return made[:148] + b"%06o\0 " % sum(made) + made[156:]


def member(kind, content, **fields):
    return header(kind, len(content), **fields) + content + bytes(-len(content) % 512)


def pax(**records):
    lines = b""
    for name, value in records.items():
        line = b" %s=%s\n" % (name.replace("__", ".").encode(), value)
        length = len(line) + 1
        while len(b"%d" % length) + len(line) != length:
            length += 1
        lines += b"%d" % length + line
    return member(b"x", lines)


def packed(*blocks):
    return gzip.compress(b"".join(blocks) + bytes(1024), mtime=0)


def honest(files):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


# A sparse file of 1 MB without data takes one block.
SPARSE = header(b"S", 0, more=b"%011o\0" % 0 * 2 + bytes(72) + b"\0" + b"%011o\0" % (1 << 20))
HOSTILE = {
    "900 long names": [member(b"L", b"x" * 600)] * 900,
    "a size of 2^80": [pax(size=b"%d" % 2**80), member(b"0", b"")],
    "a size of 100,000 digits": [pax(size=b"9" * 100_000), member(b"0", b"")],
    "a record of 100,000 digits": [member(b"x", b"1" * 100_000 + b" size=1\n"), member(b"0", b"")],
    "a time of 100,000 digits": [pax(mtime=b"9" * 100_000), member(b"0", b"")],
    "2,000 sparse files": [SPARSE] * 2000,
    "a sparse map of 50,000 places": [
        pax(GNU__sparse__major=b"0", GNU__sparse__map=b"1,1," * 50_000, GNU__sparse__size=b"9"),
        member(b"0", b""),
    ],
    "a negative size": [header(b"0", b"\xff" * 12), b"x" * 512],
    "a size of 2^63": [header(b"0", b"\x80\0\0\0" + b"\xff" * 8), b"x" * 512],
    "many empty files": [header(b"0", 0)] * 2000,
    "1 GB": [bytes(1 << 30)],
    "nothing": [],
    "a name in no encoding": [pax(path=b"\xff\xfe/../x", hdrcharset=b"BINARY"), member(b"0", b"x")],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archive_earns_nothing_and_costs_the_trainer_nothing(box, what):
    if what == "1 GB":
        compress = zlib.compressobj(wbits=31)
        data = b"".join([compress.compress(bytes(1 << 20)) for _ in range(200)]) + compress.flush()
    else:
        data = packed(*HOSTILE[what])
    assert reward_of(box, "archive", data) == 0.0


KEYS = ["size", "mtime", "path", "uid", "hdrcharset", "GNU__sparse__map", "GNU__sparse__major", "GNU__sparse__realsize"]
NUMBERS = st.one_of(
    st.integers(-(2**80), 2**80).map(lambda n: b"%d" % n), st.integers(1, 60_000).map(lambda n: b"7" * n)
)
BLOCKS = st.one_of(
    st.builds(member, st.sampled_from([bytes([c]) for c in b"0123456789LKSxgDVZ\0"]), st.binary(max_size=700)),
    st.builds(header, st.sampled_from([b"0", b"S", b"L", b"x"]), st.binary(max_size=12), more=st.binary(max_size=126)),
    st.builds(lambda keys, value: pax(**dict.fromkeys(keys, value)), st.sets(st.sampled_from(KEYS)), NUMBERS),
    st.binary(max_size=600),
)
ARCHIVES = st.lists(st.tuples(BLOCKS, st.sampled_from([1, 1, 1, 2, 1000])), max_size=6)


@IN_SANDBOX
@given(ARCHIVES)
def test_no_archive_is_an_error_of_the_trainer(box, blocks):
    assert reward_of(box, "archive", packed(*(block * times for block, times in blocks))) == 0.0


@IN_SANDBOX
@given(st.data())
def test_no_damage_to_an_archive_is_an_error_of_the_trainer(box, data):
    """Within and outside of the compression."""
    goal = task_of("shell", "archive").problem.goal
    archive = honest(goal.packed)
    plain = bytearray(gzip.decompress(archive))
    for _ in range(data.draw(st.integers(1, 8))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytearray(gzip.compress(bytes(plain)) if data.draw(st.booleans()) else archive)
    damaged = damaged[: data.draw(st.integers(1, len(damaged)))]
    assert reward_of(box, "archive", bytes(damaged)) in (0.0, 1.0)


def test_honest_archive_earns_the_reward(box):
    goal = task_of("shell", "archive").problem.goal
    assert reward_of(box, "archive", honest(goal.packed)) == 1.0
    some = dict(list(goal.packed.items())[1:])
    assert reward_of(box, "archive", honest(some)) == 0.0
    assert reward_of(box, "archive", honest({path: b"x" for path in goal.packed})) == 0.0


@given(st.dictionaries(st.sampled_from(["a", "b/c", "d é"]), st.binary(max_size=50), max_size=3))
def test_an_archive_reads_back_as_packed(files):
    assert readers.archive(honest(files)) == files


# -- databases ---------------------------------------------------------------------------------------------------------


def changed(task):
    """Returns an open connection to the database as the solution leaves it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(task.files[DATABASE])
    connection.execute(task.problem.solution[-1].removeprefix("sqlite "))
    return connection


def test_a_row_without_a_definition_and_an_index_of_its_name_earn_nothing(box):
    task = task_of("sqlite", "update")
    connection = changed(task)
    name = next(iter(task.problem.goal.tables))
    connection.executescript(
        f"CREATE TABLE other (x); CREATE INDEX made ON other (x); DROP TABLE {name}; PRAGMA writable_schema = ON; "
        f"UPDATE sqlite_master SET name = '{name}' WHERE name = 'made'; "
        f"INSERT INTO sqlite_master VALUES ('table', '{name}', '{name}', 0, NULL)"
    )
    assert reward_of(box, "update", connection.serialize()) == 0.0


SQL = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(
        ["CREATE TABLE x (x)", "CREATE INDEX x ON x (x)", "CREATE VIEW x AS SELECT * FROM x", "x" * 99_999]
    ),
)


@IN_SANDBOX
@given(st.data())
def test_no_schema_is_an_error_of_the_trainer(box, data):
    task = task_of("sqlite", data.draw(st.sampled_from(["update", "index", "summary"])))
    connection = changed(task)
    goal = task.problem.goal
    names = st.sampled_from([*goal.tables, *goal.indexes, "sqlite_master", "sqlite_sequence", "x"])
    connection.execute("PRAGMA writable_schema = ON")
    for _ in range(data.draw(st.integers(1, 3))):
        row = [
            data.draw(st.one_of(st.sampled_from(["table", "index", "view", "trigger"]), SQL)),
            data.draw(st.one_of(names, SQL)),
            data.draw(st.one_of(names, SQL)),
            data.draw(st.one_of(st.integers(0, 5), SQL)),
            data.draw(SQL),
        ]
        with contextlib.suppress(sqlite3.Error):
            if data.draw(st.booleans()):
                connection.execute("DELETE FROM sqlite_master WHERE name = ?", [data.draw(names)])
            connection.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", row)
    assert reward_of(box, task.template, connection.serialize()) in (0.0, 1.0)


@IN_SANDBOX
@given(st.integers(0, 2**32))
def test_no_damage_to_a_database_is_an_error_of_the_trainer(box, seed):
    rng = np.random.default_rng(seed)
    data = np.frombuffer(changed(task_of("sqlite", "update")).serialize(), np.uint8).copy()
    places = rng.integers(len(data) if rng.random() < 0.5 else 512, size=rng.integers(1, 30))
    data[places] = rng.integers(256, size=len(places))
    assert reward_of(box, "update", data.tobytes()) in (0.0, 1.0)


def test_whole_numbers_may_be_stored_as_floats(box):
    task = task_of("sqlite", "update")
    connection = changed(task)
    assert reward_of(box, "update", connection.serialize()) == 1.0
    name, table = next((name, t) for name, t in task.problem.goal.tables.items() if isinstance(t.rows[0][2], int))
    connection.executescript(
        f"CREATE TABLE copy ({', '.join(table.columns)}); INSERT INTO copy SELECT * FROM {name}; DROP TABLE {name}; "
        f"ALTER TABLE copy RENAME TO {name}; UPDATE {name} SET {table.columns[2]} = CAST({table.columns[2]} AS REAL)"
    )
    assert reward_of(box, "update", connection.serialize()) == 1.0


# -- where it is read --------------------------------------------------------------------------------------------------


def test_nothing_of_the_agents_is_read_in_the_trainer(box, monkeypatch):
    archive = honest(task_of("shell", "archive").problem.goal.packed)
    database = changed(task_of("sqlite", "update")).serialize()

    def refuse(*arguments, **options):
        raise AssertionError("read in the trainer")

    for module, name in ((tarfile, "open"), (sqlite3, "connect"), (zlib, "decompressobj"), (gzip, "decompress")):
        monkeypatch.setattr(module, name, refuse)
    assert reward_of(box, "archive", archive) == 1.0
    assert reward_of(box, "update", database) == 1.0


MODULES = ("hashlib", "io", "json", "posixpath", "sqlite3", "tarfile", "zlib", "sitecustomize", "usercustomize", "re")


def test_the_agents_modules_and_programs_do_not_replace_the_readers():
    task = task_of("shell", "archive")
    goal = task.problem.goal
    right = readers.digest(dict(sorted(goal.packed.items())))  # even if the agent could know it
    files = {f"{name}.py": b"print('%s'); raise SystemExit(0)" % right.encode() for name in MODULES}
    files |= {name: b"#!/bin/sh\necho %s" % right.encode() for name in ("python3", "python", "bash", "ulimit")}
    with Sandbox(limits=LIMITS, files={**task.files, **files}) as box:
        box.run(
            "chmod +x python3 python bash ulimit; cp * /tmp; export PATH=/work PYTHONPATH=/work:/tmp PYTHONHOME=/work "
            "PYTHONSTARTUP=/work/io.py BASH_ENV=/work/io.py; ulimit() { :; }; exec() { :; }; export -f ulimit exec; "
            "mkdir -p .local/lib/python3.11/site-packages; cp *.py .local/lib/python3.11/site-packages; cd /tmp"
        )
        box.kill_processes()
        for data, reward in ((b"no archive", 0.0), (honest({"a": b"x"}), 0.0), (honest(goal.packed), 1.0)):
            box.write_files({goal.archive: data})
            assert score(task, "", box) == reward


def test_a_reader_that_takes_long_is_ended(box, monkeypatch):
    monkeypatch.setattr(procedural, "_source", lambda: "while True: pass")
    box.write_files({"f": b"x"})
    start = time.monotonic()
    assert read_inside(box, "f", "archive") is None
    assert time.monotonic() - start < LIMITS.timeout_seconds
    monkeypatch.setattr(procedural, "_source", lambda: "x = []\nwhile True: x.append(bytes(1 << 20))")
    assert read_inside(box, "f", "archive") is None
    assert box.run("echo alive").head == b"alive\n"


def test_an_answer_that_is_cut_is_an_error_that_names_the_field():
    box = Sandbox(limits=Limits(output_bytes=16), files={"f.tar.gz": honest({"a": b"x"})})
    with box, pytest.raises(SandboxError, match=r"sandbox.output_bytes = 16 .*64 or more"):
        read_inside(box, "f.tar.gz", "archive")
