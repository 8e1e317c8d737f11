"""Another process's clock, read through messages that come late."""

from __future__ import annotations

import pytest

from scheduler.state.clocks import DRIFT, RemoteClock


def test_a_message_that_comes_late_is_known_to_be_late() -> None:
    clock = RemoteClock()
    assert clock.made_at(10.0, 110.01) == pytest.approx(110.01)
    assert clock.made_at(11.0, 111.6) == pytest.approx(111.01, abs=2 * DRIFT)


def test_a_quicker_message_corrects_what_a_slow_first_one_told() -> None:
    clock = RemoteClock()
    assert clock.made_at(10.0, 110.8) == pytest.approx(110.8)
    assert clock.made_at(11.0, 111.0) == pytest.approx(111.0)
    assert clock.made_at(12.0, 112.5) == pytest.approx(112.0, abs=2 * DRIFT)


def test_clocks_that_drift_are_followed() -> None:
    clock = RemoteClock()
    for second in range(100_000):
        sent_s = second * (1 - DRIFT / 2)
        assert clock.made_at(sent_s, float(second)) == pytest.approx(second, abs=DRIFT)


def test_a_clock_that_stood_still_is_read_again() -> None:
    clock = RemoteClock()
    clock.made_at(10.0, 110.0)
    assert clock.made_at(11.0, 171.0) == 171.0


def test_a_message_without_a_time_was_made_now() -> None:
    assert RemoteClock().made_at(None, 5.0) == 5.0
