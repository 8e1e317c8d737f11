"""Sizes in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sizes import size, sizes_apart

GIB = 2**30


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (2 * GIB, 2 * GIB + 2**20, ("2.000 GiB", "2.001 GiB")),
        (24 * GIB, 80 * GIB, ("24.0 GiB", "80.0 GiB")),
        (2 * GIB, 2 * GIB, ("2.0 GiB", "2.0 GiB")),
        (2 * GIB, 2 * GIB + 1, ("2.000000000 GiB", "2.000000001 GiB")),
        (500 * 2**20, 500 * 2**20 + 1024, ("500.000 MiB", "500.001 MiB")),
        (500 * 2**20, 2 * GIB, ("500 MiB", "2.0 GiB")),
    ],
)
def test_examples(first: int, second: int, shown: tuple[str, str]) -> None:
    assert sizes_apart(first, second) == shown


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_sizes_that_differ_look_different(first: int, second: int) -> None:
    shown = sizes_apart(first, second)
    assert (shown[0] == shown[1]) == (first == second)
    assert shown == tuple(reversed(sizes_apart(second, first)))


def test_one_size() -> None:
    assert (size(12 * GIB), size(500 * 2**20)) == ("12.0 GiB", "500 MiB")
