"""The databases of the sqlite tasks, and what must be in them in the end."""

import dataclasses
import datetime
import sqlite3
from collections.abc import Iterable, Mapping

import numpy as np

from echo_jax.tasks import readers
from echo_jax.tasks.procedural import Answer, Problem, by_level, draw, names, pick, read_inside
from echo_jax.tools.sandbox import Sandbox
from echo_jax.tools.shell import DATABASE


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents that the database must have in the end."""

    tables: Mapping[str, readers.Table]
    indexes: Mapping[str, str]  # name -> definition, as `readers.contents` gives it
    answer: str = ""

    def reached(self, answer: str, sandbox: Sandbox) -> bool:
        count = {name: len(table.rows) for name, table in self.tables.items()}
        found = read_inside(sandbox, DATABASE, "database", tables=count, indexes=list(self.indexes))
        return found == readers.digest((dict(self.tables), dict(self.indexes)))


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
        indexes = self.connection.execute("SELECT lower(name) FROM sqlite_master WHERE type = 'index'")
        wanted = readers.contents(self.connection, dict.fromkeys(tables, 1000), [name for (name,) in indexes])
        return self._problem(prompt, sql, slip, before, Contents(*wanted))

    def _problem(self, prompt, sql, slip, data, goal) -> Problem:
        self.connection.close()
        return Problem(
            prompt=prompt,
            files={DATABASE: data},
            solution=("sqlite SELECT sql FROM sqlite_master", f"sqlite {sql}"),
            slip=f"sqlite {slip}",
            goal=goal,
        )
