"""Tables for people: as wide as the terminal, never broken inside a word, states in colour.

A column's name may begin with marks: `>` right-aligned, `~` long words that may take several lines,
`?` may be left out where the terminal is narrow (`??` before `?`, and the last first), `!` a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cli.text import console, plain

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = ">~?!"
_GAP = 3  # what a column adds to its cells' width
_LEAST = 18  # of a column that may take several lines,
_LONGEST_WORD = 32  # unless one of its words is longer
_COLOURS = {
    "green": "ready ok hot serving admin",
    "cyan": "asleep staged cached sleeping warm cold stopped pulling partial",
    "yellow": "planned sent starting waking rising waiting unrouting draining drained stopping"
    " cordoned backoff blocked preempted",
    "red": "failed lost unknown unhealthy quarantined damaged unreachable error refused",
}
_STYLES = {word: colour for colour, words in _COLOURS.items() for word in words.split()}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> Table:
    """A plain table of at most `width` characters (default: the terminal's; a pipe has no end)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[plain(cell) for cell in row] for row in rows]
    limit = width or console().width
    shown = fitting(columns, cells, limit)
    fits = _total(columns, cells, shown) <= limit
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index in shown:
        marks, least = _marks(columns[index]), _least(columns, cells, index)
        made.add_column(
            _name(columns[index]),
            justify="right" if ">" in marks else "left",
            no_wrap=fits and "~" not in marks,
            overflow="fold",
            min_width=least if fits else None,
        )
    for row in cells:
        made.add_row(*(Text(row[i], style=_style(columns[i], row[i])) for i in shown))
    gone = [_name(c) for i, c in enumerate(columns) if i not in shown]
    if gone:
        made.caption = Text(f"not shown, for want of width: {', '.join(gone)} (--json has all)")
        made.caption_justify = "left"
    return made


def fitting(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Which columns to show within `width`: all, or without some marked `?`."""
    shown = list(range(len(columns)))
    while _total(columns, rows, shown) > width:
        optional = [i for i in shown if "?" in _marks(columns[i])]
        if not optional:
            break
        shown.remove(max(optional, key=lambda i: (_marks(columns[i]).count("?"), i)))
    return shown


def _total(columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    return sum(_least(columns, rows, i) + _GAP for i in shown) - _GAP


def _least(columns: Sequence[str], rows: Sequence[Sequence[str]], index: int) -> int:
    """How wide a column must be at least: its cells, or the words of one that may fold."""
    from rich.cells import cell_len

    cells = [row[index] for row in rows]
    longest = max(map(cell_len, cells), default=0)
    if "~" in _marks(columns[index]):
        word = max((cell_len(w) for cell in cells for w in cell.split()), default=0)
        longest = min(longest, max(_LEAST, min(word, _LONGEST_WORD)))
    return max(longest, cell_len(_name(columns[index])))


def _marks(column: str) -> str:
    return column[: len(column) - len(column.lstrip(_MARKS))]


def _name(column: str) -> str:
    return column.lstrip(_MARKS)


def _style(column: str, cell: str) -> str:
    if "!" not in _marks(column):
        return ""
    first = cell.replace(",", " ").replace(":", " ").split()
    return _STYLES.get(first[0], "") if first else ""
