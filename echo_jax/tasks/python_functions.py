"""Templates of python tasks that ask for a function, and how a function is graded.

The function runs in the sandbox on inputs that the agent has not seen. The right values stay here and are compared with
the values that come back. So the agent's code can earn the reward only by returning the right values.
"""

import dataclasses
import json
import shlex
import string
import textwrap
from collections.abc import Callable, Sequence

import numpy as np

from echo_jax.tasks.procedural import Problem, by_level, content, draw, holds, names, pick
from echo_jax.tools.sandbox import Sandbox

SOLUTION = "solution.py"
CASES = 8  # hidden inputs
_VALUES = ".values.json"
_MAX_VALUES_BYTES = 1 << 16
# -I, and the standard library before the agent's folder: no file there can replace a module of the interpreter.
_CALL = textwrap.dedent("""\
    import json, sys
    name, inputs, path = sys.argv[1:]
    sys.path.append("/work")
    import solution
    values = [getattr(solution, name)(*arguments) for arguments in json.loads(inputs)]
    with open(path, "w") as file:
        json.dump(values, file)
    """)


@dataclasses.dataclass(frozen=True)
class Returns:
    """Reached if a function in `solution.py` returns the right values."""

    function: str
    inputs: Sequence[Sequence]  # the arguments of each call, as JSON has them
    values: Sequence
    answer: str = ""

    def reached(self, answer: str, sandbox: Sandbox) -> bool:
        arguments = [self.function, json.dumps(self.inputs), f"/work/{_VALUES}"]
        if not holds(sandbox, shlex.join(["python3", "-I", "-c", _CALL, *arguments])):
            return False
        try:
            return json.loads(content(sandbox, _VALUES, limit=_MAX_VALUES_BYTES) or b"null") == self.values
        except (ValueError, RecursionError):
            return False


def assignments(**constants) -> str:
    """Returns program text that sets constants."""
    return "".join(f"{name} = {value!r}\n" for name, value in constants.items())


def _function(what: str, program: str, slip: tuple[str, str], make_input: Callable[[], list], **constants) -> Problem:
    """Returns the problem of writing the function that `program` ends with; `slip` as in `python_questions`."""
    program = assignments(**constants) + program
    function = program.rpartition("def ")[2].partition("(")[0]
    signature = program.rpartition("def ")[2].partition(":")[0]
    namespace: dict = {}
    exec(program, namespace)
    example, *inputs = (make_input() for _ in range(1 + CASES))
    call = f"{function}({', '.join(map(repr, example))})"
    # Through JSON, like the values that come back: tuples become lists.
    values = json.loads(json.dumps([namespace[function](*arguments) for arguments in inputs]))
    return Problem(
        prompt=f"Write a function {signature} into {SOLUTION}. {what} "
        f"For example, {call} is {namespace[function](*example)!r}.",
        files={},
        solution=(f"python {program}\nprint({call})", f"write {SOLUTION}\n{program}\n"),
        slip=f"write {SOLUTION}\n{program.replace(*slip)}\n",
        goal=Returns(function, inputs, values),
    )


def encode(rng: np.random.Generator, level: int) -> Problem:
    k, m = (int(number) for number in draw(rng, range(2, 25), 2))
    words = list(names(rng))
    shift, how = by_level(
        level,
        ("k", f"by {k} places"),
        ("(k if i % 2 == 0 else m)", f"by {k} places where its index in the text is even, by {m} where it is odd"),
        ("(k * i + m)", f"by {k} * i + {m} places, where i is its index in the text"),
    )
    return _function(
        f"It shifts every letter of a text of lower-case letters and spaces {how}; after z comes a. Spaces stay.",
        f"""\
def encode(text):
    shifted = ""
    for i, letter in enumerate(text):
        shifted += " " if letter == " " else chr((ord(letter) - 97 + {shift}) % 26 + 97)
    return shifted""",
        ("% 26", "% 25"),
        lambda: [" ".join(draw(rng, words, 4))],
        k=k,
        m=m,
    )


def runs(rng: np.random.Generator, level: int) -> Problem:
    letters = draw(rng, string.ascii_lowercase, 4)
    least = int(rng.integers(3, 6))
    how, piece = by_level(
        level,
        ("each run of one letter becomes the letter and the length of the run", "f'{run[0]}{len(run)}'"),
        (
            "each run of one letter becomes the letter and the length of the run, or the letter alone if it is 1",
            "f'{run[0]}{len(run)}' if len(run) > 1 else run",
        ),
        (
            f"each run of at least {least} times the same letter becomes the length of the run, * and the letter; the "
            "rest stays",
            "f'{len(run)}*{run[0]}' if len(run) >= least else run",
        ),
    )
    return _function(
        f"It shortens a text of letters: {how}.",
        f"""\
import itertools
def shorten(text):
    runs = ["".join(group) for _, group in itertools.groupby(text)]
    return "".join({piece} for run in runs)""",
        by_level(level, ("len(run)", "text.count(run[0])"), ("> 1", "> 2"), (">= least", "> least")),
        lambda: ["".join(pick(rng, letters) * int(rng.integers(1, least + 3)) for _ in range(6))],
        least=least,
    )


