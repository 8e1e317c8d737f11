"""Whether calls are foretold: better than the prior, within bounds, through jumps and restarts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.ladder import HORIZON_S, call_chance
from scheduler.signals.forecast import CAP, DAY_S, EDGES, SLOT_S, Arrivals, StoredArrivals, restore

HOUR = 3600.0
Observed = list[tuple[float, float, int]]


def learnt(times: list[float], offset_s: float = 0.0) -> Arrivals:
    model = Arrivals(0.0)
    for at in times:
        model.observe(at, at + offset_s)
    return model


def every(period_s: float, count: int) -> list[float]:
    return [i * period_s for i in range(count)]


# ------------------------------------------------------------------------------------- chances


def test_without_calls_it_is_the_prior() -> None:
    model = Arrivals(1000.0)
    for idle_s in (0, 60, 600, 9999):
        chance = model.chance(1000.0 + idle_s, 0.0, HORIZON_S)
        assert chance == pytest.approx(call_chance(idle_s), abs=1e-9)


def test_the_example_of_the_docstring() -> None:
    model = learnt(every(300, 9))
    last = 8 * 300.0
    assert model.chance(last + 120, last + 120, 240) == pytest.approx(0.963, abs=0.002)
    assert model.chance(last + 400, last + 400, 240) == pytest.approx(240 / 640, abs=0.006)


def test_a_periodic_model_is_called_when_it_always_was() -> None:
    model = learnt(every(HOUR, 100))
    last = 99 * HOUR
    assert model.chance(last + 60, last + 60, 600) < 0.02
    assert model.chance(last + 2700, last + 2700, 1200) > 0.95


def test_a_quiet_time_of_day_lowers_the_chance() -> None:
    rng = random.Random(1)
    times = [d * DAY_S + 8 * HOUR + rng.uniform(0, 10 * HOUR) for d in range(14) for _ in range(60)]
    model = learnt(sorted(times))
    last = model.last_at or 0.0
    flat = learnt(sorted(times))
    flat.slots = type(flat.slots)("d", [1.0] * len(flat.slots))
    night = last + HOUR  # after 18 h
    assert model.chance(night, night, 600) < flat.chance(night, night, 600) / 2


def brier(times: list[float], rng: random.Random, horizon_s: float) -> tuple[float, float]:
    """(ours, the prior's) mean squared error at random times after two days, idle >= 30 s."""
    model, i, ours, prior = Arrivals(0.0), 0, 0.0, 0.0
    for ask in sorted(rng.uniform(2 * DAY_S, times[-1]) for _ in range(400)):
        while times[i] <= ask:
            model.observe(times[i], times[i])
            i += 1
        idle_s, came = model.idle_s(ask), times[i] <= ask + horizon_s
        if idle_s >= 30:
            ours += (model.chance(ask, ask, horizon_s) - came) ** 2
            prior += (horizon_s / (horizon_s + idle_s) - came) ** 2
    return ours, prior


def arrivals(gap: Callable[[random.Random], float], rng: random.Random) -> list[float]:
    at, times = 0.0, []
    while at < 10 * DAY_S:
        at += gap(rng)
        times.append(at)
    return times


@pytest.mark.parametrize(
    ("gap", "better"),
    [
        pytest.param(lambda r: 900 + r.gauss(0, 20), 0.3, id="periodic"),
        pytest.param(lambda r: r.expovariate(1 / 900), 0.92, id="poisson"),
        pytest.param(lambda r: r.gammavariate(1 / 16, 16 * 900), 0.95, id="bursty"),
    ],
)
@pytest.mark.parametrize("horizon_s", [600.0, 3600.0])
def test_it_foretells_better_than_the_prior(
    gap: Callable[[random.Random], float], better: float, horizon_s: float
) -> None:
    rng = random.Random(5)
    ours, prior = brier(arrivals(gap, rng), rng, horizon_s)
    assert ours <= better * prior


def test_floods_drown_no_long_gap() -> None:
    model = Arrivals(0.0)
    for hour in range(0, 24, 3):
        for second in range(1800):
            at = hour * HOUR + second
            model.observe(at, at, 5000)
    assert max(model.gaps) <= CAP + 1
    idle = (model.last_at or 0.0) + 60
    assert model.chance(idle, idle, 3 * HOUR) > 0.8  # a gap of 2.5 h, seen seven times
    assert model.chance(idle, idle, HOUR) < 0.3


def test_calls_of_one_moment_are_one_short_gap_and_one_call_of_their_quarter() -> None:
    model = Arrivals(0.0)
    for at in (10.0, 20.0):
        model.observe(at, at, 1000)
    assert (model.gaps[0], sum(model.gaps), sum(model.slots)) == (2, 3, 1)


def test_what_was_is_forgotten() -> None:
    model = learnt(every(60, 200))
    later = 200 * 60 + 70 * DAY_S
    model.observe(later, later)
    assert sum(model.gaps) == pytest.approx(1, abs=0.3)


def test_the_rate_follows_and_fades() -> None:
    model = Arrivals(0.0)
    for second in range(1, 3001):
        model.observe(second, second, 4)
    assert model.rate_per_s(3000) == pytest.approx(4, rel=0.01)
    assert model.rate_per_s(3300) == pytest.approx(4 / math.e, rel=0.01)
    assert Arrivals(0.0).rate_per_s(5) == 0


# ------------------------------------------------------------------------------- next window


def test_the_window_of_an_hourly_model() -> None:
    model = learnt(every(HOUR, 30))
    last = 29 * HOUR
    earliest, latest = model.next_window(last + 60, last + 60) or (0, 0)
    assert last + 2700 < earliest <= last + HOUR <= latest < last + 1.4 * HOUR


def test_a_daily_job_is_known_to_a_quarter_of_an_hour() -> None:
    model = learnt([d * DAY_S + 3 * HOUR + i for d in range(6) for i in range(0, 300, 5)])
    noon = 5 * DAY_S + 12 * HOUR
    next_day = 6 * DAY_S + 3 * HOUR
    assert model.next_window(noon, noon) == (next_day, next_day + SLOT_S)
    # The wall clock is another one than `now`'s.
    shifted = Arrivals(0.0)
    for d in range(6):
        shifted.observe(d * DAY_S, d * DAY_S + 3 * HOUR)
    got = shifted.next_window(5 * DAY_S + 9 * HOUR, 5 * DAY_S + 12 * HOUR)
    assert got == (6 * DAY_S, 6 * DAY_S + SLOT_S)


def test_a_busy_model_is_not_put_off_until_the_next_quarter() -> None:
    rng = random.Random(4)
    times = list(itertools.accumulate(rng.expovariate(1 / 150) for _ in range(4500)))  # a week
    model, now = learnt(times), times[-1] + 5
    assert min(model.slots) / model.days > 0.5  # every quarter of an hour is a likely one
    window = model.next_window(now, now)
    assert window is None or window[0] < now + 60


@pytest.mark.parametrize(
    "times",
    [
        [],
        [0.0],
        every(HOUR, 3),  # too few
        [1.4**i for i in range(36)],  # every gap another
        every(2 * DAY_S, 9),  # beyond what the bins hold
    ],
)
def test_no_window_where_history_is_not_representative(times: list[float]) -> None:
    now = (times[-1] if times else 0.0) + 1
    model = learnt(times)
    model.days = min(model.days, 1.0)  # leave the time of day out of it
    assert model.next_window(now, now) is None


# ------------------------------------------------------------------------------------ storing


def test_a_sketch_is_small_and_stable() -> None:
    model = learnt([t + random.Random(2).random() for t in every(100, 20_000)])
    now = 20_000 * 100.0
    sketch = model.sketch(now, now)
    raw = msgspec.json.encode(sketch)
    assert len(raw) < 1500
    again = restore(msgspec.json.decode(raw, type=StoredArrivals), 50.0, now + 10)
    assert again.last_at == pytest.approx((model.last_at or 0.0) - now - 10 + 50)
    assert again.sketch(50.0, now + 10) == sketch
    for kept, was in zip(again.gaps, model.gaps, strict=True):
        assert kept == pytest.approx(was, rel=0.05, abs=0.05)


def test_a_restart_changes_little() -> None:
    model = learnt(every(HOUR, 100))
    now = 99 * HOUR + 2400
    again = restore(model.sketch(now, now), 7.0, now)
    for horizon_s in (60.0, 600.0, 3600.0):
        before, after = model.chance(now, now, horizon_s), again.chance(7.0, now, horizon_s)
        assert after == pytest.approx(before, abs=0.03)


@pytest.mark.parametrize(
    "sketch",
    [
        StoredArrivals(gaps=b"", slots=b"\xff" * 3, days=math.nan),
        StoredArrivals(gaps=b"\xff" * 64, slots=b"\xff" * 96, days=-5, last_wall_s=1e18),
        StoredArrivals(gaps=b"\x01" * 64, slots=b"\x00" * 96, days=1e300, last_wall_s=math.nan),
    ],
)
def test_a_broken_sketch_does_no_harm(sketch: StoredArrivals) -> None:
    model = restore(sketch, 0.0, 1e6)
    assert 0 <= model.chance(10.0, 1e6, 600) <= 1
    assert model.idle_s(10.0) == 10.0


# ---------------------------------------------------------------------------------- properties

steps = st.lists(
    st.tuples(
        st.floats(-1000, 3e5),  # of `now`
        st.floats(-1e6, 1e6),  # of the wall clock: it may jump
        st.integers(-1, 5000),
    ),
    max_size=40,
)
horizons = st.floats(0, 3e5)


def walk(moves: Observed) -> tuple[Arrivals, float, float]:
    model, now, wall = Arrivals(0.0), 0.0, 1e9
    for gap_s, jump_s, count in moves:
        now, wall = now + gap_s, wall + jump_s
        model.observe(now, wall, count)
    return model, now, wall


@given(steps, horizons, horizons, st.floats(-100, 3e5) | st.just(1e11))
def test_chances_are_chances_and_grow_with_the_horizon(
    moves: Any, one: float, other: float, later_s: float
) -> None:
    model, now, wall = walk(moves)
    near, far = sorted((one, other))
    asked = now + later_s, wall + later_s
    low, high = model.chance(*asked, near), model.chance(*asked, far)
    assert 0 <= low <= high + 1e-9 <= 1 + 1e-9
    assert math.isfinite(model.rate_per_s(asked[0]))
    assert model.rate_per_s(asked[0]) >= 0
    window = model.next_window(*asked)
    if window is not None:
        assert asked[0] <= window[0] <= window[1] < math.inf
    assert (low, high, window) == (
        model.chance(*asked, near), model.chance(*asked, far), model.next_window(*asked)
    )  # fmt: skip


@given(steps, st.floats(-1e6, 1e9))
def test_a_sketch_brings_back_what_it_was_made_of(moves: Any, other_now: float) -> None:
    model, now, wall = walk(moves)
    sketch = model.sketch(now, wall)
    assert len(msgspec.json.encode(sketch)) < 1500
    again = restore(sketch, other_now, wall)
    twice = again.sketch(other_now, wall)
    assert (twice.gaps, twice.slots) == (sketch.gaps, sketch.slots)
    assert again.idle_s(other_now) == pytest.approx(
        model.idle_s(now) if model.last_at is not None else 0.0, abs=1e-3
    )


@given(steps)
def test_memory_does_not_grow(moves: Any) -> None:
    model, *_ = walk(moves)
    assert (len(model.gaps), len(model.slots)) == (64, 96)
    assert max(model.gaps) <= CAP + 1
    assert min(*model.gaps, *model.slots, model.days) >= 0


def test_bins_grow_by_a_fifth() -> None:
    assert (EDGES[0], EDGES[-1]) == (1.0, pytest.approx(DAY_S))
    assert all(1.2 < b / a < 1.21 for a, b in itertools.pairwise(EDGES))
