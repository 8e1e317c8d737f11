"""Breaker, retry budget and percentile sketch: each rule by example or by Hypothesis."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runtime.router.admission.breaker import (
    FREE_RETRIES,
    MAX_REST_S,
    PROBE_S,
    REST_S,
    SERVER_ERRORS,
    WINDOW_S,
    Breaker,
    RetryBudget,
)
from runtime.router.admission.decisions import Admission, Forward, Held
from runtime.router.admission.percentiles import SlidingPercentiles
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable


def test_each_failure_in_a_row_doubles_the_rest() -> None:
    breaker, now, rests = Breaker(), 0.0, []
    for _ in range(4):
        breaker.failed("a", sent_at=now, now=now + 0.1)
        assert breaker.rests("a", now + 0.1)
        (until,) = breaker.rests_end()
        rests.append(round(until - now - 0.1, 3))
        now = until
        breaker.tick(now)
        assert not breaker.rests("a", now)
    assert rests == [REST_S, 2 * REST_S, MAX_REST_S, MAX_REST_S]


def test_those_sent_before_a_failure_count_once_together() -> None:
    breaker = Breaker()
    for _ in range(50):
        breaker.failed("a", sent_at=0.0, now=1.0)
    assert not breaker.rests("a", 1.0 + REST_S)


def test_after_two_failures_one_probe_at_a_time_until_one_is_answered() -> None:
    breaker = Breaker()
    breaker.failed("a", 0.0, 1.0)
    breaker.failed("a", 3.0, 4.0)
    now = 4.0 + 2 * REST_S
    assert not breaker.rests("a", now)
    breaker.chosen("a", now)
    assert breaker.rests("a", now + PROBE_S / 2)
    assert not breaker.rests("a", now + PROBE_S)
    assert breaker.answered("a", now + PROBE_S / 2, server_error=False)
    assert not breaker


def test_server_errors_make_a_replica_avoided_but_never_unusable() -> None:
    breaker = Breaker()
    for count in range(1, SERVER_ERRORS + 1):
        breaker.answered("a", 1.0, server_error=True)
        assert breaker.avoided("a", 1.0) == (count >= SERVER_ERRORS)
        assert not breaker.rests("a", 1.0)
    breaker.answered("a", 1.0, server_error=False)
    assert not breaker.avoided("a", 1.0)


def routed(*names: str, **fields: Any) -> Admission:
    admission = Admission()
    endpoints = tuple(Endpoint(replica_id=n, base_url=f"http://{n}", key="k") for n in names)
    admission.routes(
        RouteTable(version=1, models=(ModelRoute(name="m", endpoints=endpoints, **fields),)), 0.0
    )
    return admission


def test_a_replica_that_answers_errors_is_left_for_another_and_tried_again() -> None:
    admission = routed("a", "b")
    chosen = []
    for index in range(60):
        decision = admission.arrive(str(index), "m", 1.0)
        assert isinstance(decision, Forward)
        replica = decision.endpoint.replica_id
        chosen.append(replica)
        admission.answered(str(index), 1.0, 500 if replica == "a" else 200)
        admission.finished(str(index), 1.0)
    assert chosen.count("a") == SERVER_ERRORS
    later = [admission.arrive(f"later-{i}", "m", 1.0 + REST_S) for i in range(2)]
    assert {d.endpoint.replica_id for d in later if isinstance(d, Forward)} == {"a", "b"}


def test_the_only_replica_serves_on_whatever_it_answers() -> None:
    admission = routed("a")
    for index in range(3 * SERVER_ERRORS):
        assert isinstance(admission.arrive(str(index), "m", 1.0), Forward)
        admission.answered(str(index), 1.0, 500)
        admission.finished(str(index), 1.0)


def test_an_answered_probe_lets_all_who_wait_go_on() -> None:
    admission = routed("a")
    admission.arrive("probe", "m", 0.0)
    for failed_at, tried_again_at in ((0.5, 0.5 + REST_S), (3.0, 3.0 + 2 * REST_S)):
        assert isinstance(admission.failed("probe", failed_at, "refused", False), Held)
        assert admission.due_at() == tried_again_at
        (released,) = admission.tick(tried_again_at)
        assert released.request_id == "probe"
    waiting = [f"waits-{index}" for index in range(5)]
    for request_id in waiting:
        assert isinstance(admission.arrive(request_id, "m", 7.1), Held)
    assert [r.request_id for r in admission.answered("probe", 7.5, 200)] == waiting
    admission.check_invariants()


def test_retries_are_a_share_of_the_requests_or_a_few() -> None:
    budget = RetryBudget()
    assert sum(budget.take(1.0) for _ in range(500)) == FREE_RETRIES
    for _ in range(10_000):
        budget.request(2.0)
    assert sum(budget.take(2.0) for _ in range(5000)) == 2000 - FREE_RETRIES
    assert not budget.take(2.0)
    assert budget.take(2.0 + 2 * WINDOW_S)


def test_a_spent_budget_ends_a_request_with_503_and_retry_after() -> None:
    admission = routed("a", "b", target_concurrency=200)
    for index in range(FREE_RETRIES + 1):
        admission.arrive(str(index), "m", 0.0)
    first = [str(i) for i in range(FREE_RETRIES + 1)]
    decisions = [admission.failed(i, 0.0, "closed the connection", delivered=True) for i in first]
    refused = [d for d in decisions if not isinstance(d, Forward | Held)]
    assert all((r.status, r.code) == (503, "retry_budget_spent") for r in refused)
    admission.check_invariants()


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_never_below_and_at_most_ten_per_cent_above(
    values: list[float], share: float
) -> None:
    sketch = SlidingPercentiles()
    for value in values:
        sketch.add(value, 5.0)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    got = sketch.quantile(share, 5.0)
    assert got is not None
    assert true * 0.999999 <= got <= true * 1.100001


def test_a_minute_later_all_is_forgotten() -> None:
    sketch = SlidingPercentiles()
    assert sketch.quantile(0.95, 0.0) is None
    sketch.add(0.5, 0.0)
    sketch.add(0.1, 30.0)
    assert 0.5 <= (sketch.quantile(1.0, 49.0) or 0) <= 0.56
    assert 0.1 <= (sketch.quantile(1.0, 75.0) or 0) <= 0.12
    assert sketch.quantile(1.0, 120.0) is None
    sketch.add(0.2, 1000.0)
    assert 0.2 <= (sketch.quantile(1.0, 1000.0) or 0) <= 0.23


def test_demand_tells_arrivals_and_the_ttft_of_those_not_held() -> None:
    admission = routed("a")
    for index in range(20):
        admission.arrive(str(index), "m", 1.0)
        admission.answered(str(index), 1.25, 200)
        admission.finished(str(index), 2.0)
    admission.routes(RouteTable(version=2, models=(ModelRoute(name="m"),)), 2.0)
    admission.arrive("held", "m", 2.0)
    admission.routes(
        RouteTable(version=3, models=(ModelRoute(
            name="m", endpoints=(Endpoint(replica_id="a", base_url="http://a", key="k"),)),)),
        90.0,
    )  # fmt: skip
    (demand,) = admission.demand(50.0)
    assert demand.arrived == 21
    assert demand.ttft_p95_s is not None
    assert 0.25 <= demand.ttft_p95_s <= 0.28
    admission.answered("held", 91.0, 200)
    assert admission.demand(91.0)[0].ttft_p95_s is None
