"""Templates of shell tasks that ask for a deed: certain files must exist in the end, others must not."""

import dataclasses
import posixpath
from collections.abc import Mapping

import numpy as np

from echo_jax.tasks import readers
from echo_jax.tasks.procedural import Problem, by_level, content, draw, holds, names, pick, read_inside
from echo_jax.tasks.shell_files import COLUMNS, csv, filler, some_paths, table, text
from echo_jax.tools.sandbox import Sandbox


@dataclasses.dataclass(frozen=True)
class EndState:
    """The required state below /work in the end. Anything else that the agent leaves there does not matter."""

    files: Mapping[str, bytes]
    gone: tuple[str, ...] = ()
    condition: str = "true"  # for bash in /work
    archive: str = ""  # a .tar.gz that must hold exactly `packed`
    packed: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    answer: str = ""

    def reached(self, answer: str, sandbox: Sandbox) -> bool:
        gone = [f"[ ! -e {path} ] && [ ! -L {path} ]" for path in self.gone]
        return (
            holds(sandbox, " && ".join([*gone, self.condition]))
            and all(
                # The final newline may be missing: `printf` is as good as `echo`.
                content(sandbox, path, limit=len(wanted)) in (wanted, wanted.removesuffix(b"\n"))
                for path, wanted in self.files.items()
            )
            and (not self.archive or self._is_packed(sandbox))
        )

    def _is_packed(self, sandbox: Sandbox) -> bool:
        """Returns whether the archive holds the right files. It is not unpacked: what it restores may be links, say."""
        return read_inside(sandbox, self.archive, "archive") == readers.digest(dict(sorted(self.packed.items())))


def rename(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".txt", ".csv"))
    files = {path: filler(rng, 40) for path in paths}
    moved = {path: path.replace(".txt", ".md") for path in paths if path.endswith(".txt")}
    if level == 3:
        moved = {path: f"{folder}/{posixpath.basename(new)}" for path, new in moved.items()}
    what = by_level(
        level,
        f"Rename every .txt file in {folder}",
        f"Rename every .txt file below {folder}",
        f"Move every .txt file below {folder} into {folder} itself, and rename it",
    )
    new = f'{folder}/"$(basename "$f" .txt).md"' if level == 3 else '"${f%.txt}.md"'
    command = f"find {folder} -name '*.txt' | while read -r f; do mv \"$f\" {new}; done"
    return Problem(
        prompt=f"{what} so that it ends in .md instead.",
        files=files,
        solution=(f"bash find {folder} -type f | head -n 4", f"bash {command}"),
        slip=f"bash {command.replace(new, '$f.md')}",
        goal=EndState({moved.get(path, path): data for path, data in files.items()}, gone=tuple(moved)),
    )


def remove(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".log", ".tmp", ".txt"))
    size_of = dict(zip(paths, draw(rng, range(100, 900), len(paths)), strict=True))
    limit = int(rng.integers(300, 600))
    size_of |= by_level(level, {}, dict.fromkeys(draw(rng, paths, 5), 0), {})
    size_of[next(path for path in paths if path.endswith(".log"))] = by_level(level, 100, 0, limit + 1)
    files = {path: filler(rng, size) for path, size in size_of.items()}
    gone = [
        path
        for path, size in size_of.items()
        if by_level(level, path.endswith(".tmp"), size == 0, path.endswith(".log") and size > limit)
    ]
    what = by_level(
        level,
        f".tmp file in {folder}",
        f"empty file below {folder}",
        f".log file below {folder} that is larger than {limit} bytes",
    )
    command, slip = by_level(
        level,
        (f"rm {folder}/*.tmp", f"rm {folder}/*"),
        (f"find {folder} -type f -empty -delete", f"find {folder} -maxdepth 1 -empty -delete"),
        (f"find {folder} -name '*.log' -size +{limit}c -delete", f"find {folder} -name '*.log' -size +{limit} -delete"),
    )
    return Problem(
        prompt=f"Remove every {what}, and no other file.",
        files=files,
        solution=(f"bash ls -l {folder} | head -n 4", f"bash {command}"),
        slip=f"bash {slip}",
        goal=EndState({path: data for path, data in files.items() if path not in gone}, gone=tuple(gone)),
    )


