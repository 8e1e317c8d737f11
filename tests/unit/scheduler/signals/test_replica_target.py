"""Replicas by Kubernetes' rules: wishes, stabilization, policies, panic, holding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.wire.model_spec import Autoscale, ModelSpec, ScalePolicy, ScaleRules, ScaleTarget
from scheduler.signals.replica_target import Desired, Sample, ScaleHistory, desired_replicas

FREE = ScaleRules()  # no policy, no window: every wish is followed
OPEN: dict[str, Any] = {"up": FREE, "down": FREE, "panic_window_s": 0.0}


def spec(replicas: tuple[int, int] = (0, 100), concurrency: int = 16, **rules: Any) -> ModelSpec:
    return ModelSpec(
        name="m", source="/m", min_replicas=replicas[0], max_replicas=replicas[1],
        target_concurrency=concurrency, autoscale=Autoscale(**rules),
    )  # fmt: skip


def by(**targets: float) -> dict[str, Any]:
    metrics = tuple(ScaleTarget(metric=m, target=t) for m, t in targets.items())  # type: ignore[arg-type]
    return {"metrics": metrics, **OPEN}


def sample(now: float = 0.0, have: int = 1, waiting: int = 0, **fields: Any) -> Sample:
    values = {"ready": have, "coming": have, "in_flight": 0} | fields
    return Sample(now=now, waiting=waiting, **values)


def once(of: ModelSpec, now: Sample) -> Desired:
    return desired_replicas(of, now, ScaleHistory())


class Loop:
    """A model whose replicas are at once what was desired."""

    def __init__(self, of: ModelSpec, have: int = 1) -> None:
        self.spec, self.have, self.history = of, have, ScaleHistory()
        self.limited_by: str | None = None

    def at(self, now: float, waiting: int, **fields: Any) -> int:
        got = desired_replicas(
            self.spec, sample(now, self.have, waiting, **fields), self.history
        )  # fmt: skip
        self.have, self.limited_by = got.replicas, got.limited_by
        return got.replicas


# ------------------------------------------------------------------------------------- wishes


@pytest.mark.parametrize(
    ("rules", "fields", "wish"),
    [
        (OPEN, {"waiting": 40}, 3),  # concurrency at target_concurrency by default
        (OPEN, {"waiting": 8, "in_flight": 8}, 1),
        (by(queue_depth=5), {"waiting": 11, "in_flight": 90}, 3),
        (by(concurrency=10), {"waiting": 11, "in_flight": 90}, 11),
        (by(gpu_utilization=0.6), {"have": 4, "gpu_utilization": 0.9}, 6),
        (by(gpu_utilization=0.6), {"have": 4, "gpu_utilization": 0.3}, 2),
        (by(gpu_utilization=0.6), {"have": 4, "gpu_utilization": 0.655}, 4),  # within 10 %
        (by(gpu_utilization=0.6), {"have": 4, "gpu_utilization": 0.545}, 4),
        (by(kv_cache_usage=0.7), {"have": 10, "kv_cache_usage": 0.84}, 12),  # no rounding up to 13
        (by(ttft_p95=2.0), {"have": 2, "ttft_p95_s": 5.0}, 5),
        (by(concurrency=16, kv_cache_usage=0.6),
         {"have": 2, "waiting": 40, "kv_cache_usage": 0.9}, 3),
        (by(concurrency=1, kv_cache_usage=0.6),
         {"have": 2, "waiting": 40, "kv_cache_usage": 0.9}, 40),
        # Those on the way take load too.
        (by(gpu_utilization=0.6), {"ready": 2, "coming": 3, "gpu_utilization": 0.9}, 3),
        (by(gpu_utilization=0.6), {"ready": 2, "coming": 3, "gpu_utilization": 0.96}, 3),
        (by(gpu_utilization=0.6), {"ready": 2, "coming": 3, "gpu_utilization": 1.2}, 4),
    ],
)  # fmt: skip
def test_the_wish(rules: dict[str, Any], fields: dict[str, Any], wish: int) -> None:
    assert once(spec(**rules), sample(**fields)).replicas == wish


def test_the_reason_names_the_metric_that_counted() -> None:
    of = spec(**by(concurrency=16, kv_cache_usage=0.6))
    got = once(of, sample(have=2, waiting=40, kv_cache_usage=0.5))
    assert got == Desired(3, "concurrency 40 at a target of 16", None)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1.0])
def test_a_metric_without_a_figure_takes_nothing_away(value: float | None) -> None:
    of = spec(**by(concurrency=16, gpu_utilization=0.6))
    down = once(of, sample(have=4, waiting=16, gpu_utilization=value))
    assert (down.replicas, down.limited_by) == (4, "no figure for gpu_utilization")
    assert once(of, sample(have=4, waiting=160, gpu_utilization=value)).replicas == 10


def test_minimum_and_maximum() -> None:
    assert once(spec((2, 5), **OPEN), sample(have=0)) == Desired(
        2, "concurrency 0 at a target of 16", "min_replicas"
    )
    got = once(spec((2, 5), **OPEN), sample(have=2, waiting=999))
    assert (got.replicas, got.limited_by) == (5, "max_replicas")
    # The default rules slow down neither a raised minimum nor a lowered maximum.
    assert once(spec((5, 9)), sample(have=1)).replicas == 5
    assert once(spec((0, 3)), sample(have=8, waiting=999)).replicas == 3


def test_the_last_replica_is_the_idle_timers() -> None:
    assert once(spec(**OPEN), sample(have=3)).replicas == 1
    assert once(spec(**OPEN), sample(have=0)).replicas == 0


# --------------------------------------------------------------------- from zero, and panic


def test_from_zero_the_wish_counts_at_once() -> None:
    for waiting, wish in ((1, 1), (16, 1), (17, 2), (90, 6), (9999, 8)):
        assert once(spec((0, 8)), sample(have=0, waiting=waiting)).replicas == wish
    loop = Loop(spec(**by(queue_depth=4)), 0)
    assert loop.at(0, waiting=0, in_flight=1) == 1


def test_nothing_goes_while_nothing_is_ready_yet() -> None:
    got = once(spec(**OPEN), sample(ready=0, coming=4, waiting=1))
    assert (got.replicas, got.limited_by) == (4, "nothing is ready yet")


def test_a_burst_is_panic_two_seconds_in() -> None:
    loop = Loop(spec())
    assert [loop.at(t, 0) for t in (-100, 0)] == [1, 1]
    got = [loop.at(t, 100, ready=1) for t in (0, 1, 2)]
    assert got == [1, 1, 7]  # the docstring's example: 33 is twice 16


def test_panic_takes_nothing_away_and_ends_a_minute_after_its_cause() -> None:
    loop = Loop(spec(**OPEN | {"panic_window_s": 6.0}))
    for t in range(10):
        loop.at(t, 100, ready=1)
    assert loop.have == 7
    assert [loop.at(t, 0, ready=7) for t in (9.5, 30, 68)] == [7, 7, 7]
    assert loop.limited_by == "panic"
    assert loop.at(80, 0, ready=7) == 1


def test_panic_can_be_switched_off() -> None:
    loop = Loop(spec(panic_window_s=0.0))
    loop.at(-100, 0)
    assert [loop.at(t, 1000) for t in range(30)] == [1] * 30


# ------------------------------------------------------------------ stabilization and policies


def test_up_waits_for_its_window_and_then_doubles() -> None:
    loop = Loop(spec(panic_threshold=100.0))
    loop.at(-600, 0)
    seen = {t: loop.at(t, 128) for t in range(0, 140, 5)}
    assert [t for t in seen if t and seen[t] > seen[t - 5]] == [60, 90, 120]
    assert [seen[t] for t in (55, 60, 90, 120)] == [1, 2, 4, 8]


def test_down_waits_for_its_window_and_then_halves() -> None:
    loop = Loop(spec(), 8)
    loop.at(0, 128)
    seen = {t: loop.at(t, 1) for t in range(5, 600, 5)}
    assert loop.have == 1
    assert [t for t in seen if t > 5 and seen[t] < seen[t - 5]] == [305, 365, 425]
    assert [seen[t] for t in (300, 305, 365, 425)] == [8, 4, 2, 1]


def test_a_dip_in_demand_takes_nothing_away() -> None:
    loop = Loop(spec(), 4)
    assert [loop.at(t, 64 if t % 200 == 0 else 0) for t in range(0, 2000, 10)] == [4] * 200


def test_a_spike_adds_nothing() -> None:
    loop = Loop(spec(panic_threshold=100.0))
    loop.at(-600, 0)
    assert [loop.at(t, 64 if t % 50 == 0 else 1) for t in range(0, 1000, 10)] == [1] * 100


def test_the_policy_that_allows_most_counts() -> None:
    rules = ScaleRules(
        policies=(
            ScalePolicy(type="percent", value=10, period_s=60),
            ScalePolicy(type="count", value=4, period_s=60),
        )
    )
    of = spec((0, 999), up=rules, down=rules, panic_window_s=0.0)
    assert once(of, sample(have=10, waiting=9999)) == Desired(
        14, "concurrency 9999 at a target of 16", "up: policies"
    )
    assert once(of, sample(have=100, waiting=9999)).replicas == 110  # not 111: floats
    loop = Loop(of, 100)
    loop.at(0, 9999)
    assert [loop.at(t, 9999) for t in (1, 59, 60, 119, 120)] == [110, 110, 121, 121, 134]


def test_replacing_what_crashed_is_no_scaling() -> None:
    loop = Loop(spec(), 4)
    for t in range(0, 120, 10):
        loop.at(t, 64)
    loop.have = 3
    assert loop.at(121, 64) == 4


def test_what_found_no_room_is_not_counted_against_the_policy() -> None:
    rules = ScaleRules(policies=(ScalePolicy(type="count", value=2, period_s=600),))
    of, history = spec(up=rules, panic_window_s=0.0), ScaleHistory()
    got = [desired_replicas(of, sample(t, 1, 160), history).replicas for t in range(5)]
    assert got == [3] * 5
    got = [desired_replicas(of, sample(t, 2, 160), history).replicas for t in range(5, 9)]
    assert got == [3] * 4  # one of the two was found room for
    assert desired_replicas(of, sample(9, 3, 160), history).replicas == 3
    assert desired_replicas(of, sample(700, 3, 160), history).replicas == 5


def test_what_an_operator_added_is_not_counted_against_the_policy() -> None:
    rules = ScaleRules(policies=(ScalePolicy(type="count", value=2, period_s=600),))
    of, history = spec(up=rules, panic_window_s=0.0), ScaleHistory()
    assert desired_replicas(of, sample(0, 1, 32), history).replicas == 2
    # One of the five new ones was asked for: the period began with 5, and 7 are allowed.
    assert desired_replicas(of, sample(1, 6, 999), history).replicas == 7


def test_stabilization_starts_nothing_for_demand_that_is_gone() -> None:
    loop = Loop(spec())
    for t in range(5):
        loop.at(t, 100, ready=1)
    loop.have = 2  # of 7 plans only one more found room; the others, not counted, may be called off
    assert loop.at(200, 0) == 2


# --------------------------------------------------------------------------- holding, restarts


def test_after_a_restart_nothing_goes_until_the_hold_ends() -> None:
    loop = Loop(spec(**OPEN), 4)
    loop.history.hold(300)
    assert [loop.at(t, 1) for t in (0, 100, 299)] == [4, 4, 4]
    assert loop.limited_by == "hold after a restart"
    assert loop.at(299.5, 200) == 13  # up is free
    assert loop.at(300, 1) == 1


def test_a_new_history_counts_what_there_is_as_recommended() -> None:
    loop = Loop(spec(), 4)
    assert [loop.at(t, 1) for t in (0, 100, 299, 300)] == [4, 4, 4, 2]


def test_a_clock_that_steps_back_stands_still() -> None:
    loop = Loop(spec(), 4)
    assert [loop.at(t, 64) for t in (1000, 10, 1001)] == [4, 4, 4]


# ---------------------------------------------------------------------------------- properties

figures = st.none() | st.floats(0, 3) | st.just(float("nan"))
targets = st.lists(
    st.builds(
        ScaleTarget,
        metric=st.sampled_from(
            ["queue_depth", "concurrency", "gpu_utilization", "kv_cache_usage", "ttft_p95"]
        ),
        target=st.floats(0.05, 50),
    ),
    max_size=3,
).map(tuple)
policies = st.lists(
    st.builds(
        ScalePolicy,
        type=st.sampled_from(["percent", "count"]),
        value=st.floats(1, 150),
        period_s=st.floats(1, 400),
    ),
    max_size=2,
).map(tuple)
rules = st.builds(ScaleRules, policies=policies, stabilization_s=st.floats(0, 400))
autoscales = st.builds(
    Autoscale,
    metrics=targets, up=rules, down=rules,
    panic_window_s=st.sampled_from([0.0, 6.0]), panic_threshold=st.floats(1.1, 20),
)  # fmt: skip
specs = st.builds(
    lambda rules, low, more, each: ModelSpec(
        name="m", source="/m", min_replicas=low, max_replicas=max(1, low + more),
        target_concurrency=each, autoscale=rules,
    ),
    autoscales, st.integers(0, 3), st.integers(0, 40), st.integers(1, 20),
)  # fmt: skip
moves = st.lists(
    st.tuples(
        st.floats(0, 120), st.integers(0, 400), st.integers(0, 100), figures, figures, figures,
        st.integers(-2, 2) | st.none(),  # what else happened to its replicas; None: nothing applied
    ),
    min_size=1, max_size=30,
)  # fmt: skip


def walk(of: ModelSpec, steps: list[Any], history: ScaleHistory) -> list[tuple[Sample, Desired]]:
    """Evaluate along `steps`, replicas following what was desired but for what else happened."""
    now, have, seen = 0.0, 1, []
    for gap_s, waiting, in_flight, gpu, kv, ttft, shock in steps:
        now += gap_s
        taken = Sample(now, max(0, have - 1), have, waiting, in_flight, gpu, kv, ttft)
        got = desired_replicas(of, taken, history)
        seen.append((taken, got))
        have = have if shock is None else max(0, got.replicas + shock)
    return seen


@given(specs, moves)
def test_always_within_bounds_and_the_same_twice(of: ModelSpec, steps: list[Any]) -> None:
    history = ScaleHistory()
    seen = walk(of, steps, history)
    assert seen == walk(of, steps, ScaleHistory())
    for taken, got in seen:
        assert got.replicas <= max(of.max_replicas, of.min_replicas)
        assert got.replicas >= of.min_replicas
        if taken.coming or taken.waiting or taken.in_flight:
            assert got.replicas >= 1
    sizes = [len(history.least.runs), len(history.greatest.runs)]
    assert max(sizes) <= of.max_replicas + 2


@given(specs, moves, st.integers(1, 500))
def test_more_waiting_never_wants_fewer(of: ModelSpec, steps: list[Any], more: int) -> None:
    history = ScaleHistory()
    *_, (last, _) = walk(of, steps, history)
    again = copy.deepcopy(history)
    fewer = desired_replicas(of, last, history)
    grown = Sample(
        last.now, last.ready, last.coming, last.waiting + more, last.in_flight,
        last.gpu_utilization, last.kv_cache_usage, last.ttft_p95_s,
    )  # fmt: skip
    assert desired_replicas(of, grown, again).replicas >= fewer.replicas


@given(specs, moves)
def test_never_beyond_what_was_wished_within_the_window(of: ModelSpec, steps: list[Any]) -> None:
    """More than there are: at most the largest wish of the window; fewer: at least the least."""
    high = max(of.min_replicas, of.max_replicas)
    wishes: list[int] = []
    for taken, got in walk(of, steps, ScaleHistory()):
        free = Autoscale(metrics=of.autoscale.metrics, **OPEN)
        bare = ModelSpec(
            name="m", source="/m", min_replicas=of.min_replicas, max_replicas=of.max_replicas,
            target_concurrency=of.target_concurrency, autoscale=free,
        )  # fmt: skip
        wishes.append(once(bare, taken).replicas)
        there = min(taken.coming, high)
        assert min(there, *wishes) <= got.replicas <= max(there, *wishes)


@given(rules, rules, st.lists(st.tuples(st.floats(0.1, 90), st.integers(1, 900)), max_size=40))
def test_policies_hold_over_any_sequence(
    up: ScaleRules, down: ScaleRules, demand: list[tuple[float, int]]
) -> None:
    """Against the plain reading: what there was when the period began, and the change from it."""
    loop = Loop(spec((0, 10_000), up=up, down=down, panic_window_s=0.0, concurrency=1))
    now, track = 0.0, [(-1e9, 1)]

    def began(period_s: float) -> int:
        return [n for at, n in track if at <= now - period_s][-1]

    for gap_s, waiting in demand:
        now += gap_s
        before, after = loop.have, loop.at(now, waiting)
        if after > before and up.policies:
            limits = [began(p.period_s) * (1 + p.value / 100) if p.type == "percent"
                      else began(p.period_s) + p.value for p in up.policies]  # fmt: skip
            assert after < max(limits) + 1
        if after < before and down.policies:
            limits = [began(p.period_s) * (1 - p.value / 100) if p.type == "percent"
                      else began(p.period_s) - p.value for p in down.policies]  # fmt: skip
            assert after > min(limits) - 1
        if after != before:
            track.append((now, after))
