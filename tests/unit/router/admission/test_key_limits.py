"""Limits: what is let in, what is refused with when to come back, and what is charged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.contract.access import Limits, Used
from runtime.router.admission.key_limits import Account, GpuShare


def account(**limits: Any) -> Account:
    made = Account("key:k1", Limits())
    made.limit(Limits(**limits), 0.0)
    return made


def test_no_limit_never_refuses() -> None:
    free = account()
    for _ in range(10_000):
        assert free.over(10**9, 60.0, 0.0) is None
        free.begin(10**9)
    assert free.headers(0.0) == []


def test_a_minutes_worth_at_once_then_evenly() -> None:
    sixty = account(requests_per_min=60)
    for _ in range(60):
        assert sixty.over(1, 60.0, 0.0) is None
        sixty.begin(1)
    over = sixty.over(1, 60.0, 0.0)
    assert over is not None
    assert (over.code, over.retry_after_s) == ("rate_limit_exceeded", 1.0)
    assert "60 requests a minute" in over.message
    assert sixty.over(1, 60.0, 1.0) is None


def test_a_refused_request_pays_nothing() -> None:
    one = account(requests_per_min=1)
    one.begin(1)
    for _ in range(100):
        assert one.over(1, 60.0, 1.0) is not None
    assert one.over(1, 60.0, 60.0) is None


def test_tokens_are_settled_at_the_end() -> None:
    thousand = account(tokens_per_min=1000)
    thousand.begin(100)
    thousand.end(100, 1600, 0)  # it wrote far more than was expected
    over = thousand.over(1, 60.0, 0.0)
    assert over is not None
    assert over.retry_after_s == pytest.approx(601 * 60 / 1000)
    assert thousand.used.tokens == 1600
    thousand.begin(500)
    thousand.end(500, 0, 0)  # refused by the engine: given back
    assert thousand.over(1, 60.0, 0.0).retry_after_s == pytest.approx(601 * 60 / 1000)


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_only() -> None:
    small = account(tokens_per_min=100)
    assert small.over(10_000, 60.0, 0.0) is None
    small.begin(10_000)
    assert small.over(1, 60.0, 0.0) is not None


def test_concurrent_counts_those_at_other_routers() -> None:
    two = account(concurrent=2)
    two.begin(1)
    two.hear(Used(in_flight=1), 0.0)
    assert two.over(1, 60.0, 0.0).code == "concurrency_limit"
    two.hear(Used(in_flight=0), 1.0)
    assert two.over(1, 60.0, 1.0) is None


def test_what_others_used_is_paid_for_once() -> None:
    sixty = account(requests_per_min=60)
    sixty.hear(Used(requests=1000), 0.0)  # before this router knew the key: history
    assert sixty.over(1, 60.0, 0.0) is None
    sixty.hear(Used(requests=1060), 0.0)
    assert sixty.over(1, 60.0, 0.0) is not None
    sixty.hear(Used(requests=10), 60.0)  # a new leader that does not know all yet
    sixty.hear(Used(requests=1060), 60.0)
    assert sixty.over(1, 60.0, 60.0) is None


def test_a_days_tokens_count_everywhere_until_the_day_ends() -> None:
    quota = account(tokens_per_day=100)
    quota.begin(1)
    quota.end(1, 60, 0)
    quota.hear(Used(tokens=40), 0.0)
    over = quota.over(1, 3600.0, 0.0)
    assert (over.code, over.retry_after_s) == ("quota_exceeded", 3600.0)
    quota.turn()
    assert quota.over(1, 86400.0, 0.0) is None


def test_gpu_seconds_of_a_day() -> None:
    quota = account(gpu_s_per_day=1.5)
    quota.begin(1)
    quota.end(1, 1, 1400)
    assert quota.over(1, 60.0, 0.0) is None
    quota.hear(Used(gpu_ms=100), 0.0)
    assert quota.over(1, 60.0, 0.0).code == "quota_exceeded"


def test_a_changed_limit_keeps_what_was_spent() -> None:
    changed = account(requests_per_min=10)
    for _ in range(8):
        changed.begin(1)
    changed.limit(Limits(requests_per_min=20), 0.0)
    assert changed.headers(0.0)[:2] == [
        (b"x-ratelimit-limit-requests", b"20"),
        (b"x-ratelimit-remaining-requests", b"12"),
    ]
    changed.limit(Limits(requests_per_min=5), 0.0)
    assert changed.over(1, 60.0, 0.0) is not None


def test_the_example_of_the_shared_gpu() -> None:
    shares = GpuShare()
    first, second = shares.begin("r", 0.0), shares.begin("r", 0.0)
    assert shares.end("r", first, 1, 4.0) == pytest.approx(2.0)
    assert shares.end("r", second, 2, 4.0) == pytest.approx(4.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 50)), min_size=1, max_size=20))
def test_shares_of_a_gpu_add_up_to_the_time_it_was_busy(calls: list[tuple[float, float]]) -> None:
    events = sorted(
        [(start, 0, i) for i, (start, _) in enumerate(calls)]
        + [(start + length, 1, i) for i, (start, length) in enumerate(calls)]
    )
    shares, readings, charged, busy, last, open_ = GpuShare(), {}, 0.0, 0.0, 0.0, 0
    for now, kind, index in events:
        busy += (now - last) * (open_ > 0)
        last = now
        if kind == 0:
            readings[index] = shares.begin("r", now)
            open_ += 1
        else:
            charged += shares.end("r", readings[index], 1, now)
            open_ -= 1
    assert charged == pytest.approx(busy, abs=1e-6)
