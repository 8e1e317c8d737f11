"""How the commands print: sizes, ages, tables, JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cli.client import Reply

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")

_PIPE_WIDTH = 240  # where no terminal says how wide it is: cut nothing


def size(size_bytes: float | None) -> str:
    """`12884901888` -> `12.0 GiB`; None -> `-`."""
    if size_bytes is None:
        return "-"
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def age(age_s: float | None) -> str:
    """`4.2` -> `4.2s`, `190` -> `3m 10s`, `7500` -> `2h 5m`, `200000` -> `2d 7h`; None -> `-`."""
    if age_s is None:
        return "-"
    if age_s < 10:
        return f"{age_s:.1f}s"
    whole = round(age_s)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def console(stderr: bool = False) -> Console:
    """A console as wide as its terminal, or wide enough for any table in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table; a column whose name starts with `>` is right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column.lstrip(">"), justify="right" if column[0] == ">" else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def print_json(body: bytes) -> None:
    """JSON as it came."""
    click.echo(body.decode().rstrip("\n"))


def show(reply: Reply[T], as_json: bool, render: Callable[[T], Table | str]) -> None:
    """Print an answer: its own JSON, or `render`'s table or text."""
    if as_json:
        print_json(reply.body)
    else:
        rendered = render(reply.value)
        if isinstance(rendered, str):
            click.echo(rendered)
        else:
            console().print(rendered)


@contextmanager
def waiting(
    first: str | None = None, quiet: bool = False
) -> Iterator[Callable[[str | None], None]]:
    """A live status on stderr with the seconds so far; in a pipe, one line for each new text.

    Yields the function that changes its text; None takes the status away. `quiet`: nothing in a
    pipe, for what takes long only at times.
    """
    err = console(stderr=True)
    live: _Live | _Lines = _Live(err) if err.is_terminal else _Lines(quiet)
    with live as status:
        status.say(first)
        yield status.say


class _Lines:
    """Status for a pipe: a line where the text changes, not counting its figures."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __enter__(self) -> _Lines:
        self._last: str | None = None
        return self

    def __exit__(self, *exc: object) -> None: ...

    def say(self, text: str | None) -> None:
        gist = None if text is None else re.sub(r"\d+s\b", "", text)
        if text is not None and gist != self._last and not self._quiet:
            click.echo(text, err=True)
        self._last = gist


class _Live:
    """Status for a terminal: one line with a spinner, gone when it is over."""

    def __init__(self, err: Console) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.description}", markup=False)
        self._progress = Progress(
            SpinnerColumn(), text, TimeElapsedColumn(), console=err, transient=True
        )
        self._task = self._progress.add_task("", total=None, visible=False)

    def __enter__(self) -> _Live:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def say(self, text: str | None) -> None:
        if text is None:
            self._progress.stop()
            return
        self._progress.update(self._task, description=text, visible=True)
        self._progress.start()
