"""A route's canary: every verdict by example, whole runs, and counts that only grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.wire.routes import Canary, DemandReport, TargetCounts
from scheduler.policy.route_canary import Counts, Observed, judge

PLAN = Canary(
    model="new", steps=(5, 25, 50), interval_s=60, min_requests=20, max_error_rate=0.1,
    max_ttft_ratio=1.5,
)  # fmt: skip
OLD = Counts(400, 1, 400, 40.0)  # 0.1 s each


def good(requests: int, errors: int = 0, ttft_s: float = 0.1) -> Counts:
    return Counts(requests, errors, requests, requests * ttft_s)


@pytest.mark.parametrize(
    ("step", "in_step_s", "new", "old", "action", "words"),
    [
        (0, 60, good(20), OLD, "next", "0 errors in 20 requests at 5 %"),
        (1, 60, good(20, 2), OLD, "next", "2 errors in 20 requests at 25 %"),
        (2, 60, good(20), OLD, "promote", "mean TTFT 0.100 s against 0.100 s"),
        (0, 59, good(20), OLD, "hold", "59 s of interval_s 60 s"),
        (0, 900, good(19), OLD, "hold", "19 of min_requests 20 requests"),
        (0, 0, Counts(), Counts(), "hold", "0 of min_requests 20 requests"),
        (0, 60, good(20, 3), OLD, "rollback", "3 errors in 20 requests: 10.0% is max_error_rate"),
        (0, 1, Counts(3, 3, 0, 0.0), OLD, "rollback", "3 errors in 3 requests"),
        (0, 1, Counts(2, 2, 0, 0.0), OLD, "hold", "2 of min_requests"),
        (2, 1, good(100, 11), OLD, "rollback", "11 errors in 100 requests"),
        (0, 60, good(100, 10), OLD, "next", "10 errors in 100 requests"),
        (0, 1, good(20, 0, 0.16), OLD, "rollback", "max_ttft_ratio is 1.5"),
        (0, 60, good(20, 0, 0.14), OLD, "next", "mean TTFT 0.140 s against 0.100 s"),
        (0, 60, good(19, 0, 9.0), OLD, "hold", "19 of min_requests"),
        (0, 60, good(20, 0, 9.0), good(19), "hold", "only 19 answers of the others"),
        (0, 60, Counts(20, 0, 19, 1.0), OLD, "hold", "only 19 answers of it"),
    ],
)
def test_each_verdict_has_its_reason(
    step: int, in_step_s: float, new: Counts, old: Counts, action: str, words: str
) -> None:
    verdict = judge(PLAN, step, in_step_s, new, old)
    assert (verdict.action, words in verdict.reason) == (action, True), verdict


def test_without_a_ttft_limit_nobody_is_compared() -> None:
    plan = Canary(model="new", steps=(50,), interval_s=1, min_requests=1, max_ttft_ratio=None)
    assert judge(plan, 0, 1, good(1, 0, 99.0), Counts()).action == "promote"


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 30), st.floats(0, 0.3)), max_size=80),
)  # fmt: skip
def test_a_run_ends_at_most_once_and_never_goes_back(
    parts: list[tuple[float, int, float]],
) -> None:
    """Traffic of any quality: steps come in order, each with its requests and its time."""
    step, in_step_s, new = 0, 0.0, Counts()
    for passed_s, requests, error_rate in parts:
        in_step_s += passed_s
        new = new.plus(good(requests, round(requests * error_rate)))
        verdict = judge(PLAN, step, in_step_s, new, OLD)
        if verdict.action in ("next", "promote"):
            assert new.requests >= PLAN.min_requests
            assert in_step_s >= PLAN.interval_s
            assert new.errors <= PLAN.max_error_rate * new.requests
        if verdict.action == "promote":
            assert step == len(PLAN.steps) - 1
            return
        if verdict.action == "rollback":
            assert new.errors > PLAN.max_error_rate * max(new.requests, PLAN.min_requests)
            return
        if verdict.action == "next":
            step, in_step_s, new = step + 1, 0.0, Counts()
            assert step < len(PLAN.steps)


# ------------------------------------------------------------------------------ what was seen


def report(
    seq: int, boot: int = 1, router: str = "r1", table: int = 1, **requests: int
) -> DemandReport:
    targets = tuple(
        TargetCounts(
            route="r", model=model, requests=n, errors=n // 2, first_bytes=n, first_byte_s=n * 0.5
        )
        for model, n in requests.items()
    )
    return DemandReport(
        router_id=router, boot_id=boot, seq=seq, routes_version=table, targets=targets
    )  # fmt: skip


def test_what_was_counted_before_this_leader_heard_of_it_is_left_out() -> None:
    seen = Observed()
    seen.heard(report(7, new=100))
    assert seen.of("r", "new") == Counts()
    seen.heard(report(8, new=110))
    assert seen.of("r", "new") == Counts(10, 5, 10, 5.0)


def test_lost_doubled_and_late_reports_change_nothing() -> None:
    seen = Observed()
    seen.heard(report(1))
    seen.heard(report(4, new=6))
    seen.heard(report(4, new=6))
    seen.heard(report(2, new=2))
    assert seen.of("r", "new").requests == 6
    seen.heard(report(9, new=8))
    assert seen.of("r", "new").requests == 8


def test_a_router_that_restarted_counts_from_nothing() -> None:
    seen = Observed()
    seen.heard(report(1, new=50))
    seen.heard(report(1, boot=2, new=4))
    seen.heard(report(2, boot=2, new=5))
    assert seen.of("r", "new").requests == 5


def test_a_route_that_was_taken_away_and_came_back_counts_from_nothing() -> None:
    seen = Observed()
    seen.heard(report(1, new=50))
    seen.heard(report(2, new=3))
    assert seen.of("r", "new").requests == 3


def test_routers_are_added_up_and_a_step_begins_again() -> None:
    seen = Observed()
    for router in ("r1", "r2"):
        seen.heard(report(1, router=router))
        seen.heard(report(2, router=router, new=4, old=2))
    assert (seen.of("r", "new").requests, seen.of("r", "old").requests) == (8, 4)
    seen.restart("r", 1)
    assert seen.of("r", "new") == Counts()
    seen.heard(report(3, router="r1", new=5, old=2))
    assert seen.of("r", "new") == Counts(1, 0, 1, 0.5)


def test_a_step_counts_from_when_a_router_goes_by_its_table() -> None:
    seen = Observed()
    seen.heard(report(1, table=4, new=10))
    seen.restart("r", 5)
    seen.heard(report(2, table=4, new=20))  # by the old weights
    seen.heard(report(3, table=5, new=30))  # some of these too
    assert seen.of("r", "new") == Counts()
    seen.heard(report(4, table=5, new=37))
    assert seen.of("r", "new").requests == 7
