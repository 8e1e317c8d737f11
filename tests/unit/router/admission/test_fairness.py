"""Who goes first and who has to leave, by example and by Hypothesis; and admission's use of it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.admission.decisions import Admission, Forward, Held
from runtime.router.admission.fairness import BACKGROUND, FairQueue, RequestProfile
from runtime.router.admission.refusals import Refused
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable


class Waiting(NamedTuple):
    seq: int
    profile: RequestProfile


def queue(*profiles: RequestProfile) -> FairQueue[Waiting]:
    made: FairQueue[Waiting] = FairQueue()
    for seq, profile in enumerate(profiles):
        made.add(Waiting(seq, profile), 1000.0)
    return made


def drained(waiting: FairQueue[Waiting]) -> list[Waiting]:
    """All, in the order in which they are sent."""
    order = []
    while waiting:
        first = waiting.first()
        waiting.sent(first.profile)
        waiting.remove(first)
        waiting.check()
        order.append(first)
    return order


def test_the_example_in_the_docstring() -> None:
    a, b = RequestProfile("a", tokens=100), RequestProfile("b", tokens=100, weight=2.0)
    order = [w.profile.tenant for w in drained(queue(*[a] * 4, *[b] * 8))]
    assert "".join(order) == "abbabbabbabb"


def test_one_tenant_alone_is_served_by_arrival() -> None:
    one_tenant = queue(*[RequestProfile("a", tokens=t) for t in (9, 1, 5, 3)])
    assert [w.seq for w in drained(one_tenant)] == [0, 1, 2, 3]


def test_higher_priorities_go_first_and_the_background_last() -> None:
    profiles = [RequestProfile("a", p) for p in (0, BACKGROUND, 100, 0, -100, 100)]
    assert [w.profile.priority for w in drained(queue(*profiles))] == [
        100, 100, 0, 0, -100, BACKGROUND,
    ]  # fmt: skip


def test_nobody_saves_up_by_being_idle() -> None:
    waiting = queue(*[RequestProfile("busy", tokens=100)] * 100)
    for _ in range(50):
        first = waiting.first()
        waiting.sent(first.profile)
        waiting.remove(first)
    for seq in range(100, 110):
        waiting.add(Waiting(seq, RequestProfile("late", tokens=100)), 1000.0)
    # Alternating, not ten of the late one in a row.
    order = [w.profile.tenant for w in drained(waiting)][:6]
    assert Counter(order) == {"busy": 3, "late": 3}


def test_leaving_the_queue_does_not_wipe_out_what_one_was_given() -> None:
    waiting = queue(
        RequestProfile("a", tokens=1000),
        RequestProfile("b", tokens=1),
        RequestProfile("b", tokens=1),
    )
    first = waiting.first()
    waiting.sent(first.profile)
    waiting.remove(first)
    waiting.add(Waiting(10, RequestProfile("a", tokens=1)), 1000.0)
    assert [w.profile.tenant for w in drained(waiting)] == ["b", "b", "a"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), min_size=30, max_size=200),
    st.fixed_dictionaries({t: st.sampled_from((0.5, 1.0, 4.0)) for t in "abc"}),
)
def test_while_all_wait_each_gets_its_share(
    asked: list[tuple[str, int]], weights: dict[str, float]
) -> None:
    """The VTC paper's bound: counters of those who wait stay within the largest charge."""
    waiting = queue(*[RequestProfile(t, tokens=n, weight=weights[t]) for t, n in asked])
    got = dict.fromkeys({t for t, _ in asked}, 0.0)
    left = Counter(t for t, _ in asked)
    largest = max(n / weights[t] for t, n in asked)
    for sent in drained(waiting):
        tenant = sent.profile.tenant
        got[tenant] += sent.profile.tokens / sent.profile.weight
        left[tenant] -= 1
        if not all(left.values()):
            break
        assert max(got.values()) - min(got.values()) <= largest + 1e-9


def test_who_leaves_a_full_queue() -> None:
    low, normal = RequestProfile("a", -100), RequestProfile("a")
    waiting = queue(normal, low, low)
    assert waiting.loser(RequestProfile("b")).seq == 2  # the newest of the lowest priority
    assert waiting.loser(low) is None
    assert waiting.loser(RequestProfile("b", -200)) is None
    flood = queue(*[RequestProfile("a")] * 5, RequestProfile("b"))
    assert flood.loser(RequestProfile("b")).seq == 4  # the newest of whoever takes most
    assert flood.loser(RequestProfile("c")).seq == 4
    assert flood.loser(RequestProfile("a")) is None
    assert (
        queue(RequestProfile("a"), RequestProfile("b")).loser(RequestProfile("c")) is None
    )  # nobody takes more than it would


# ------------------------------------------------------------------------------- in admission


def admission(*replicas: str, limit: int | None = None, **fields: Any) -> Admission:
    made = Admission(limit)
    publish(made, *replicas, **fields)
    return made


def publish(to: Admission, *replicas: str, full: bool = False, **fields: Any) -> list:
    endpoints = tuple(
        Endpoint(replica_id=r, base_url=f"http://{r}", key="k", full=full) for r in replicas
    )
    route = ModelRoute(name="m", endpoints=endpoints, **fields)
    return to.routes(RouteTable(version=1, models=(route,)), 0.0)


def code_of(decision: object) -> str:
    assert isinstance(decision, Refused), decision
    return decision.code


