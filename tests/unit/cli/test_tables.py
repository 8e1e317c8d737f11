"""Tables fit their terminal, and nothing that a model wrote can steer it."""

from __future__ import annotations

import io

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli import status
from cli.main import COMMANDS, GROUPS
from cli.main import stoker as group
from cli.tables import fitting, table
from cli.text import plain
from scheduler.admin import views
from tests.kits.cli_runner import FakeServer, device, node, replica, serving, stoker

COLUMNS = ("MODEL", "?REPLICA", "!STATE", "?>IDLE", "~NOTE")
LONG = "kept by min_replicas or a floor, and waits for its turn on the device after two others"


def drawn(shown: object, width: int, **options: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **options).print(shown)  # type: ignore[arg-type]
    return out.getvalue().splitlines()


def rows(state: str = "ready") -> list[tuple[str, ...]]:
    return [("llama-3.1-8b-instruct", "r-0123456789abcdef", state, "3m 10s", LONG)]


def test_wide_enough_shows_all_in_one_line() -> None:
    lines = drawn(table(COLUMNS, rows(), 200), 200)
    assert len(lines) == 3
    assert "REPLICA" in lines[0]
    assert LONG in lines[2]


@pytest.mark.parametrize("width", [60, 76])
def test_a_narrow_terminal_loses_columns_and_no_word_is_broken(width: int) -> None:
    lines = drawn(table(COLUMNS, rows(), width), width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert set(LONG.replace(",", "").split()) <= {word.strip(",") for word in words}
    assert "llama-3.1-8b-instruct" in words
    assert "IDLE" not in lines[0]
    assert "not shown, for want of width: " in " ".join(words)


@given(st.lists(st.integers(1, 60), min_size=5, max_size=5), st.integers(20, 200))
def test_only_what_may_go_goes_and_the_last_first(lengths: list[int], width: int) -> None:
    shown = fitting(COLUMNS, [["x" * n for n in lengths]], width)
    assert {0, 2, 4} <= set(shown)
    assert 3 not in shown or 1 in shown
    assert fitting(("A", "??B", "?C"), [("a", "b", "c")], 8) == [0, 2]


@pytest.mark.parametrize(
    ("state", "colour"), [("ready", "32"), ("failed", "31"), ("asleep, level 1", "36")]
)
def test_states_are_coloured(state: str, colour: str) -> None:
    lines = drawn(
        table(COLUMNS, rows(state), 200), 200, force_terminal=True, color_system="standard"
    )
    assert f"\x1b[{colour}m{state}" in lines[2]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = drawn(table(COLUMNS, rows(), 200), 200, force_terminal=True, color_system="standard")
    assert "\x1b[32m" not in lines[2]


def every_table() -> dict[str, object]:
    """One of each that a person looks at most, with awkward values."""
    awkward = replica(model="llama-3.1-8b-instruct", reason=LONG)
    sick = device(quarantined="XID 79: the GPU has fallen off the bus, twice in an hour")
    return {
        "ps": status.replica_table(views.Replicas(replicas=(awkward,))),
        "nodes": status._node_table(views.Nodes(nodes=(node(),))),
        "devices": status._device_table(views.Devices(devices=(sick,))),
    }


@pytest.mark.parametrize("columns", ["80", "120"])
def test_every_table_fits(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = int(columns)
    monkeypatch.setattr("cli.tables.console", lambda: Console(width=width))
    for name, made in every_table().items():
        lines = drawn(made, width)
        assert all(len(line) <= width for line in lines), name
        assert not any("…" in line for line in lines), (name, lines)


# ------------------------------------------------------------------------- a model's own words


def test_what_could_steer_a_terminal_is_shown_as_text() -> None:
    assert plain("a\x1b]0;owned\x07b\x9bc\rd\u202ee") == r"a\x1b]0;owned\x07b\x9bc\x0dd\x202ee"
    assert plain("tab\t line\n ünïcode 漢字 🙂") == "tab\t line\n ünïcode 漢字 🙂"


@given(st.text())
def test_plain_text_never_holds_control_characters(text: str) -> None:
    shown = plain(text)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in shown)
    assert "\x7f" not in shown
    assert plain(shown) == shown


def test_a_table_and_an_error_are_plain() -> None:
    assert "\x1b" not in "".join(drawn(table(("A",), [("\x1b[2J",)], 80), 80))
    with serving() as fake:
        fake.replies["GET /admin/models/m"] = (
            409,
            views.Error(error=views.ErrorBody(message="\x1b[2J")),
        )
        done = stoker(fake, "model", "show", "m")
    assert done.exit_code == 1
    assert "\x1b" not in done.stderr
    assert r"\x1b[2J" in done.stderr


# ------------------------------------------------------------------------- sentences


def test_quarantine_and_release_name_the_device() -> None:
    with serving() as fake:
        quiet(fake)
        done = stoker(fake, "quarantine", "n1", "gpu-0", "--reason", "XID 79")
        assert done.output == "gpu-0 of n1 takes no replicas any more: XID 79\n", done.stderr
        assert stoker(fake, "release", "n1", "gpu-0").output == "gpu-0 of n1 takes replicas again\n"


def quiet(fake: FakeServer) -> None:
    for what in ("quarantine", "release"):
        fake.replies[f"POST /admin/nodes/n1/devices/gpu-0/{what}"] = node()


def test_devices_says_what_is_quarantined() -> None:
    (row,) = [status._device_row(device(quarantined="set aside by an operator"))]
    assert "quarantined: set aside by an operator" in row
    assert "ok" not in row


def test_help_is_grouped_and_names_each_command_once() -> None:
    shown = CliRunner().invoke(group, ["--help"]).output
    assert all(f"{title}:" in shown for title in GROUPS)
    assert sum(len(commands) for commands in GROUPS.values()) == len(COMMANDS)


@pytest.mark.parametrize("group", ["model", "route", "cache", "key", "tenant", "token"])
def test_the_help_of_a_group_cuts_no_sentence_off(group: str) -> None:
    shown = stoker(None, group, "--help").output
    assert "Commands:" in shown
    assert not any(line.endswith("...") for line in shown.splitlines()[1:])
    assert max(map(len, shown.splitlines())) <= 80
