"""The databases of the sqlite tasks: made here, and checked here after the agent has used them."""

import contextlib
import dataclasses
import datetime
import sqlite3
from collections.abc import Iterable, Mapping

import numpy as np

from echo_jax.tasks.procedural import Answer, Problem, by_level, content, draw, names, pick
from echo_jax.tools.sandbox import Sandbox
from echo_jax.tools.shell import DATABASE

MAX_BYTES = 1 << 20  # of a checked database
MAX_VALUE_BYTES = 10_000  # of a value, a row or a statement in it
MAX_COLUMNS = 10
MAX_STEPS = 10_000_000  # of SQLite's virtual machine per check: a fraction of a second


@dataclasses.dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]  # sorted by their repr


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents that the database must have in the end."""

    tables: Mapping[str, Table]
    indexes: Mapping[str, str]  # name -> definition, normalised by `_plain`
    answer: str = ""

    def reached(self, answer: str, sandbox: Sandbox) -> bool:
        data = content(sandbox, DATABASE, limit=MAX_BYTES)
        if not data:
            return False
        try:
            with contextlib.closing(sqlite3.connect(":memory:")) as connection:
                connection.deserialize(_as_rollback(data))
                _distrust(connection)
                tables = {name: _table(connection, name, len(table.rows)) for name, table in self.tables.items()}
                return tables == self.tables and self.indexes.items() <= _indexes(connection).items()
        except (sqlite3.Error, UnicodeError):  # damaged, hostile, or invalid text
            return False


def _as_rollback(data: bytes) -> bytes:
    """Switches a database from a write-ahead log to rollback mode (bytes 18 and 19, sqlite.org/fileformat.html): a
    database in memory cannot have such a log. The agent's log was merged when its connection closed."""
    return data[:18] + b"\1\1" + data[20:] if data[18:20] == b"\2\2" else data


def _distrust(connection: sqlite3.Connection) -> None:
    """Limits time and memory to what an honest database needs, since the agent may have forged this one."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
    connection.set_progress_handler(lambda: True, MAX_STEPS)


def _table(connection: sqlite3.Connection, name: str, count: int) -> Table | None:
    """Returns a table, with at most `count` + 1 rows. None for a view, a virtual table or a computed column (all three
    would run the agent's code), or if it does not exist."""
    definition = connection.execute(
        "SELECT CAST(sql AS TEXT) FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE", [name]
    ).fetchone()
    # SQLite uses the name in the definition; the other columns of sqlite_master could be forged.
    if definition is None or not _plain(definition[0]).startswith(f"createtable{name}("):
        return None
    if any(is_computed for *_, is_computed in connection.execute(f"PRAGMA table_xinfo([{name}])")):
        return None
    cursor = connection.execute(f"SELECT * FROM [{name}]")
    rows = sorted(cursor.fetchmany(count + 1), key=repr)
    return Table(tuple(column[0].lower() for column in cursor.description), tuple(rows))


def _indexes(connection: sqlite3.Connection) -> dict[str, str]:
    found = connection.execute(
        "SELECT CAST(name AS TEXT), CAST(sql AS TEXT) FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    )
    return {name.lower(): _plain(sql) for name, sql in found.fetchmany(100)}


def _plain(sql: str) -> str:
    """Normalises a definition: removes spaces and quotes, and makes it lower case."""
    return sql.lower().translate(str.maketrans("", "", " \t\n\"'`[]"))


class Data:
    """A new database: people, things, and events that each join a person and a thing.

    One person and one thing have no events: the last ones or, unless `last_is_idle`, any."""

    # people, things, events, numeric column of things, numeric column of events
    _TABLES = (
        ("customers", "products", "orders", "price", "quantity"),
        ("members", "books", "loans", "pages", "weeks"),
        ("drivers", "trucks", "trips", "load", "miles"),
        ("players", "games", "matches", "size", "points"),
    )

    def __init__(self, rng: np.random.Generator, level: int, *, last_is_idle: bool = True):
        self.people, self.things, self.events, self.size, self.amount = pick(rng, self._TABLES)
        self.person, self.thing = self.people[:-1], self.things[:-1]
        words = names(rng)
        self.person_names = [next(words) for _ in range(by_level(level, 6, 15, 40))]
        self.thing_names = [next(words) for _ in range(by_level(level, 6, 12, 30))]
        self.new_names = [next(words) for _ in range(3)]
        cities = [next(words) for _ in range(by_level(level, 3, 4, 6))]
        people = [(name, pick(rng, cities)) for name in self.person_names]
        sizes = draw(rng, range(10, 1000), len(self.thing_names))
        count = by_level(level, 20, 80, 250)
        first_day = datetime.date(int(rng.integers(2000, 2030)), 1, 1)
        self.days = sorted(str(first_day + datetime.timedelta(int(day))) for day in rng.integers(0, 365, count))
        self.middle = self.days[count // 2]
        idle = len(people), len(sizes)  # their ids
        if not last_is_idle:
            idle = tuple(int(rng.integers(1, 1 + count)) for count in idle)
        events = []
        for day in self.days:
            person, thing = rng.integers(1, len(people)), rng.integers(1, len(sizes))
            person, thing = len(people) if person == idle[0] else person, len(sizes) if thing == idle[1] else thing
            events.append((int(person), int(thing), day, int(rng.integers(1, 500))))
        self.city = people[events[-1][0] - 1][1]
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.execute("PRAGMA page_size = 512")  # small files: thousands of tasks are in memory
        self._make(self.people, "name TEXT, city TEXT", people)
        self._make(self.things, f"name TEXT, {self.size} INTEGER", zip(self.thing_names, sizes, strict=True))
        self._make(self.events, f"{self.person} INTEGER, {self.thing} INTEGER, day TEXT, {self.amount} INTEGER", events)
        self.with_person = f"{self.events} JOIN {self.people} ON {self.people}.id = {self.events}.{self.person}"
        self.with_both = f"{self.with_person} JOIN {self.things} ON {self.things}.id = {self.events}.{self.thing}"

    def _make(self, table: str, columns: str, rows: Iterable[tuple]) -> None:
        self.connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {columns})")
        for number, row in enumerate(rows, start=1):
            values = ", ".join(repr(value) for value in (number, *row))
            self.connection.execute(f"INSERT INTO {table} VALUES ({values})")

    def question(self, prompt: str, sql: str, slip: str) -> Problem:
        """Returns the problem of finding what a SELECT prints."""
        rows = self.connection.execute(sql).fetchall()
        answer = " ".join("|".join(map(str, row)) for row in rows)
        return self._problem(prompt, sql, slip, self.connection.serialize(), Answer(answer))

    def change(self, prompt: str, sql: str, slip: str, new_table: str | None = None) -> Problem:
        """Returns the problem of changing the database as `sql` does."""
        before = self.connection.serialize()
        self.connection.execute(sql)
        tables = [self.people, self.things, self.events] + ([new_table] if new_table else [])
        wanted = {name: _table(self.connection, name, count=1000) for name in tables}
        return self._problem(prompt, sql, slip, before, Contents(wanted, _indexes(self.connection)))

    def _problem(self, prompt, sql, slip, data, goal) -> Problem:
        self.connection.close()
        return Problem(
            prompt=prompt,
            files={DATABASE: data},
            solution=("sqlite SELECT sql FROM sqlite_master", f"sqlite {sql}"),
            slip=f"sqlite {slip}",
            goal=goal,
        )
