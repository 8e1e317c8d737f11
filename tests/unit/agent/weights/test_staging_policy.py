"""What is read into the page cache, what is let go, and where a start begins from."""

from __future__ import annotations

import pytest

from agent.weights.staging_policy import Seen, WeightFile, pause_s, start_rung, to_drop, to_read


def file(path, size=10, inode=0, resident=0):
    return WeightFile(path, size, inode, resident)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, []),
        (10, [("a", 10)]),
        (15, [("a", 10), ("b", 5)]),
        (30, [("a", 10), ("b", 20)]),
        (99, [("a", 10), ("b", 20)]),
    ],
)
def test_never_more_than_was_booked_is_read(limit, expected):
    assert to_read([file("a"), file("b", 20)], limit) == expected


def test_what_is_no_longer_wished_for_is_let_go():
    held = {"x": (file("x1", inode=1), file("x2", inode=2)), "y": (file("y1", inode=3),)}
    assert to_drop(held, {"y"}, set(), set()) == {"x": ["x1", "x2"]}
    assert to_drop(held, {"x", "y"}, set(), set()) == {}


def test_what_an_engine_has_mapped_or_loads_stays_held():
    held = {"x": (file("x1", inode=1), file("x2", inode=2))}
    assert to_drop(held, set(), {2}, set()) == {}
    assert to_drop(held, set(), set(), {"x"}) == {}


def test_a_file_that_a_wished_model_shares_stays():
    held = {"x": (file("x1", inode=1), file("x2", inode=2)), "y": (file("link", inode=2),)}
    assert to_drop(held, {"y"}, set(), set()) == {"x": ["x1"]}


def test_a_kernel_that_drops_pages_is_not_fought():
    assert [pause_s(rounds) for rounds in (0, 1, 2, 10**6)] == [5.0, 10.0, 20.0, 300.0]


@pytest.mark.parametrize(
    ("on_disk", "files", "rung"),
    [
        (False, (file("a", resident=10),), "remote"),
        (True, (file("a", resident=9),), "staged"),
        (True, (file("a", resident=8),), "cached"),
        (True, (), "cached"),
    ],
)
def test_where_a_start_begins(on_disk, files, rung):
    assert start_rung(on_disk, Seen(0, files)) == rung
