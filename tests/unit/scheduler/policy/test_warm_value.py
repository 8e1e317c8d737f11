"""Keep warm, let go or warm ahead: what pays, and what prewarms were good for."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.warm_value import LEAD, KeepWarm, LetGo, advise, gain_s, hold_price
from scheduler.signals.forecast import Arrivals
from scheduler.state.prewarm_stats import Prewarms

HOUR = 3600.0
GIB = 2**30


def learnt(times: list[float]) -> tuple[Arrivals, float]:
    model = Arrivals(0.0)
    for at in times:
        model.observe(at, at)
    return model, times[-1]


def hourly() -> tuple[Arrivals, float]:
    return learnt([i * HOUR for i in range(48)])


def test_the_examples_of_the_docstring() -> None:
    price = hold_price(10 * GIB, 20 * GIB, 3.0)
    assert price == pytest.approx(0.0025)
    assert gain_s(0.6, 40, price, 600) == pytest.approx(22.95)
    assert gain_s(0.02, 40, price, 600) < 0
    model, last = hourly()
    advice = advise(model, last + 5, last + 5, climb_s=40, price=0.01)
    assert isinstance(advice, LetGo)
    assert advice.prewarm_at is not None
    assert last + 2600 < advice.prewarm_at < last + HOUR - 40


def test_free_room_costs_nothing() -> None:
    assert hold_price(10, 0, 5) == hold_price(0, 10, 5) == hold_price(10, 10, 0) == 0
    assert hold_price(10, 10, math.nan) == 0


def test_it_is_warm_when_the_call_comes_and_not_before() -> None:
    """Followed second by second: an hourly model held for a part of the hour only."""
    model, last = hourly()
    warm = [
        isinstance(advise(model, last + s, last + s, 40, 0.01), KeepWarm)
        for s in range(5, 3600, 5)
    ]  # fmt: skip
    first = warm.index(True) * 5 + 5
    assert all(warm[warm.index(True) :])
    assert 2600 < first < 3600 - 40


def test_a_model_called_every_minute_stays_warm() -> None:
    model, last = learnt([i * 60.0 for i in range(200)])
    advice = advise(model, last + 20, last + 20, 40, 0.01)
    assert isinstance(advice, KeepWarm)
    assert last + 60 <= advice.until <= last + 300


def test_what_is_dear_or_quick_to_climb_is_let_go() -> None:
    model, last = hourly()
    assert advise(model, last + 3300, last + 3300, 40, price=10.0) == LetGo(None, 0.0)
    assert advise(model, last + 3300, last + 3300, 0.01, price=0.01) == LetGo(None, 0.0)


def test_no_opinion_without_history() -> None:
    assert advise(Arrivals(0.0), 5.0, 5.0, 40, 0.0) is None
    model, last = learnt([0.0, 100.0])
    assert advise(model, last + 10, last + 10, 40, 0.0) is None
    rng = random.Random(3)
    model, last = learnt(sorted(rng.uniform(0, 1000) for _ in range(5)))
    assert advise(model, last + 5000, last + 5000, 40, 0.0) is None  # was never idle for so long


def test_the_lead_covers_the_climb() -> None:
    model, last = hourly()
    slow = advise(model, last + 5, last + 5, 400, 0.01)
    quick = advise(model, last + 5, last + 5, 10, 0.001)
    assert isinstance(slow, LetGo)
    assert isinstance(quick, LetGo)
    assert slow.prewarm_at is not None
    assert quick.prewarm_at is not None
    assert quick.prewarm_at - slow.prewarm_at == pytest.approx(LEAD * 390)


@given(
    st.lists(st.tuples(st.floats(0, 2e5), st.integers(1, 99)), max_size=40),
    st.floats(0, 1e5), st.floats(0, 1000), st.floats(0, 100),
)  # fmt: skip
def test_advice_is_finite_and_not_in_the_past(
    calls: Any, later_s: float, climb_s: float, price: float
) -> None:
    model, now = Arrivals(0.0), 0.0
    for gap_s, count in calls:
        now += gap_s
        model.observe(now, now, count)
    now += later_s
    advice = advise(model, now, now, climb_s, price)
    assert advice == advise(model, now, now, climb_s, price)
    if isinstance(advice, KeepWarm):
        assert now < advice.until < math.inf
        assert 0 < advice.gain_s <= climb_s
    elif isinstance(advice, LetGo) and advice.prewarm_at is not None:
        assert now < advice.prewarm_at < math.inf
        assert 0 < advice.gain_s <= climb_s


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e3), st.floats(0, 10), st.floats(1, 1e4))
def test_the_likelier_the_call_the_more_a_hold_gains(
    one: float, other: float, climb_s: float, price: float, hold_s: float
) -> None:
    low, high = sorted((one, other))
    assert gain_s(low, climb_s, price, hold_s) <= gain_s(high, climb_s, price, hold_s) + 1e-6


# --------------------------------------------------------------------------------- accounting


def test_hits_and_waste() -> None:
    tally = Prewarms()
    tally.begin("a", 10, 100)
    tally.begin("b", 10, 50)
    tally.begin("a", 12, 100)  # told twice
    tally.called("a")
    tally.called("a")
    tally.gone("a", 99)
    tally.called("never")
    tally.gone("b", 30)
    assert (tally.started, tally.hits, tally.misses) == (2, 1, 1)
    assert tally.wasted_byte_s == 1000
    assert tally.open == {}


events = st.lists(
    st.tuples(st.sampled_from(["begin", "called", "gone"]), st.sampled_from("abc"), st.floats(0, 9))
)


@given(events)
def test_every_prewarm_is_settled_once(told: Any) -> None:
    tally, now = Prewarms(), 0.0
    for what, replica_id, gap_s in told:
        now += gap_s
        if what == "begin":
            tally.begin(replica_id, now, 7)
        elif what == "called":
            tally.called(replica_id)
        else:
            tally.gone(replica_id, now)
        assert tally.started == tally.hits + tally.misses + len(tally.open)
        assert tally.wasted_byte_s >= 0