def duration(rng: np.random.Generator, level: int) -> Problem:
    small, middle, large = draw(rng, string.ascii_lowercase, 3)
    a, b = int(rng.integers(3, 30)), int(rng.integers(3, 30))
    units = {large: a * b, middle: b, small: 1}

    def spelled() -> str:
        return "".join(f"{rng.integers(1, 40)}{unit}" for unit in units if rng.random() < 0.8 or unit == large)

    order = f"{large}, {middle} and {small}, the large ones first and as many as can be, leaving out those that are 0"
    rule = f"{a}{middle} are 1{large}, and {b}{small} are 1{middle}"
    parse = """\
def parse(text):
    total, digits = 0, ""
    for char in text:
        if char.isdigit():
            digits += char
        else:
            total += int(digits) * units[char]
            digits = ""
    return total"""
    spell = """\
def spell(total):
    text = ""
    for unit in units:
        count, total = divmod(total, units[unit])
        text += f"{count}{unit}" if count else ""
    return text"""
    what, program, make_input = by_level(
        level,
        (f"It returns how many {small} a text like 3{large}2{small} is", parse, lambda: [spelled()]),
        (
            f"It spells a number of {small} with {order}",
            spell,
            lambda: [int(rng.integers(a * b, a * b * 40))],
        ),
        (
            f"It adds up texts like 3{large}2{small} and spells the sum with {order}",
            f"{parse}\n{spell}\ndef add(texts):\n    return spell(sum(parse(text) for text in texts))",
            lambda: [[spelled() for _ in range(4)]],
        ),
    )
    return _function(
        f"{what}: {rule}.",
        program,
        by_level(level, ('            digits = ""\n', ""), (' if count else ""', ""), ("units[char]", "1")),
        make_input,
        units=units,
    )


def merge(rng: np.random.Generator, level: int) -> Problem:
    gap = by_level(level, 0, int(rng.integers(2, 9)), int(rng.integers(2, 9)))

    def make_input() -> list:
        starts = rng.integers(0, 100, 4 + 2 * level)
        return [[[int(start), int(start + rng.integers(1, 12))] for start in starts]]

    near = "overlap or touch" if level == 1 else f"overlap or are at most {gap} apart"
    result, end = "the merged ones in order", "merged"
    if level == 3:
        result, end = "the length of the longest merged one", "max(last - first for first, last in merged)"
    return _function(
        f"It is given pairs [first, last] in any order, merges those that {near}, and returns {result}.",
        f"""\
def merge(pairs):
    merged = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + gap:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return {end}""",
        ("max(merged[-1][1], last)", "last"),
        make_input,
        gap=gap,
    )


def machine(rng: np.random.Generator, level: int) -> Problem:
    deeds = {
        "a + b": "takes b, then a, and puts a + b",
        "a - b": "takes b, then a, and puts a - b",
        "a * b": "takes b, then a, and puts a * b",
        "b, a": "takes b, then a, and puts b, then a, in their places",
        "a, b, b": "doubles the top number",
    }
    words = dict(zip(names(rng), list(deeds)[: by_level(level, 2, 4, 5)], strict=False))

    def make_input() -> list:
        program = [int(rng.integers(1, 10))]
        for _ in range(by_level(level, 4, 7, 10)):  # every word finds at least two numbers on the stack
            program += [int(rng.integers(1, 10)), pick(rng, list(words))]
        return [program]

    branches = "".join(
        f"        elif item == {word!r}:\n            b, a = stack.pop(), stack.pop()\n            stack += [{deed}]\n"
        for word, deed in words.items()
    )
    return _function(
        "It runs a list of numbers and words on a stack and returns the top number in the end. A number is put on the "
        f"stack; {'; '.join(f'{word} {deeds[deed]}' for word, deed in words.items())}.",
        f"""\
def run(program):
    stack = []
    for item in program:
        if isinstance(item, int):
            stack.append(item)
{branches}    return stack[-1]""",
        ("[a - b]", "[b - a]"),
        make_input,
    )


def ranking(rng: np.random.Generator, level: int) -> Problem:
    candidates = list(names(rng))[: 4 + 2 * level]
    keep, least = int(rng.integers(2, 4)), int(rng.integers(10, 30))

    def make_input() -> list:
        return [[[pick(rng, candidates), int(rng.integers(1, 50))] for _ in range(4 + 3 * level)]]

    which, pairs, result, chosen = by_level(
        level,
        ("", "pairs", "order", ""),
        (" after adding up the numbers of each name", "totals.items()", "order", "True"),
        (
            f" after adding up those numbers of each name that are above {least}, and keeps the first {keep}",
            "totals.items()",
            "order[:keep]",
            "number > least",
        ),
    )
    adding = f"""\
    totals = {{}}
    for name, number in pairs:
        if {chosen}:
            totals[name] = totals.get(name, 0) + number
"""
    return _function(
        f"It is given pairs [name, number] and returns them as lists, the largest number first and equal ones by name, "
        f"in alphabetical order{which}.",
        f"""\
def rank(pairs):
{adding if level > 1 else ""}    order = sorted({pairs}, key=lambda pair: (-pair[1], pair[0]))
    return [list(pair) for pair in {result}]""",
        ("-pair[1]", "pair[1]"),
        make_input,
        keep=keep,
        least=least,
    )
