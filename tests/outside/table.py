"""docs/clients.md, as the test of the clients saw it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HEAD = """# Clients that were tried

Written by `make outside` (tests/outside/test_clients.py); do not edit. Each client makes the same
calls with its own defaults, its retries too, against a real `stoker up` with the stub engine. A
cell shows how long the answer took, or the name of the error that the client's library raised;
**bold** is not what is right, – was not tried. What is right: tests/outside/situations.py.

"""


NOT_TRIED = "–"


class Cell(NamedTuple):
    """What was seen, and whether it was right."""

    shown: str
    right: bool


def written(
    versions: Mapping[str, str], columns: Sequence[str], cells: Mapping[tuple[str, str], Cell]
) -> str:
    """The page: a row a client with its version, a column a situation."""
    lines = ["| client | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for title, version in versions.items():
        shown = [_shown(cells.get((title, column))) for column in columns]
        lines.append(f"| {title} {version} | " + " | ".join(shown) + " |")
    tried = [cell for cell in cells.values() if cell.shown != NOT_TRIED]
    right = sum(cell.right for cell in tried)
    lines += ["", f"{right} of {len(tried)} as they should be."]
    return _HEAD + "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return NOT_TRIED
    return cell.shown if cell.right else f"**{cell.shown}**"