def replace(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".conf", ".txt"))
    old, new, *words = names(rng)

    def lines():
        for _ in range(6):
            yield f"{pick(rng, ['host', 'path', 'user'])} {' '.join(draw(rng, [old, *words[:20]], 4 * level))}"
        yield f"host {old} {pick(rng, words)} {old}"  # twice in one line
        yield f"path {old}"

    def edited(path: str, line: str) -> str:
        concerned = path.endswith(".conf") and (level < 3 or line.startswith("host"))
        return line.replace(old, new) if concerned else line

    lines_of = {path: [*lines()] for path in paths}
    where = by_level(
        level, f"in {folder}", f"below {folder}", f"below {folder}, but only in lines that begin with host"
    )
    only = by_level(level, "", "", "/^host/")
    command = f"find {folder} -name '*.conf' -exec sed -i '{only}s/{old}/{new}/g' {{}} +"
    return Problem(
        prompt=f"Replace {old} by {new} everywhere in the .conf files {where}. Leave other files as they are.",
        files={path: text(lines) for path, lines in lines_of.items()},
        solution=(f"bash grep -rc {old} {folder} | head -n 3", f"bash {command}"),
        slip=f"bash {command.replace('/g', '/')}",
        goal=EndState({path: text(edited(path, line) for line in lines) for path, lines in lines_of.items()}),
    )


def permissions(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".sh", ".txt"))
    scripts = draw(rng, paths, 12) if level == 3 else [path for path in paths if path.endswith(".sh")]
    first = {path: b"#!/bin/sh\n" if path in scripts else b"#\n" for path in paths}
    files = {path: first[path] + b"echo " + filler(rng, 20) for path in paths}
    what, chosen = by_level(
        level,
        (f".sh file in {folder}", f"{folder}/*.sh"),
        (f".sh file below {folder}", f"$(find {folder} -name '*.sh')"),
        (f"file below {folder} whose first line is #!/bin/sh", f"$(grep -rl '^#!/bin/sh' {folder})"),
    )
    mode = pick(rng, ["500", "555", "700", "711", "750", "755"])
    modes = " ".join(mode if path in scripts else "644" for path in paths)
    return Problem(
        prompt=f"Set the permissions to {mode} for every {what}. Leave other files as they are.",
        files=files,
        solution=(f"bash ls -l {folder} | head -n 4", f"bash chmod {mode} {chosen}"),
        slip=f"bash chmod -R {mode} {folder}",
        goal=EndState(files, condition=f'[ "$(echo $(stat -c %a {" ".join(paths)}))" = "{modes}" ]'),
    )


