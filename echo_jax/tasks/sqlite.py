"""Sqlite: questions about a database, and changes to it. Always the same three tables, with varying names and new rows.

Levels: more rows, more tables to join, more conditions.
Revision 2: where a task asks for what has no events, that is not always the last row.
"""

import datetime
from functools import partial

import numpy as np

from echo_jax.tasks.procedural import Problem, ProceduralFamily, by_level, draw, pick
from echo_jax.tasks.sqlite_data import Data

NAMES = "Submit their names in alphabetical order, on one line."


# -- questions ---------------------------------------------------------------------------------------------------------


def total(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    person, city, least = pick(rng, d.person_names[:4]), d.city, int(rng.integers(100, 500))
    which, rows = by_level(
        level,
        (f"{d.person} {person}", f"{d.with_person} WHERE {d.people}.name = '{person}'"),
        (f"all {d.people} from {city}", f"{d.with_person} WHERE city = '{city}'"),
        (
            f"all {d.people} from {city}, for {d.things} with {d.size} above {least}",
            f"{d.with_both} WHERE city = '{city}' AND {d.size} > {least}",
        ),
    )
    return d.question(
        f"What is the sum of {d.amount} over the {d.events} of {which}?",
        f"SELECT coalesce(sum({d.amount}), 0) FROM {rows}",
        f"SELECT count({d.amount}) FROM {rows}",
    )


def top(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    month = pick(rng, d.days)[:7]
    group, rows = by_level(
        level,
        (f"{d.people}.name", d.with_person),
        (f"{d.things}.name", f"{d.with_both} WHERE day >= '{d.middle}'"),
        ("city", f"{d.with_both} WHERE day LIKE '{month}%'"),
    )
    of_what = by_level(
        level,
        d.person,
        f"{d.thing}, counting {d.events} from {d.middle} on,",
        f"city of {d.people}, counting {d.events} in {month},",
    )
    ranking = f"SELECT {group}, sum({d.amount}) AS total FROM {rows} GROUP BY {group} ORDER BY total DESC"
    totals = [row[1] for row in d.connection.execute(f"{ranking} LIMIT 2")]
    if 0 < len(totals) == len({*totals}):
        return d.question(
            f"Which {of_what} has the largest total of {d.amount}? Submit NAME|TOTAL.",
            f"{ranking} LIMIT 1",
            f"{ranking.replace('sum', 'max')} LIMIT 1",
        )
    return top(rng, level)  # no unique winner: draw again


def having(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    table = by_level(level, d.people, d.people, d.things)
    key = by_level(level, d.person, d.person, d.thing)
    condition = by_level(level, "", f"WHERE {d.amount} > 100 ", f"WHERE {d.amount} > 100 AND day >= '{d.middle}' ")
    which = by_level(level, "", f" with {d.amount} above 100", f" with {d.amount} above 100 from {d.middle} on")
    groups = f"FROM {d.events} JOIN {table} ON {table}.id = {d.events}.{key} {condition}GROUP BY {table}.id"
    counts = sorted(row[0] for row in d.connection.execute(f"SELECT count(*) {groups}"))
    least = counts[-min(3, len(counts))]
    return d.question(
        f"Which {table} have at least {least} {d.events}{which}? {NAMES}",
        f"SELECT {table}.name {groups} HAVING count(*) >= {least} ORDER BY {table}.name",
        f"SELECT {table}.name {groups} HAVING count(*) > {least} ORDER BY {table}.name",
    )


def above_average(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    average = f"(SELECT avg({d.size}) FROM {d.things})"
    personal = f"(SELECT avg({d.amount}) FROM {d.events} AS own WHERE own.{d.person} = {d.events}.{d.person})"
    return d.question(
        *by_level(
            level,
            (
                f"Which {d.things} have a {d.size} above the average {d.size} of all {d.things}? {NAMES}",
                f"SELECT name FROM {d.things} WHERE {d.size} > {average} ORDER BY name",
                f"SELECT name FROM {d.things} WHERE {d.size} < {average} ORDER BY name",
            ),
            (
                f"What is the sum of {d.amount} over the {d.events} of {d.things} whose {d.size} is above the average "
                f"{d.size} of all {d.things}?",
                f"SELECT sum({d.amount}) FROM {d.with_both} WHERE {d.size} > {average}",
                f"SELECT sum({d.size}) FROM {d.with_both} WHERE {d.size} > {average}",
            ),
            (
                f"What is the sum of {d.amount} over those {d.events} in which it is above its average over all "
                f"{d.events} of the same {d.person}?",
                f"SELECT sum({d.amount}) FROM {d.events} WHERE {d.amount} > {personal}",
                f"SELECT sum({d.amount}) FROM {d.events} WHERE {d.amount} > (SELECT avg({d.amount}) FROM {d.events})",
            ),
        )
    )


def dates(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    month, city = pick(rng, d.days)[:7], d.city
    first, last = sorted(draw(rng, sorted({*d.days}), 2))
    weekday = pick(rng, ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"])
    number = datetime.date(2000, 1, 2)
    number = next(i for i in range(7) if f"{number + datetime.timedelta(i):%A}" == weekday)
    when, rows = by_level(
        level,
        (f"in {month}", f"{d.events} WHERE day LIKE '{month}%'"),
        (
            f"from {first} to {last}, both days included, by {d.people} from {city}",
            f"{d.with_person} WHERE day BETWEEN '{first}' AND '{last}' AND city = '{city}'",
        ),
        (
            f"on any {weekday}, by {d.people} from {city}",
            f"{d.with_person} WHERE strftime('%w', day) = '{number}' AND city = '{city}'",
        ),
    )
    return d.question(
        f"What is the sum of {d.amount} over the {d.events} {when}?",
        f"SELECT coalesce(sum({d.amount}), 0) FROM {rows}",
        f"SELECT coalesce(sum({d.amount}), 0) FROM {rows.split(' WHERE')[0]}",
    )


def never(rng: np.random.Generator, level: int, *, revision: int = 2) -> Problem:
    d = Data(rng, level, last_is_idle=revision == 1)
    middle, city = d.days[len(d.days) // 2], d.city
    table, key, which, condition = by_level(
        level,
        (d.things, d.thing, "", ""),
        (d.people, d.person, f" from {middle} on", f" WHERE day >= '{middle}'"),
        (
            d.things,
            d.thing,
            f" by {d.people} from {city}",
            f" JOIN {d.people} p ON p.id = {d.person} WHERE city = '{city}'",
        ),
    )
    found = f"(SELECT {key} FROM {d.events}{condition})"
    return d.question(
        f"Which {table} have no {d.events}{which}? {NAMES}",
        f"SELECT name FROM {table} WHERE id NOT IN {found} ORDER BY name",
        f"SELECT name FROM {table} WHERE id IN {found} ORDER BY name",
    )


# -- changes -----------------------------------------------------------------------------------------------------------


def update(rng: np.random.Generator, level: int, *, revision: int = 2) -> Problem:
    d = Data(rng, level, last_is_idle=revision == 1)
    thing, city, more = pick(rng, d.thing_names), d.city, int(rng.integers(2, 50))
    of_city = f"{d.person} IN (SELECT id FROM {d.people} WHERE city = '{city}')"
    unused = f"id NOT IN (SELECT {d.thing} FROM {d.events})"
    return d.change(
        *by_level(
            level,
            (
                f"Set the {d.size} of {d.thing} {thing} to {more + 1000}.",
                f"UPDATE {d.things} SET {d.size} = {more + 1000} WHERE name = '{thing}'",
                f"UPDATE {d.things} SET {d.size} = {more + 1000}",
            ),
            (
                f"Add {more} to the {d.size} of every {d.thing} that has no {d.events}.",
                f"UPDATE {d.things} SET {d.size} = {d.size} + {more} WHERE {unused}",
                f"UPDATE {d.things} SET {d.size} = {more} WHERE {unused}",
            ),
            (
                f"Add {more} to {d.amount} in the {d.events} from {d.middle} on of {d.people} from {city}.",
                f"UPDATE {d.events} SET {d.amount} = {d.amount} + {more} WHERE day >= '{d.middle}' AND {of_city}",
                f"UPDATE {d.events} SET {d.amount} = {d.amount} + {more} WHERE day > '{d.middle}' OR {of_city}",
            ),
        )
    )


def delete(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    day, city = pick(rng, d.days[len(d.days) // 4 :]), d.city
    person = d.connection.execute(f"SELECT name FROM {d.with_person} WHERE day = ?", [day]).fetchone()[0]
    of_person = f"{d.person} = (SELECT id FROM {d.people} WHERE name = '{person}')"
    of_city = f"{d.person} IN (SELECT id FROM {d.people} WHERE city <> '{city}')"
    which, condition = by_level(
        level,
        (f"before {day}", f"day < '{day}'"),
        (f"of {d.person} {person} up to {day}, that day included", f"day <= '{day}' AND {of_person}"),
        (
            f"before {day} of {d.people} who are not from {city}, where {d.amount} is below 250",
            f"day < '{day}' AND {d.amount} < 250 AND {of_city}",
        ),
    )
    return d.change(
        f"Delete the {d.events} {which}.",
        f"DELETE FROM {d.events} WHERE {condition}",
        f"DELETE FROM {d.events} WHERE {condition.split(' AND ')[0].replace('<', '>')}",
    )


def insert(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    number, amount, day = int(rng.integers(1000, 9999)), int(rng.integers(1, 500)), pick(rng, d.days)
    person, thing, new = pick(rng, d.person_names), pick(rng, d.thing_names), d.new_names[0]
    of_person = f"(SELECT id FROM {d.people} WHERE name = '{person}')"
    which, of_thing = thing, f"(SELECT id FROM {d.things} WHERE name = '{thing}')"
    if level == 3:
        which, of_thing = f"with the largest {d.size}", f"(SELECT id FROM {d.things} ORDER BY {d.size} DESC LIMIT 1)"
    if level == 1:
        return d.change(
            f"Add a row to {d.people}: id {number}, name {new}, city {d.city}.",
            f"INSERT INTO {d.people} VALUES ({number}, '{new}', '{d.city}')",
            f"INSERT INTO {d.people} VALUES ({number}, '{d.city}', '{new}')",
        )
    return d.change(
        f"Add a row to {d.events}: id {number}, {d.person} {person}, the {d.thing} {which}, day {day}, "
        f"{d.amount} {amount}.",
        f"INSERT INTO {d.events} VALUES ({number}, {of_person}, {of_thing}, '{day}', {amount})",
        f"INSERT INTO {d.events} VALUES ({number}, '{person}', {of_thing}, '{day}', {amount})",
    )


def index(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    name = "_".join(d.new_names[:2])
    first, second, third = draw(rng, [d.person, d.thing, "day", d.amount], 3)
    columns = by_level(level, [first], [first, second], [first, second, third, "id"])
    kind, adjective = ("UNIQUE INDEX", "a unique") if level == 3 else ("INDEX", "an")
    return d.change(
        f"Make {adjective} index {name} on {d.events} ({', '.join(columns)}).",
        f"CREATE {kind} {name} ON {d.events} ({', '.join(columns)})",
        f"CREATE INDEX {name} ON {d.events} ({', '.join(columns[::-1] if level > 1 else [second])})",
    )


def summary(rng: np.random.Generator, level: int) -> Problem:
    d = Data(rng, level)
    table, least = "_".join(d.new_names[:2]), int(rng.integers(300, 900))
    group = by_level(level, f"{d.people}.name", f"{d.things}.name", "city")
    column = by_level(level, "name", "name", "city")
    of_what = by_level(level, f"{d.person} with {d.events}", f"{d.thing} with {d.events}", f"city of {d.people}")
    condition = only = ""
    if level > 1:
        condition, only = f" HAVING sum({d.amount}) > {least}", f", but only where it is above {least}"
    select = f"SELECT {group} AS {column}, sum({d.amount}) AS total FROM {d.with_both} GROUP BY {group}"
    return d.change(
        f"Make a table {table} with the columns {column} and total: for every {of_what} the sum of {d.amount} over the "
        f"{d.events}{only}.",
        f"CREATE TABLE {table} AS {select}{condition}",
        f"CREATE TABLE {table} AS {select.replace('sum', 'max')}{condition}",
        new_table=table,
    )


class SqliteFamily(ProceduralFamily):
    name = "sqlite"
    tools = ("sqlite",)
    templates = {  # noqa: RUF012
        "total": total,
        "top": top,
        "having": having,
        "above_average": above_average,
        "dates": dates,
        "never": never,
        "update": update,
        "delete": delete,
        "insert": insert,
        "index": index,
        "summary": summary,
    }
    first_templates = {"never": partial(never, revision=1), "update": partial(update, revision=1)}  # noqa: RUF012
