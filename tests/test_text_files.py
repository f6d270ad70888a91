"""Text files are UTF-8, whatever the locale: every place that opens one says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("echo_jax", "configs") for path in (ROOT / folder).rglob("*.py"))
MODE_SECOND = ("gzip", "bz2", "lzma", "os", "io", "codecs")  # modules whose functions take the mode after the file
TEXT_CLASSES = ("TextIOWrapper", "FileHandler", "RotatingFileHandler")


def without_encoding(source: str) -> Iterator[int]:
    """Yields the line of each call that opens text in the locale's encoding."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and _in_locale(call):
            yield call.lineno


def _in_locale(call: ast.Call) -> bool:
    given = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in call.keywords}
    if "encoding" in given or None in given:  # None: **options
        return False
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    is_builtin = isinstance(call.func, ast.Name)
    position = 1 if is_builtin or owner in MODE_SECOND else 0
    mode = given.get("mode", getattr(call.args[position], "value", "") if len(call.args) > position else "")
    is_text = isinstance(mode, str) and bool(mode) and set(mode) <= set("rwaxt+")
    if name == "open":
        return is_text or (is_builtin and not mode)
    if name in ("fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return is_text
    in_text = given.get("text", given.get("universal_newlines")) is True
    return in_text or name in ("read_text", "write_text", *TEXT_CLASSES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open('x')", True),
        ("open('x', 'w')", True),
        ("path.open('a')", True),
        ("path.open(mode='x')", True),
        ("gzip.open('x', 'rt')", True),
        ("path.read_text()", True),
        ("path.write_text(text, errors='replace')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.Popen(command, universal_newlines=True)", True),
        ("io.TextIOWrapper(raw)", True),
        ("os.fdopen(fd, 'w')", True),
        ("open('x', 'rb')", False),
        ("open('x', encoding='utf-8')", False),
        ("gzip.open('x')", False),
        ("engine.open(i, i)", False),
        ("os.open('x', os.O_RDONLY)", False),
        ("subprocess.run(command, encoding='utf-8')", False),
    ],
)
def test_the_check_finds_what_it_should(source, found):
    assert bool(list(without_encoding(source))) is found


def test_every_text_file_is_opened_as_utf8():
    found = {path: list(without_encoding(path.read_text(encoding="utf-8"))) for path in FILES}
    assert not {str(path): lines for path, lines in found.items() if lines}
