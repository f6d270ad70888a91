"""Readers of what an agent left behind: archives and databases.

An archive or a database can be made to hang, recurse or fill the memory of the program that reads it. So the trainer
only sends this module's source to the sandbox, where a fresh interpreter runs it within limits (`read_inside` in
procedural.py). In: a file's content. Out: one line, a digest of what is in it. The right values never enter the
sandbox: the host compares the digest with that of the right facts.

It imports only the standard library, since nothing else is there.
"""

import hashlib
import io
import json
import posixpath
import sqlite3
import sys
import tarfile
import zlib
from collections import namedtuple

MAX_BYTES = 1 << 20  # of a file that is read; also of an archive's content
MAX_VALUE_BYTES = 10_000  # of a value, a row or a statement in a database
MAX_COLUMNS = 10

Table = namedtuple("Table", "columns rows")  # names, lower case; tuples, sorted by their repr


def digest(facts):
    """Returns 32 letters that tell tuples, dicts, text, bytes and numbers apart. The order in a dict counts."""
    return hashlib.sha256(ascii(facts).encode()).hexdigest()[:32]


def archive(data):
    """Returns {path: content} of a .tar.gz, sorted; raises an exception if it is damaged, holds anything but plain
    files and folders, or more than `MAX_BYTES`."""
    inflate = zlib.decompressobj(wbits=31)  # gzip
    plain = inflate.decompress(data, MAX_BYTES)
    if inflate.unconsumed_tail:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    found, left = {}, MAX_BYTES
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
        for member in tar:
            if not (member.isdir() or member.isreg()) or member.issparse():
                raise ValueError(f"a member of type {member.type}")
            left -= member.size
            if left < 0:
                raise ValueError(f"more than {MAX_BYTES} bytes")
            if member.isreg():
                found[posixpath.normpath(member.name)] = tar.extractfile(member).read()
    return dict(sorted(found.items()))


def database(data, tables, indexes):
    """Returns `contents` of a database file."""
    # Bytes 18 and 19 (sqlite.org/fileformat.html): a database in memory cannot have a write-ahead log. The agent's log
    # was merged when its connection closed.
    if data[18:20] == b"\2\2":
        data = data[:18] + b"\1\1" + data[20:]
    connection = sqlite3.connect(":memory:")
    connection.deserialize(data)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
    return contents(connection, tables, indexes)


def contents(connection, tables, indexes):
    """Returns ({name: Table or None}, {name: definition or None}) for these tables and indexes.

    Args:
      tables: name -> how many rows it should have; at most one more is read.
      indexes: names.
    """
    found = connection.execute(
        "SELECT CAST(name AS TEXT), CAST(sql AS TEXT) FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    definitions = {name.lower(): _plain(sql) for name, sql in found.fetchmany(100)}
    return (
        {name: _table(connection, name, count) for name, count in tables.items()},
        {name: definitions.get(name) for name in indexes},
    )


def _table(connection, name, count):
    """Returns a table; None for a view, a virtual table or a computed column (all three would run the agent's code), or
    if it does not exist."""
    definition = connection.execute(
        "SELECT CAST(sql AS TEXT) FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE", [name]
    ).fetchone()
    # SQLite uses the name in the definition; the other columns of sqlite_master could be forged.
    if definition is None or not _plain(definition[0]).startswith(f"createtable{name}("):
        return None
    if any(is_computed for *_, is_computed in connection.execute(f"PRAGMA table_xinfo([{name}])")):
        return None
    cursor = connection.execute(f"SELECT * FROM [{name}]")
    rows = sorted((tuple(map(_number, row)) for row in cursor.fetchmany(count + 1)), key=repr)
    return Table(tuple(column[0].lower() for column in cursor.description), tuple(rows))


def _number(value):
    """Returns a whole float as an integer, which equals it; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain(sql):
    """Normalises a definition: removes spaces and quotes, and makes it lower case."""
    return sql.lower().translate(str.maketrans("", "", " \t\n\"'`[]"))


def main(name, path, arguments):
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES)
    print(digest({"archive": archive, "database": database}[name](data, **json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