def sort(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    folder, target = next(words), f"{next(words)}.txt"
    paths = [f"{folder}/{next(words)}.txt" for _ in range(by_level(level, 1, 1, 5))]
    keys = [next(words) for _ in range(by_level(level, 12, 40, 100))]
    numbers = draw(rng, range(5, 2000), len(keys))
    keep = int(rng.integers(5, 20))
    if level == 1:
        lines = [pick(rng, keys) for _ in range(20)]
        result = sorted({*lines})
    else:
        ranked = sorted(zip(numbers, keys, strict=True), reverse=True)
        result = [f"{key} {number}" for number, key in ranked][: by_level(level, None, None, keep)]
        lines = [f"{key} {number}" for number, key in zip(numbers, keys, strict=True)]
    what, command = by_level(
        level,
        (f"the lines of {paths[0]}, sorted and each once,", f"sort -u {paths[0]}"),
        (f"the lines of {paths[0]}, the largest number first,", f"sort -k 2 -n -r {paths[0]}"),
        (
            f"the {keep} lines with the largest numbers of all files in {folder}, the largest first,",
            f"cat {folder}/* | sort -k 2 -n -r | head -n {keep}",
        ),
    )
    return Problem(
        prompt=f"Write {what} to {target}.",
        files={path: text(lines[i :: len(paths)]) for i, path in enumerate(paths)},
        solution=(f"bash head -n 3 {paths[0]}", f"bash {command} > {target}"),
        slip=f"bash {command.replace(' -u', '').replace(' -n -r', ' -r')} > {target}",
        goal=EndState({target: text(result)}),
    )


def columns(rng: np.random.Generator, level: int) -> Problem:
    words = names(rng)
    source, target = f"{next(words)}.csv", f"{next(words)}.csv"
    cities, goods = [next(words) for _ in range(3)], [next(words) for _ in range(6)]
    rows = table(rng, by_level(level, 8, 30, 60), cities, goods)
    left, right = draw(rng, range(len(COLUMNS)), 2)
    city = pick(rng, rows)[1]
    chosen = [row for row in rows if level == 1 or row[1] == city]
    if level == 3:
        chosen.sort(key=lambda row: int(row[3]))
    which = by_level(
        level, "all rows", f"the rows with city {city}", f"the rows with city {city}, the smallest amount first,"
    )
    print_them = f'{{print ${left + 1} "," ${right + 1}}}'
    condition = "" if level == 1 else f' && $2 == "{city}"'
    given = by_level(level, source, source, f"<(sort -t , -k 4 -n {source})")
    return Problem(
        prompt=f"Write the columns {COLUMNS[left]} and {COLUMNS[right]} of {which} of {source} to {target}: in this "
        "order, separated by a comma, without a header.",
        files={source: csv(rows)},
        solution=(
            f"bash head -n 3 {source}",
            f"""bash awk -F, '$1 != "id"{condition} {print_them}' {given} > {target}""",
        ),
        slip=f"bash cut -d , -f {left + 1},{right + 1} {source} > {target}",
        goal=EndState({target: text(f"{row[left]},{row[right]}" for row in chosen)}),
    )


def archive(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".txt", ".log"))
    target = f"{next(names(rng))}.tar.gz"
    files = {path: filler(rng, int(rng.integers(20, 200))) for path in paths}
    packed = sorted(path for path in paths if level == 1 or path.endswith(".txt"))
    gone = packed if level == 3 else []
    what = by_level(
        level,
        f"Pack the folder {folder}",
        f"Pack the .txt files below {folder}, and no other files, with their paths",
        f"Move the .txt files below {folder}, and no other files, with their paths",
    )
    whole = f"tar -czf {target} {folder}"
    options = by_level(level, "", "", " --remove-files")
    command = f"find {folder} -name '*.txt' | tar -czf {target}{options} -T -"
    return Problem(
        prompt=f"{what} into {target}, a tar archive compressed by gzip.",
        files=files,
        solution=(f"bash find {folder} -type f | head -n 4", f"bash {by_level(level, whole, command, command)}"),
        slip=f"bash {by_level(level, f'gzip -r {folder}', whole, whole)}",
        goal=EndState(
            {path: data for path, data in files.items() if path not in gone},
            gone=tuple(gone),
            archive=target,
            packed={path: files[path] for path in packed},
        ),
    )


def links(rng: np.random.Generator, level: int) -> Problem:
    folder, paths = some_paths(rng, level, (".txt", ".log"))
    new, missing, *_ = (name for name in names(rng) if not any(name in path for path in paths))
    texts = [path for path in paths if path.endswith(".txt")]
    linked = {path.replace(".txt", ".link"): path for path in texts}
    broken = [path.replace(".log", ".link") for path in paths if path.endswith(".log")] if level == 3 else []
    target = pick(rng, paths)
    leads_to = by_level(level, {new: target}, {f"{new}/{posixpath.basename(path)}": path for path in texts}, linked)
    symlinks = {link: posixpath.basename(path) for link, path in linked.items()} | dict.fromkeys(broken, missing)
    prompt, command, slip = by_level(
        level,
        (f"Make a symbolic link {new} that leads to {target}.", f"ln -s {target} {new}", f"ln -s {new} {target}"),
        (
            f"Make a folder {new}, with a symbolic link to each .txt file below {folder} under the same name.",
            f"mkdir {new}; for f in $(find {folder} -name '*.txt'); do ln -s /work/$f {new}; done",
            f"mkdir {new}; for f in $(find {folder} -name '*.txt'); do ln -s $f {new}; done",
        ),
        (
            f"Remove every broken symbolic link below {folder}, and nothing else.",
            f"find {folder} -xtype l -delete",
            f"find {folder} -type l -delete",
        ),
    )
    files = {path: filler(rng, 40) for path in paths}
    return Problem(
        prompt=prompt,
        files=files,
        symlinks=by_level(level, {}, {}, symlinks),
        solution=(f"bash ls -l {folder} | head -n 4", f"bash {command}"),
        slip=f"bash {slip}",
        goal=EndState(
            files,
            gone=tuple(broken),
            condition=" && ".join(f"[ -L {link} ] && [ {link} -ef {path} ]" for link, path in leads_to.items()),
        ),
    )
