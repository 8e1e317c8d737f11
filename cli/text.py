"""How the commands print: sizes, ages, tables, JSON."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cli.client import Reply

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")

PIPE_WIDTH = 2000  # where no terminal says how wide it is: cut nothing
# C0 but tab and line feed, DEL, C1, and what turns the direction of text.
_WHOLE = 1000  # characters: of a command's line in a group's help
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False)


def plain(text: str) -> str:
    """`text` as a terminal may get it: what could steer one is shown as `\\x1b`.

    Line ends, tabs and everything printable stay as they are.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def wrapped(text: str, used: int = 0) -> str:
    """`text`, for a stderr that is a terminal, with its lines ended between words.

    `used`: characters that stand before it on its first line.
    """
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    folded: list[str] = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        lines = textwrap.wrap(
            line, width, initial_indent="_" * (0 if folded else used), subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        folded.append("\n".join(lines) if folded else "\n".join(lines)[used:])
    return "\n".join(folded)


def echo_untrusted(text: str, nl: bool = True) -> None:
    """What a model or an engine wrote: as it is in a pipe, `plain` on a terminal."""
    click.echo(plain(text) if sys.stdout.isatty() else text, nl=nl)


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
            click.echo(plain(rendered))
        else:
            console().print(rendered)


class Group(click.Group):
    """A group of commands whose help cuts no sentence off."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their whole first lines."""
        rows = [(name, c.get_short_help_str(_WHOLE)) for name, c in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


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
