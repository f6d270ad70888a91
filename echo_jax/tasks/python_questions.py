"""Templates of python tasks that ask for an answer about a file.

A solution is the text of a program, because it runs in two places: here, for the right answer, and in the
demonstration.
"""

import io
import json

import numpy as np

from echo_jax.tasks.procedural import Answer, Problem, by_level, draw, names, pick
from echo_jax.tasks.python_functions import assignments


def _question(prompt: str, path: str, text: str, program: str, slip: tuple[str, str], **constants) -> Problem:
    """Returns the problem of finding what `program` prints. `slip`: a part of the program, and a beginner's version."""
    program = assignments(path=path, **constants) + program
    return Problem(
        prompt=prompt,
        files={path: text.encode()},
        solution=(f"python print(open({path!r}).read()[:80])", f"python {program}"),
        slip=f"python {program.replace(*slip)}",
        goal=Answer(_printed(program, text)),
    )


def _printed(program: str, text: str) -> str:
    """Returns what a program of this module prints if the file it reads contains `text`."""
    output: list[str] = []
    exec(
        program,
        {"open": lambda path: io.StringIO(text), "print": lambda *values: output.append(" ".join(map(str, values)))},
    )
    return " ".join(output)


def records(rng: np.random.Generator, level: int, *, revision: int = 2) -> Problem:
    words = names(rng)
    path, cities = f"{next(words)}.json", [next(words) for _ in range(level + 1)]
    rows = [
        {
            "name": next(words),
            "city": pick(rng, cities),
            "age": int(rng.integers(20, 70)),
            "score": int(rng.integers(10, 1000)),
        }
        for _ in range(by_level(level, 8, 25, 80))
    ]
    city, age = (rows[0] if revision == 1 else pick(rng, rows))["city"], 40
    of_whom = by_level(level, "", f" of those from {city}", f" of those from {city} who are older than {age}")
    condition = by_level(level, "", ' if row["city"] == city', ' if row["city"] == city and row["age"] > age')
    return _question(
        f"{path} is a list of people. What is the sum of the scores{of_whom}?",
        path,
        json.dumps(rows),
        f'import json\nprint(sum(row["score"] for row in json.load(open(path)){condition}))',
        ('"score"', '"age"'),
        city=city,
        age=age,
    )


