"""Templates of shell tasks that ask for an answer."""

from collections import Counter

import numpy as np

from echo_jax.tasks.procedural import Answer, Problem, by_level, draw, names, pick
from echo_jax.tasks.shell_files import csv, filler, some_paths, table, text


def total(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    folder, cities, goods = next(words), [next(words) for _ in range(5)], [next(words) for _ in range(6)]
    city, least = cities[0], int(rng.integers(20, 60))
    paths = [f"{folder}/{next(words)}.csv" for _ in range(by_level(level, 1, 1, 5))]
    tables = {path: table(rng, by_level(level, 10, 40, 60), cities, goods) for path in paths}
    amounts = [
        int(amount)
        for rows in tables.values()
        for _, where, _, amount, price in rows
        if (level < 2 or where == city) and (level < 3 or int(price) > least)
    ]
    rows = by_level(
        level, "all rows", f"the rows with city {city}", f"the rows with city {city} and price above {least}"
    )
    where = by_level(level, paths[0], paths[0], f"the files in {folder}")
    condition = by_level(level, "", f' && $2 == "{city}"', f' && $2 == "{city}" && $5 > {least}')
    command = f"awk -F, 'FNR > 1{condition} {{s += $4}} END {{print s + 0}}' {folder}/*.csv"
    return Problem(
        prompt=f"What is the sum of the column amount over {rows} of {where}?",
        files={path: csv(rows) for path, rows in tables.items()},
        solution=(f"bash head -n 2 {paths[0]}", f"bash {command}"),
        slip=f"bash {command.replace('$4', '$5')}",
        goal=Answer(str(sum(amounts))),
    )


def largest(rng: np.random.Generator, level: int, *, revision: int = 2) -> Problem:
    folder, paths = some_paths(rng, level, (".log", ".txt"))
    size_of = dict(zip(paths, draw(rng, range(100, 3000), len(paths)), strict=True))
    rank = by_level(level, 1, 1, 3)
    candidates = [path for path in paths if level == 1 or path.endswith(".log")]
    if revision > 1:
        # Any number of the other files is larger than the answer, each number as likely as the next.
        logs, others = draw(rng, candidates, len(candidates)), [path for path in paths if path not in candidates]
        larger = [*logs[: rank - 1], *draw(rng, others, int(rng.integers(len(others) + 1)))]
        smaller = [path for path in paths if path not in (*larger, logs[rank - 1])]
        order = [*draw(rng, larger, len(larger)), logs[rank - 1], *draw(rng, smaller, len(smaller))]
        sizes = dict(zip(order, sorted(size_of.values(), reverse=True), strict=True))
        size_of = {path: sizes[path] for path in paths}
    which = by_level(level, f"file in {folder}", f".log file below {folder}", f".log file below {folder}")
    find = f"find {folder} -type f -name '{by_level(level, '*', '*.log', '*.log')}' -printf '%s %p\\n'"
    take = f"tail -n {rank} | head -n 1 | cut -d ' ' -f 2"
    return Problem(
        prompt=f"Which {which} is the {by_level(level, '', '', 'third ')}largest? Submit its path.",
        files={path: filler(rng, size) for path, size in size_of.items()},
        solution=(f"bash ls -l {folder}", f"bash {find} | sort -n | {take}"),
        slip=f"bash {find} | sort | {take}",
        goal=Answer(sorted(candidates, key=size_of.get)[-rank]),
    )


def frequent(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    folder, users = next(words), [next(words) for _ in range(by_level(level, 6, 10, 14))]
    first, last = sorted(f"{hour:02}" for hour in draw(rng, range(24), 2))
    entries = []

    def add(user):
        entries.append((f"{rng.integers(24):02}:{rng.integers(60):02}", pick(rng, ["INFO", "WARN", "ERROR"]), user))

    def leaders():
        counted = (
            user
            for time, severity, user in entries
            if (level < 2 or severity == "ERROR") and (level < 3 or first <= time[:2] <= last)
        )
        return Counter(counted).most_common(2)

    for _ in range(by_level(level, 30, 90, 200)):
        add(pick(rng, users))
    while len(leaders()) < 2 or leaders()[0][1] == leaders()[1][1]:
        add(users[0])
    (user, count), _ = leaders()
    parts = np.array_split(sorted(entries), by_level(level, 1, 3, 5))
    lines = by_level(level, "lines", "ERROR lines", f"ERROR lines from {first}:00 to {last}:59")
    chosen = by_level(level, "", "/ ERROR /", f'/ ERROR / && $1 >= "{first}:00" && $1 <= "{last}:59"')
    command = f"cat {folder}/*.log | awk '{chosen} {{print $3}}' | cut -d = -f 2 | sort | uniq -c | sort -n | tail -n 1"
    return Problem(
        prompt=f"Which user has the most {lines} in the logs in {folder}? Submit COUNT USER.",
        files={
            f"{folder}/{next(words)}.log": text(f"{time} {severity} user={user}" for time, severity, user in part)
            for part in parts
        },
        solution=(f"bash head -n 2 {folder}/*.log", f"bash {command}"),
        slip=f"bash {command.replace('sort | uniq -c', 'uniq -c')}",
        goal=Answer(f"{count} {user}"),
    )


def distinct(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    folder = next(words)
    paths = [f"{folder}/{next(words)}.txt" for _ in range(by_level(level, 1, 4, 2))]
    used = [next(words) for _ in range(rng.integers(40, 150))]
    words_of = {path: [pick(rng, used) for _ in range(by_level(level, 150, 80, 200))] for path in paths}
    one, other, sets = paths[0], paths[-1], [{*file_words} for file_words in words_of.values()]
    prompt = by_level(
        level,
        f"How many different lines are in {one}?",
        f"How many different words stand in the second column of the files in {folder}, all together?",
        f"How many different lines are both in {one} and in {other}?",
    )
    command = by_level(
        level,
        f"sort -u {one} | wc -l",
        f"cat {folder}/*.txt | cut -d ' ' -f 2 | sort -u | wc -l",
        f"comm -12 <(sort -u {one}) <(sort -u {other}) | wc -l",
    )
    return Problem(
        prompt=prompt,
        files={
            path: text(f"{rng.integers(1000)} {word}" if level == 2 else word for word in file_words)
            for path, file_words in words_of.items()
        },
        solution=(f"bash head -n 3 {one}", f"bash {command}"),
        slip=f"bash {command.replace('sort -u', 'sort')}",
        goal=Answer(str(len(by_level(level, sets[0], set.union(*sets), set.intersection(*sets))))),
    )


def missing(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    whole, folder = f"{next(words)}.txt", next(words)
    paths = [f"{folder}/{next(words)}.txt" for _ in range(by_level(level, 1, 3, 6))]
    lines = [next(words) for _ in range(by_level(level, 12, 40, 90))]
    lacking, shared = lines[: level + 1], lines[level + 1 :]
    files = {whole: text(draw(rng, lines, len(lines)))}
    for i, path in enumerate(paths):
        present = [*shared[i :: len(paths)], *(next(words) for _ in range(level + 1))]
        files[path] = text(draw(rng, present, len(present)))
    command = f"comm -23 <(sort {whole}) <(sort {folder}/*)"
    return Problem(
        prompt=f"Which lines of {whole} are not in {paths[0] if level == 1 else f'any file in {folder}'}? "
        "Submit them in alphabetical order, on one line.",
        files=files,
        solution=(f"bash wc -l {whole} {folder}/*", f"bash {command}"),
        slip=f"bash {command.replace('-23', '-13')}",
        goal=Answer(" ".join(sorted(lacking))),
    )


def holder(rng: np.random.Generator, level: int, *, revision: int = 2) -> Problem:
    folder, paths = some_paths(rng, level, (".txt", ".md"))
    one, two, unwanted, *others = names(rng)
    right = pick(rng, paths)
    # Every other file fails one of the conditions.
    wrong = by_level(level, [[two]], [[one], [two]], [[one], [two], [one, two, unwanted]])
    files = {}
    for i, path in enumerate(paths):
        words = [one, two] if path == right else wrong[i % len(wrong)]
        more = 0 if revision == 1 else 3 - len(words)  # then all files have equally many lines
        words = words + draw(rng, others, 10 * level + more)
        files[path] = text(draw(rng, words, len(words)))
    prompt = by_level(
        level,
        f"Which file in {folder} contains the word {one}?",
        f"Which file below {folder} contains both {one} and {two}?",
        f"Which file below {folder} contains {one} and {two}, but not {unwanted}?",
    )
    steps = [f"grep -rl {one} {folder}", f"xargs grep -l {two}", f"xargs grep -L {unwanted}"][:level]
    slip = by_level(level, f"grep -rL {one} {folder}", steps[0], " | ".join(steps[:2]))
    return Problem(
        prompt=f"{prompt} Submit its path.",
        files=files,
        solution=(f"bash ls {folder}", f"bash {' | '.join(steps)}"),
        slip=f"bash {slip} | head -n 1",
        goal=Answer(right),
    )
