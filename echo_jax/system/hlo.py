"""Reads from a compiled program's HLO text which collectives it has, how large, inside how many loops.

In: `compiled.as_text()`. Out: `Collective`s, each once, however often its loop runs (the text for TPU does not say).
"""

import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\dm\d\w*)?|pred)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*?body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=\{?%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    bytes: int  # of its largest result, on one device
    elements: int  # of that result
    depth: int  # loops around it


def computations(text: str) -> dict[str, list[str]]:
    """Returns name -> lines of each computation of a module."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if (start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            lines = found[start[1]] = []
        else:
            lines.append(line)
    return found


def collectives(text: str) -> list[Collective]:
    parts = computations(text)
    depths = _loop_depths(parts)
    found = []
    for name, lines in parts.items():
        for line in lines:
            if (match := _COLLECTIVE.search(line)) is not None:
                size, elements = largest_array(match[1])
                found.append(Collective(match[2], size, elements, depths[name]))
    return found


def largest_array(result: str) -> tuple[int, int]:
    """Returns (bytes, elements) of the largest array in an HLO type such as `(f32[8,128]{1,0}, bf16[4])`."""
    largest = 0, 0
    for dtype, dimensions in _ARRAY.findall(result):
        elements = 1
        for dimension in filter(None, dimensions.split(",")):
            elements *= int(dimension)
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        largest = max(largest, (elements * bits // 8, elements))
    return largest


def _loop_depths(parts: dict[str, list[str]]) -> dict[str, int]:
    """Returns computation -> loops around it, counted at its deepest caller; 0 for the entry."""
    calls = []
    for caller, lines in parts.items():
        for line in lines:
            body = _WHILE.search(line)
            calls += [(caller, callee, body is not None and callee == body[1]) for callee in _CALLED.findall(line)]
    depths = dict.fromkeys(parts, 0)
    changed = True
    while changed:
        changed = False
        for caller, callee, in_loop in calls:
            if callee in depths and depths[callee] < depths[caller] + in_loop:
                depths[callee] = depths[caller] + in_loop
                changed = True
    return depths
