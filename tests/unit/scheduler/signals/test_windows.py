"""Sliding extremes, means and changes, against a plain scan of all that was told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.signals.windows import MAX_CHANGES, MAX_MARKS, Changes, Extreme, Mean

steps = st.lists(st.tuples(st.floats(0, 50), st.integers(0, 20)), min_size=1, max_size=60)


def in_force(told: list[tuple[float, int]], begin: float) -> list[int]:
    """The values of a step function that were in force after `begin`."""
    untils = [at for at, _ in told[1:]] + [float("inf")]
    return [value for (_, value), until in zip(told, untils, strict=True) if until > begin]


@given(steps, st.floats(0, 100))
def test_extremes_are_those_of_a_full_scan(moves: list[tuple[float, int]], window_s: float) -> None:
    least, greatest, told, now = Extreme(1), Extreme(-1), [], 0.0
    for gap_s, value in moves:
        now += gap_s
        told.append((now, value))
        seen = in_force(told, now - window_s)
        assert least.push(now, value, window_s) == min(seen)
        assert greatest.push(now, value, window_s) == max(seen)
    assert max(len(least.runs), len(greatest.runs)) <= 21  # values there are, not updates


def test_the_least_of_the_docstring() -> None:
    least = Extreme(1)
    for at, value in ((0, 4), (10, 2)):
        least.push(at, value, 60)
    assert [least.push(at, 3, 60) for at in (30, 69, 91)] == [2, 2, 3]


@given(steps, st.floats(1, 100))
def test_a_mean_is_the_integral_over_the_window(
    moves: list[tuple[float, int]], window_s: float
) -> None:
    mean, told, now = Mean(), [], 0.0
    for gap_s, value in moves:
        now += gap_s
        told.append((now, value))
        got = mean.push(now, value, window_s)
        ends = [*(at for at, _ in told[1:]), now]
        area = sum(
            v * max(0.0, end - max(at, now - window_s))
            for (at, v), end in zip(told, ends, strict=True)
        )
        # Marks are a 64th of the window apart: one of them may be cut in the wrong place.
        assert got == pytest.approx(area / window_s, abs=20 / MAX_MARKS)
    assert len(mean.marks) <= MAX_MARKS + 2


def test_the_mean_of_the_docstring() -> None:
    mean = Mean()
    mean.push(0, 1, 6)
    mean.push(10, 7, 6)
    assert mean.push(12, 7, 6) == pytest.approx(3)


def test_memory_is_bounded() -> None:
    mean, changes = Mean(), Changes()
    for i in range(20_000):
        mean.push(i / 1000, i % 7, 6)
        changes.add(i / 1000, 1)
    assert len(mean.marks) <= MAX_MARKS + 2
    assert len(changes.made) == MAX_CHANGES


def test_changes_are_counted_within_their_period() -> None:
    changes = Changes()
    for at, amount in ((0.0, 5), (10.0, 2), (20.0, 1)):
        changes.add(at, amount)
    assert [changes.within(30, s) for s in (10, 20, 20.5, 31)] == [0, 1, 3, 8]
    changes.prune(30, 20)
    assert list(changes.made) == [(20.0, 1)]
