"""docs/clients.md, as the test of the clients saw it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HEAD = """# Clients that were tried

Written by `make outside` (tests/outside/test_clients.py); do not edit. Each client makes the same
calls with its own defaults, its retries too, against a real `stoker up` with the stub engine. A
cell shows how long the answer took, or the name of the error that the client's library raised;
**bold** is not what is right, – was not tried. A script's first call counts with its imports; a
RuntimeError or Error is the script's own, where the library hands its user an error event. What is
right: tests/outside/situations.py.
"""


NOT_TRIED = "–"


class Cell(NamedTuple):
    """What was seen, and whether it was right."""

    shown: str
    right: bool


def written(
    versions: Mapping[str, str],
    tables: Mapping[str, Sequence[str]],
    cells: Mapping[tuple[str, str], Cell],
    reasons: Mapping[str, str],
) -> str:
    """The page: `tables` has each one's columns, a situation each, by its title; a row is a client
    with its version; `reasons` say by client why something was not tried."""
    tried = {where: cell for where, cell in cells.items() if cell.shown != NOT_TRIED}
    rows = [client for client in versions if any(client == row for row, _ in tried)]
    lines = [_HEAD]
    for title, columns in tables.items():
        lines += [f"## {title}", ""]
        lines += ["| client | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
        for client in rows:
            shown = [_shown(cells.get((client, column))) for column in columns]
            lines.append(f"| {client} {versions[client]} | " + " | ".join(shown) + " |")
        lines.append("")
    right = sum(cell.right for cell in tried.values())
    lines += [f"{right} of {len(tried)} as they should be.", ""]
    lines += [f"- {client} {versions[client]}: {why}." for client, why in reasons.items()]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return NOT_TRIED
    return cell.shown if cell.right else f"**{cell.shown}**"