def test_a_flood_of_one_tenant_does_not_keep_another_out() -> None:
    full = admission(max_queue=3)
    for i in range(3):
        assert isinstance(full.arrive(f"a{i}", "m", 0.0, RequestProfile("a")), Held)
    assert code_of(full.arrive("a3", "m", 0.0, RequestProfile("a"))) == "queue_full"
    assert full.shed() == []
    assert isinstance(full.arrive("b0", "m", 0.0, RequestProfile("b")), Held)
    (shed,) = full.shed()
    assert (shed.request_id, shed.status, shed.code) == ("a2", 429, "shed")
    assert full.waiting("m") == 3
    assert isinstance(full.arrive("high", "m", 0.0, RequestProfile("a", 100)), Held)
    assert [s.request_id for s in full.shed()] == ["a1"]
    full.check_invariants()


def test_a_wait_that_cannot_be_met_is_refused_at_once_and_asked_for() -> None:
    cold = admission(eta_s=60.0, hold_s=300.0)
    refused = cold.arrive("1", "m", 0.0, RequestProfile(wait_s=10.0))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code, refused.retry_after_s) == (503, "not_in_time", 60.0)
    assert cold.demand(0.0)[0].waiting == 1  # so that it is started for a later one
    assert cold.demand(61.0)[0].waiting == 0
    assert isinstance(cold.arrive("2", "m", 0.0, RequestProfile(wait_s=100.0)), Held)
    assert isinstance(cold.arrive("3", "m", 0.0), Held)
    assert [r.request_id for r in cold.tick(100.0)] == ["2"]
    assert [r.request_id for r in cold.tick(300.0)] == ["3"]
    late = admission(eta_s=400.0, hold_s=300.0)
    assert code_of(late.arrive("1", "m", 0.0)) == "not_in_time"


def test_a_changed_hold_s_counts_for_those_that_wait() -> None:
    waiting = admission(hold_s=100.0)
    waiting.arrive("1", "m", 0.0)
    publish(waiting, hold_s=10.0)
    assert waiting.due_at() == 10.0
    assert [r.request_id for r in waiting.tick(10.0)] == ["1"]


def test_a_replica_that_begins_to_serve_gets_more_bit_by_bit() -> None:
    waking = admission(target_concurrency=2)
    for i in range(20):
        waking.arrive(str(i), "m", 0.0)
    sent = publish(waking, "r", target_concurrency=2)
    assert [f.request_id for f in sent] == ["0", "1"]
    # Each answer that begins lets one more in: 2, 4, 8 ... as in TCP's slow start.
    assert [f.request_id for f in waking.answered("0", 1.0, 200)] == ["2"]
    more = waking.finished("0", 1.0) + waking.answered("1", 1.0, 200) + waking.finished("1", 1.0)
    assert [f.request_id for f in more] == ["3", "4", "5"]
    assert waking.in_flight() == {"r": 4}
    waking.check_invariants()


def test_an_engine_with_a_queue_of_its_own_gets_no_more_than_it_has() -> None:
    busy = admission("r", target_concurrency=4)
    for i in range(4):
        assert isinstance(busy.arrive(str(i), "m", 0.0), Forward)
    publish(busy, "r", full=True, target_concurrency=4)
    assert busy.answered("0", 1.0, 200) == []
    assert isinstance(busy.arrive("4", "m", 1.0), Held)
    assert [f.request_id for f in busy.finished("0", 2.0)] == ["4"]  # one for one
    publish(busy, "r", target_concurrency=4)
    assert busy.answered("1", 3.0, 200) == []  # grows again, but nobody waits
    assert isinstance(busy.arrive("5", "m", 3.0), Forward)


def test_the_background_takes_only_what_nobody_else_wants() -> None:
    some = admission("r", target_concurrency=2, limit=8)
    batch = RequestProfile("a", BACKGROUND)
    assert isinstance(some.arrive("b0", "m", 0.0, batch), Forward)
    assert isinstance(some.arrive("n0", "m", 0.0), Forward)
    assert isinstance(some.arrive("b1", "m", 0.0, batch), Held)  # 2 in flight
    some.answered("n0", 0.0, 200)
    assert isinstance(some.arrive("n1", "m", 0.0), Forward)  # passes the one that waits
    assert some.demand(0.0)[0].background == 2
    assert some.finished("n0", 1.0) == []
    assert [f.request_id for f in some.finished("n1", 1.0)] == ["b1"]
    some.check_invariants()


def test_one_that_came_back_is_late_once() -> None:
    """Found by the simulator: its first wait's deadline was still in the heap."""
    twice = admission(hold_s=10.0)
    twice.arrive("1", "m", 0.0)
    twice.arrive("2", "m", 1.0)
    publish(twice, "r", hold_s=10.0, target_concurrency=1)
    publish(twice, hold_s=10.0)
    twice.failed("1", 2.0, "died", delivered=False)
    assert [r.request_id for r in twice.tick(10.0)] == ["1"]
    assert [r.request_id for r in twice.tick(11.0)] == ["2"]
    twice.check_invariants()


@pytest.mark.parametrize("delivered", [True, False])
def test_one_whose_replica_failed_is_first_again(delivered: bool) -> None:
    failing = admission("r")
    failing.arrive("1", "m", 0.0, RequestProfile("a"))
    publish(failing)
    for i in range(2, 5):
        failing.arrive(str(i), "m", 1.0, RequestProfile("a"))
    assert isinstance(failing.failed("1", 2.0, "died", delivered), Held)
    assert next(f.request_id for f in publish(failing, "s")) == "1"