def shortest(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    path, towns = f"{next(words)}.txt", [next(words) for _ in range(by_level(level, 7, 16, 40))]
    # A ring, so that every town can be reached, and an equal number of roads across it.
    pairs = [*zip(towns, towns[1:] + towns[:1], strict=True), *(draw(rng, towns, 2) for _ in towns)]
    roads = [f"{one} {other} {rng.integers(10, 200)}\n" for one, other in pairs]
    start, goal = draw(rng, towns, 2)
    kind, back = "two-way", "\n    roads.setdefault(b, []).append((a, int(km)))"
    if level == 3:
        kind, back = "one-way", ""
    return _question(
        f"Each line of {path} is a {kind} road: from, to, km. How many km is the shortest way from {start} to {goal}?",
        path,
        "".join(draw(rng, roads, len(roads))),
        f"""\
import heapq
roads = {{}}
for line in open(path):
    a, b, km = line.split()
    roads.setdefault(a, []).append((b, int(km))){back}
far, town, seen, queue = 0, start, set(), []
while town != goal:
    if town not in seen:
        seen.add(town)
        for other, km in roads.get(town, []):
            heapq.heappush(queue, (far + km, other))
    far, town = heapq.heappop(queue)
print(far)""",
        ("far + km", "km"),
        start=start,
        goal=goal,
    )


def words(rng: np.random.Generator, level: int) -> Problem:
    fresh = names(rng)
    path = f"{next(fresh)}.txt"
    used = [next(fresh) for _ in range(rng.integers(40, 100))]
    lines = [" ".join(pick(rng, used) for _ in range(8)) + "\n" for _ in range(by_level(level, 12, 14, 80))]
    what, program = by_level(
        level,
        ("different words are in {}", "print(len({word for line in lines for word in line}))"),
        (
            "words occur exactly once in {}",
            "from collections import Counter\n"
            "print(sum(n == 1 for n in Counter(word for line in lines for word in line).values()))",
        ),
        (
            "different pairs of words stand side by side, in this order, in more than one place within a line of {}",
            "from collections import Counter\n"
            "print(sum(n > 1 for n in Counter(pair for line in lines for pair in zip(line, line[1:])).values()))",
        ),
    )
    return _question(
        f"How many {what.format(path)}?",
        path,
        "".join(lines),
        f"lines = [line.split() for line in open(path)]\n{program}",
        ("[line.split() for", "[line for"),
    )


def grid(rng: np.random.Generator, level: int) -> Problem:
    path = f"{next(names(rng))}.txt"
    height, width, side = by_level(level, (6, 9, 0), (12, 12, int(rng.integers(2, 5))), (15, 20, 0))
    rows = rng.integers(10, 100, (height, width))
    what, program = by_level(
        level,
        ("largest sum of a row", "print(max(sum(row) for row in rows))"),
        (
            f"largest sum of a square of {side} by {side} neighbouring numbers",
            "print(max(\n    sum(sum(row[x:x + side]) for row in rows[y:y + side])\n"
            "    for y in range(len(rows) - side + 1) for x in range(len(rows[0]) - side + 1)\n))",
        ),
        (
            "smallest sum of the numbers on a way from the upper left to the lower right corner, both counted, with "
            "steps to the right and down only",
            "best = {}\n"
            "for y, row in enumerate(rows):\n"
            "    for x, number in enumerate(row):\n"
            "        before = [best[place] for place in ((x - 1, y), (x, y - 1)) if place in best]\n"
            "        best[x, y] = number + min(before, default=0)\n"
            "print(best[x, y])",
        ),
    )
    return _question(
        f"What is the {what} in the grid of numbers {path}?",
        path,
        "".join(" ".join(map(str, row)) + "\n" for row in rows),
        f"rows = [[int(number) for number in line.split()] for line in open(path)]\n{program}",
        ("max(", "min(") if level < 3 else ("(x - 1, y), (x, y - 1)", "(x - 1, y), (x - 1, y - 1)"),
        side=side,
    )


def nested(rng: np.random.Generator, level: int) -> Problem:
    words = list(names(rng))
    path, keys = f"{words[0]}.json", words[1:13]

    def make(depth: int) -> dict:
        chosen = draw(rng, keys, 2 + level)
        below = {chosen[0]: make(depth - 1), chosen[1]: make(depth - 1)} if depth else {}
        return below | {key: int(rng.integers(1, 500)) for key in chosen[2 if depth else 0 :]}

    data = make(depth=level + 1)
    key = keys[0]
    what, term = by_level(
        level,
        ("all numbers", "number"),
        (f"all numbers whose key is {key}", "number * (name == key)"),
        (
            "all numbers, each times its depth (1 in the outermost object, 2 in an object in that, and so on)",
            "number * depth",
        ),
    )
    return _question(
        f"What is the sum of {what} in {path}, however deep they are?",
        path,
        json.dumps(data),
        f"""\
import json
def total(data, depth):
    below = sum(total(value, depth + 1) for value in data.values() if isinstance(value, dict))
    return below + sum({term} for name, number in data.items() if isinstance(number, int))
print(total(json.load(open(path)), 1))""",
        ("return below + sum", "return sum"),
        key=key,
    )


def numbers(rng: np.random.Generator, level: int) -> Problem:
    path, divisor = f"{next(names(rng))}.txt", int(rng.integers(3, 10))
    lines = [f"{number}\n" for number in rng.integers(1, 1000, by_level(level, 30, 80, 120))]
    what, program = by_level(
        level,
        (f"the sum of those that {divisor} divides", "print(sum(n for n in numbers if n % divisor == 0))"),
        (
            "the sum of those that are prime",
            "print(sum(n for n in numbers if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))))",
        ),
        (
            f"the number of ways to choose two lines with a sum that {divisor} divides",
            "print(sum((n + m) % divisor == 0 for i, n in enumerate(numbers) for m in numbers[:i]))",
        ),
    )
    return _question(
        f"{path} has a number on each line. What is {what}?",
        path,
        "".join(lines),
        f"numbers = [int(line) for line in open(path)]\n{program}",
        by_level(level, ("sum(n ", "sum(1 "), (" + 1)", " - 1)"), ("numbers[:i]", "numbers")),
        divisor=divisor,
    )


def stretches(rng: np.random.Generator, level: int) -> Problem:
    path = f"{next(names(rng))}.txt"
    lines = []
    for _ in range(by_level(level, 8, 25, 60)):
        start = int(rng.integers(0, 900))
        lines.append(f"{start} {start + rng.integers(5, 80)}\n")
    what, condition = by_level(
        level, ("at least one", "n >= 1"), ("exactly one", "n == 1"), ("at least three", "n >= 3")
    )
    return _question(
        f"Each line of {path} is a stretch of a road: from km, to km. How many km of the road lie in {what} of them?",
        path,
        "".join(lines),
        f"""\
from collections import Counter
stretches = [map(int, line.split()) for line in open(path)]
covered = Counter(km for first, last in stretches for km in range(first, last))
print(sum({condition} for n in covered.values()))""",
        ("range(first, last)", "range(first, last + 1)"),
    )


def walk(rng: np.random.Generator, level: int) -> Problem:
    path, bound = f"{next(names(rng))}.txt", int(rng.integers(20, 60))
    words = ("north", "east", "south", "west") if level == 1 else ("ahead", "left", "right")
    lines = [f"{pick(rng, words)} {rng.integers(1, 30)}\n" for _ in range(by_level(level, 12, 30, 80))]
    meaning = "a direction and a number of steps"
    facing = '{"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}'
    limit, arrival = "", "to"
    if level > 1:
        meaning = "a turn (left, right, or ahead for none) and the number of steps after it; it faces north at first"
        facing = '{"left": (-dy, dx), "right": (dy, -dx), "ahead": (dx, dy)}'
    if level > 2:
        limit = f" It turns but does not move if that would end more than {bound} steps off 0 in X or in Y."
        arrival = "to if max(map(abs, to)) <= bound else (x, y)"
    return _question(
        f"A robot starts at 0 0. Each line of {path} is {meaning}.{limit} Where does it end? Submit X Y; X grows to "
        "the east, Y to the north.",
        path,
        "".join(lines),
        f"""\
x, y, dx, dy = 0, 0, 0, 1
for line in open(path):
    word, n = line.split()
    dx, dy = {facing}[word]
    to = x + dx * int(n), y + dy * int(n)
    x, y = {arrival}
print(x, y)""",
        ("print(x, y)", "print(y, x)"),
        bound=bound,
    )
