"""The floor plan in figures: `make house`, of an earlier commit `make house REVISION=53b0019`.

A *room* is a folder of a part, or a file that stands in the part itself. An *arrow* leads from a
room to another one that it imports from. Arrows *up* are those that have to go before the rooms can
be ordered into floors at all; a *circle* is a set of files that import each other, also by way of
others. tests/unit/rules/test_floors.py keeps the order of the floors with the same functions.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("runtime", "runtime/router", "scheduler", "agent", "cli")
LONG_FUNCTION = 40  # lines


def imported(path: str, source: str, files: frozenset[str]) -> set[str]:
    """The files among `files` that a file imports, for types alone or in a function too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            module = node.module or ""
            names = [module, *(f"{module}.{name.name}" for name in node.names)]
        else:
            continue
        paths = (name.replace(".", "/") for name in names)
        found |= {file for p in paths for file in (f"{p}.py", f"{p}/__init__.py") if file in files}
    return found


def room(part: str, path: str) -> str:
    """Of `agent/core/replica.py` in agent: core; of `agent/node.py`: node."""
    return path.removeprefix(part + "/").split("/")[0].removesuffix(".py")


def arrows(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of these files each of them imports; `files` are path -> source."""
    known = frozenset(files)
    return {path: imported(path, source, known) - {path} for path, source in files.items()}


def circles(direct: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of files (or rooms) that reach each other along `direct`, as `arrows` gives it."""
    reached = {name: set(others) for name, others in direct.items()}
    for _ in direct:
        wider = {n: others.union(*(direct[o] for o in others)) for n, others in reached.items()}
        if wider == reached:
            break
        reached = wider
    closed = [n for n, others in reached.items() if n in others]
    found = {frozenset(o for o in reached[n] if n in reached[o]) for n in closed}
    return sorted((set(names) for names in found), key=sorted)


def room_arrows(part: str, files: Mapping[str, str]) -> dict[str, set[str]]:
    """Which rooms of a part each of its rooms imports from."""
    found: dict[str, set[str]] = {room(part, path): set() for path in files}
    for path, others in arrows(files).items():
        found[room(part, path)] |= {room(part, other) for other in others}
    return {here: others - {here} for here, others in found.items()}


def arrows_up(direct: Mapping[str, set[str]]) -> int:
    """The fewest arrows that lead up, however the rooms are ordered: 0 where there is no circle."""
    return sum(_fewest_up(sorted(names), direct) for names in circles(direct))


def _fewest_up(names: list[str], direct: Mapping[str, set[str]]) -> int:
    """Try every order of one circle's rooms, set by set: `fewest[s]` with the rooms of s on top."""
    into = [sum(1 << j for j, b in enumerate(names) if a in direct[b]) for a in names]
    fewest = [0] * (1 << len(names))
    for above in range(1, len(fewest)):
        fewest[above] = min(
            # The lowest of those above is room i: arrows into it from rooms further down go up.
            fewest[above & ~(1 << i)] + (into[i] & ~above).bit_count()
            for i in range(len(names))
            if above >> i & 1
        )
    return fewest[-1]


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table."""

    part: str
    folders: int
    files: int
    rooms: int
    arrows: int
    arrows_up: int
    circles: int
    files_in_circles: int
    longest_lines: int
    longest: str
    long_functions: int


def figures(part: str, tree: Mapping[str, str]) -> Figures:
    """Measure one part of a tree (path -> source); what lies in a part within it counts there."""
    seen = {p: text for p, text in tree.items() if p.startswith(f"{part}/")}
    seen.pop(f"{part}/__init__.py", None)
    inner = tuple(f"{other}/" for other in PARTS if other.startswith(f"{part}/"))
    own = {path: text for path, text in seen.items() if not path.startswith(inner)}
    between = room_arrows(part, seen)
    rings = circles(arrows(own))
    longest = max(own, key=lambda path: own[path].count("\n"), default="")
    return Figures(
        part,
        folders=len({path.rpartition("/")[0] for path in own}),
        files=len(own),
        rooms=len(between),
        arrows=sum(map(len, between.values())),
        arrows_up=arrows_up(between),
        circles=len(rings),
        files_in_circles=sum(map(len, rings)),
        longest_lines=own.get(longest, "").count("\n"),
        longest=longest.removeprefix(part + "/"),
        long_functions=sum(map(_long_functions, own.values())),
    )


def _long_functions(source: str) -> int:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(
        isinstance(node, functions) and (node.end_lineno or 0) - node.lineno >= LONG_FUNCTION
        for node in ast.walk(ast.parse(source))
    )


def work_tree() -> dict[str, str]:
    """path -> source of every Python file of the parts, as they lie here."""
    paths = (path for part in PARTS for path in (ROOT / part).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(paths)}


def at_revision(revision: str) -> dict[str, str]:
    """Read the same from git; raises CalledProcessError where it has no such commit."""
    git = ["git", "-C", str(ROOT), "archive", revision]
    packed = subprocess.run(git, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = {m.name: archive.extractfile(m) for m in archive if m.name.endswith(".py")}
        parts = tuple(f"{part}/" for part in PARTS)
        return {p: f.read().decode() for p, f in files.items() if f and p.startswith(parts)}


def table(tree: Mapping[str, str]) -> str:
    """The figures of every part, as a table in Markdown."""
    lines = [
        "| part | folders | files | rooms | arrows | up | circles (files) | longest file, lines"
        f" | functions over {LONG_FUNCTION} lines |",
        "| --- |" + " ---: |" * 6 + " --- | ---: |",
    ]
    for part in PARTS:
        f = figures(part, tree)
        lines.append(
            f"| {f.part} | {f.folders} | {f.files} | {f.rooms} | {f.arrows} | {f.arrows_up}"
            f" | {f.circles} ({f.files_in_circles}) | {f.longest} {f.longest_lines}"
            f" | {f.long_functions} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of the work tree, or of the commit that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "revision", nargs="?", default="", help="a commit (default: the files here)"
    )
    revision = parser.parse_args().revision
    try:
        print(table(at_revision(revision) if revision else work_tree()))
    except subprocess.CalledProcessError as error:
        parser.error(f"{revision!r} is not a commit of this repository: {error.stderr.decode()}")


if __name__ == "__main__":
    main()
