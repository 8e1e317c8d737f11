"""Mermaid's grammar, as far as our diagrams need it: a line that GitHub could not draw is found."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PARTICIPANT = re.compile(r"(?:participant|actor) (\w+)(?: as [^:;#]+)?")
_MESSAGE = re.compile(r"(\w+)(?:->>|-->>|-x|--x|-\)|--\)|->|-->)([+-]?\w+): ([^;#]+)")
_NOTE = re.compile(r"Note (?:over|left of|right of) (\w+)(?:,(\w+))?: [^;#]+")
_OPENS = re.compile(r"(?:loop|opt|alt|par|critical|rect)(?: [^;#]+)?")
_BETWEEN = re.compile(r"(?:else|and|option)(?: [^;#]+)?")
_EDGE = re.compile(r"(\[\*\]|\w+) --> (\[\*\]|\w+)(?: : [^:;#]+)?")


class Malformed(ValueError):
    """A line that Mermaid would not draw."""


def diagrams(page: str) -> list[str]:
    """The diagrams of a page in Markdown."""
    return _BLOCK.findall(page)


def check(diagram: str) -> None:
    """Raises Malformed where a diagram breaks the grammar of its kind."""
    kind, *lines = (line.strip() for line in diagram.strip().splitlines())
    lines = [line for line in lines if line and not line.startswith("%%")]
    if not lines:
        raise Malformed(f"{kind}: an empty diagram")
    if kind == "sequenceDiagram":
        _check_sequence(lines)
    elif kind == "stateDiagram-v2":
        for line in lines:
            edge_of(line)
    else:
        raise Malformed(f"{kind!r} is not a kind of diagram that this checks")


def edges(diagram: str) -> Iterator[tuple[str, str]]:
    """The arrows of a state diagram; `[*]` is its beginning and its end."""
    for line in diagram.strip().splitlines()[1:]:
        if "-->" in line:
            yield edge_of(line.strip())


def edge_of(line: str) -> tuple[str, str]:
    """(from, to) of one line of a state diagram."""
    found = _EDGE.fullmatch(line)
    if found is None and not line.startswith("direction "):
        raise Malformed(f"{line!r} is not an arrow of a state diagram: write `a --> b : words`")
    return (found[1], found[2]) if found else ("", "")


def _check_sequence(lines: list[str]) -> None:
    known: set[str] = set()
    depth = 0
    for line in lines:
        if found := _PARTICIPANT.fullmatch(line):
            known.add(found[1])
        elif found := _MESSAGE.fullmatch(line):
            _check_known(known, line, found[1], found[2].lstrip("+-"))
        elif found := _NOTE.fullmatch(line):
            _check_known(known, line, *filter(None, found.groups()))
        elif line == "end":
            depth -= 1
            if depth < 0:
                raise Malformed("an `end` without its beginning")
        elif _OPENS.fullmatch(line):
            depth += 1
        elif not (_BETWEEN.fullmatch(line) and depth):
            raise Malformed(f"{line!r} is not a line of a sequence diagram")
    if depth:
        raise Malformed(f"{depth} `end` missing")


def _check_known(known: set[str], line: str, *names: str) -> None:
    for name in names:
        if name not in known:
            raise Malformed(f"{line!r}: there is no participant {name}")
