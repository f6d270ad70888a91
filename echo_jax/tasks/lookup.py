"""Lookup: find a fact in a random tree of small files. The contents are random; the agent learns how to search.

Revision 2: the word that a question about a file names is a value in that file and a key in all others, so that a
search for the word alone finds every file.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from echo_jax.tasks.task import FinishedEpisode, Script, Split, Task, check_revision
from echo_jax.tasks.words import WORDS

KEYED_LINES = 3  # lines "key value" per file, the first and last line among them; the others are filler
LINES = (12, 100)  # range of a file's length, wide enough that the number of lines cannot be guessed

MIN_VALUES = 50  # words left for values: a guess is right in at most one of 50 cases

# template -> (prompt, the command that answers it)
TEMPLATES = {
    "value": ("value of {key}", "grep -rh {key} ."),
    "file": ("file with value {key}", "grep -rl {key}$ ."),
    "lines": ("lines in {path}", "wc -l < {path}"),
    "first": ("first value in {path}", "head -n 1 {path}"),
    "last": ("last value in {path}", "tail -n 1 {path}"),
}
FIRST_TEMPLATES = TEMPLATES | {"file": ("file with {key}", "grep -rl {key} .")}  # of revision 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupTask(Task):
    """Answered by `submit`; see `TEMPLATES` for the questions."""

    template: str
    command: str
    answer: str
    values: tuple[str, ...]  # the words that a value could have been
    templates: Mapping[str, tuple[str, str]]  # of the task's revision

    def score(self, episode: FinishedEpisode) -> float:
        given = (episode.answer or "").strip().removeprefix("./")
        return float(given == self.answer.removeprefix("./"))

    def demonstrate(self, rng: np.random.Generator, *, solve: bool) -> Script:
        if solve:
            yield f"bash {self.command}"
            yield f"submit {self.answer}"
            return
        flaw = rng.choice(["other command", "other answer", "list first", "guess"])
        if flaw == "guess":
            yield f"submit {_guess(self, rng)}"
            return
        command = self.command
        if flaw == "list first":
            command = "ls"
        elif flaw == "other command":
            operand = self.prompt.split()[-1]
            other = self.templates[rng.choice([t for t in self.templates if t != self.template])][1]
            command = other.format(key=operand, path=operand)
        observation = yield f"bash {command}"
        seen = observation.split()
        if flaw == "other command" and seen and len(seen) < 4:
            yield f"submit {seen[-1]}"
        else:
            yield f"submit {_guess(self, rng)}"


def _guess(task: LookupTask, rng: np.random.Generator) -> str:
    """Returns an answer of the right kind, almost always wrong."""
    if task.template == "file":
        return "./" + str(rng.choice(sorted(task.files)))
    if task.template == "lines":
        return str(rng.integers(*LINES))
    return str(rng.choice(task.values))


@dataclasses.dataclass(frozen=True)
class LookupFamily:
    """Trees of `files` files in `folders` folders; names, keys and values are drawn from the first `words` of
    `WORDS`."""

    folders: int
    files: int
    words: int
    revision: int = 1
    newest_revision: ClassVar[int] = 2

    def __post_init__(self):
        check_revision("lookup", self.revision, self.newest_revision)
        if min(self.folders, self.files) < 1:
            raise ValueError(
                f"task.lookup: {self.folders} folders and {self.files} files; there must be at least one of each"
            )
        needed = self.folders + self.files * (1 + KEYED_LINES) + MIN_VALUES
        if not needed <= len(self._words) <= self.words <= len(WORDS):
            raise ValueError(
                f"task.lookup.words = {self.words} yields {len(self._words)} usable words, but {self.folders} folders "
                f"and {self.files} files need at least {needed}; words must be at most {len(WORDS)}"
            )

    @functools.cached_property
    def _words(self) -> list[str]:
        """Words that contain no other word: a search for "crow" would also find "crown"."""
        words = WORDS[: max(self.words, 0)]
        return [word for word in words if not any(other in word for other in words if other != word)]

    def make(self, split: Split, index: int) -> LookupTask:
        rng = np.random.default_rng([{"train": 1, "heldout": 2}[split], index])
        # Folders, files and keys are distinct words, so that a search for a key finds one line and no value.
        names = [str(word) for word in rng.permutation(self._words)]
        folders, names = names[: self.folders], names[self.folders :]
        files, keys = names[: self.files], names[self.files : self.files * (1 + KEYED_LINES)]
        values = names[self.files * (1 + KEYED_LINES) :]
        paths = [f"{folders[i % self.folders]}/{file}" for i, file in enumerate(files)]
        lines_of, table = {}, {}
        for i, path in enumerate(paths):
            file_keys = keys[i * KEYED_LINES : (i + 1) * KEYED_LINES]
            length = int(rng.integers(*LINES))
            inner = 1 + rng.choice(length - 2, KEYED_LINES - 2, replace=False)
            lines = ["-"] * length
            for row, key in zip([0, *sorted(inner), length - 1], file_keys, strict=True):
                value = str(rng.choice(values))
                lines[row] = f"{key} {value}"
                table[key] = (path, value)
            lines_of[path] = lines
        templates = FIRST_TEMPLATES if self.revision == 1 else TEMPLATES
        template = str(rng.choice(list(templates)))
        key, path = str(rng.choice(keys)), str(rng.choice(paths))
        if template == "file" and self.revision > 1:
            _spread(key, table[key][0], lines_of, rng)
        text = lines_of[path]
        answer = {
            "value": table[key][1],
            "file": "./" + table[key][0],
            "lines": str(len(text)),
            "first": text[0].split()[1],
            "last": text[-1].split()[1],
        }[template]
        prompt, command = (part.format(key=key, path=path) for part in templates[template])
        return LookupTask(
            name=f"lookup/{split}/{index}",
            prompt=prompt,
            files={path: "".join(line + "\n" for line in lines).encode() for path, lines in lines_of.items()},
            template=template,
            command=command,
            answer=answer,
            values=tuple(values),
            templates=templates,
        )


def _spread(word: str, home: str, lines_of: Mapping[str, list[str]], rng: np.random.Generator) -> None:
    """Makes a word, so far a key in the file `home`, a value there and a key in every other file."""
    for path, lines in lines_of.items():
        keyed = [row for row, line in enumerate(lines) if line != "-" and (path != home or line.split()[0] == word)]
        row = keyed[int(rng.integers(len(keyed)))]
        value = lines[row].split()[1]
        lines[row] = f"{value} {word}" if path == home else f"{word} {value}"
