"""The router's admission: each rule by example, then every interleaving Hypothesis finds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.router.admission.decisions import MAX_ATTEMPTS, SUSPECT_S, Admission, Forward, Held
from runtime.router.admission.fairness import BACKGROUND, RequestProfile
from runtime.router.admission.refusals import Refused
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable


def endpoint(name: str) -> Endpoint:
    return Endpoint(replica_id=name, base_url=f"http://{name}", key="k")


def route(name: str = "m", *replicas: str, **fields: Any) -> ModelRoute:
    return ModelRoute(name=name, endpoints=tuple(map(endpoint, replicas)), **fields)


def table(*routes: ModelRoute, version: int = 1) -> RouteTable:
    return RouteTable(version=version, models=routes)


def routed(*routes: ModelRoute) -> Admission:
    admission = Admission()
    admission.routes(table(*routes), 0.0)
    return admission


def replica(decision: object) -> str:
    assert isinstance(decision, Forward), decision
    return decision.endpoint.replica_id


def refusal(decision: object) -> Refused:
    assert isinstance(decision, Refused), decision
    return decision


def test_no_table_yet_is_503() -> None:
    refused = refusal(Admission().arrive("1", "m", 0.0))
    assert (refused.status, refused.code, refused.retry_after_s) == (503, "no_routes", 1.0)


def test_an_unknown_model_is_refused_without_the_names_of_others() -> None:
    """Which of them the caller may see is not admission's to know."""
    admission = routed(route("llama-3b", aliases=("org/llama",)))
    refused = refusal(admission.arrive("1", "lama-3b", 0.0))
    assert (refused.status, refused.code, refused.param) == (404, "model_not_found", "model")
    assert refused.message == "there is no model 'lama-3b'"


def test_an_alias_is_the_model() -> None:
    admission = routed(route("m", "a", aliases=("org/m",)))
    assert replica(admission.arrive("1", "org/m", 0.0)) == "a"
    assert [d.model for d in admission.demand(0.0)] == ["m"]


def test_how_long_each_replica_is_idle_is_known_exactly() -> None:
    admission = routed(route("m", "a"), route("n", "b"), route("o", "c"))
    admission.arrive("1", "m", 10.0)
    admission.arrive("2", "n", 10.0)
    assert admission.idle_s(10.5, 60.0) == {"a": 0.0, "b": 0.0}
    admission.finished("2", 10.6)
    admission.failed("1", 10.7, "it is gone", delivered=False)
    assert admission.idle_s(11.0, 60.0) == pytest.approx({"a": 0.3, "b": 0.4})
    assert admission.idle_s(71.0, 60.35) == pytest.approx({"a": 60.3})


def test_fewest_in_flight_wins_and_ties_go_round() -> None:
    admission = routed(route("m", "a", "b", "c"))
    assert [replica(admission.arrive(str(i), "m", 0.0)) for i in range(6)] == list("abcabc")
    admission.finished("1", 1.0)
    assert replica(admission.arrive("6", "m", 1.0)) == "b"


def test_cold_requests_are_held_and_released_in_order_of_arrival() -> None:
    admission = routed(route("m"))
    assert all(isinstance(admission.arrive(str(i), "m", float(i)), Held) for i in range(5))
    (demand,) = admission.demand(10.0)
    assert (demand.waiting, demand.in_flight, demand.oldest_wait_s) == (5, 0, 10.0)
    released = admission.routes(table(route("m", "a")), 10.0)
    assert [r.request_id for r in released] == list("01234")
    assert {replica(r) for r in released} == {"a"}
    assert admission.in_flight() == {"a": 5}
    admission.check_invariants()


def test_a_full_queue_is_429_with_retry_after() -> None:
    admission = routed(route("m", max_queue=2, eta_s=12.0))
    admission.arrive("1", "m", 0.0)
    admission.arrive("2", "m", 0.0)
    refused = refusal(admission.arrive("3", "m", 0.0))
    assert (refused.status, refused.code, refused.retry_after_s) == (429, "queue_full", 12.0)
    admission.finished("1", 0.0)
    assert isinstance(admission.arrive("4", "m", 0.0), Held)


def test_held_too_long_is_504() -> None:
    admission = routed(route("m", hold_s=30.0, waiting_for="starting on gpu-1"))
    admission.arrive("1", "m", 5.0)
    admission.arrive("2", "m", 6.0)
    assert admission.due_at() == 35.0
    assert admission.tick(34.9) == []
    ended = refusal(*admission.tick(35.0))
    assert (ended.request_id, ended.status) == ("1", 504)
    assert "starting on gpu-1" in ended.message
    assert admission.due_at() == 36.0
    admission.check_invariants()


def test_a_refusal_ends_new_and_held_requests() -> None:
    admission = routed(route("m"))
    admission.arrive("1", "m", 0.0)
    refusing = table(route("m", refusal="needs 80 GiB, no device has it", retry_after_s=60.0))
    (ended,) = admission.routes(refusing, 1.0)
    late = admission.arrive("2", "m", 1.0)
    for refused in (refusal(ended), refusal(late)):
        assert (refused.status, refused.retry_after_s) == (503, 60.0)
        assert "needs 80 GiB" in refused.message
    admission.check_invariants()


def test_a_removed_model_ends_what_waits_for_it() -> None:
    admission = routed(route("m"))
    admission.arrive("1", "m", 0.0)
    ended = refusal(*admission.routes(table(), 1.0))
    assert (ended.request_id, ended.status) == ("1", 404)
    assert admission.demand(1.0) == ()


def test_a_request_in_flight_survives_the_removal_of_its_model() -> None:
    admission = routed(route("m", "a"))
    admission.arrive("1", "m", 0.0)
    assert admission.routes(table(), 1.0) == []
    assert admission.in_flight() == {"a": 1}
    admission.finished("1", 2.0)
    assert admission.demand(2.0) == ()
    admission.check_invariants()


def test_a_failed_replica_is_left_alone_for_a_while() -> None:
    admission = routed(route("m", "a", "b"))
    assert replica(admission.arrive("1", "m", 0.0)) == "a"
    assert replica(admission.failed("1", 1.0, "died", delivered=True)) == "b"
    assert replica(admission.arrive("2", "m", 1.0 + SUSPECT_S / 2)) == "b"
    assert replica(admission.arrive("3", "m", 1.0 + SUSPECT_S)) == "a"


def test_a_replica_is_trusted_at_once_after_a_table_without_it() -> None:
    admission = routed(route("m", "a"))
    admission.arrive("1", "m", 0.0)
    assert isinstance(admission.failed("1", 0.0, "died", delivered=True), Held)
    admission.routes(table(route("m")), 0.1)
    (released,) = admission.routes(table(route("m", "a")), 0.2)
    assert replica(released) == "a"


def test_unstarted_requests_of_a_dead_replica_go_back_to_their_place_in_the_queue() -> None:
    admission = routed(route("m", "a", hold_s=60.0))
    for request_id in "123":
        admission.arrive(request_id, "m", float(request_id))
    for request_id in "231":
        assert isinstance(admission.failed(request_id, 10.0, "died", delivered=True), Held)
    assert isinstance(admission.arrive("4", "m", 11.0), Held)
    assert admission.demand(12.0)[0].oldest_wait_s == 11.0
    released = admission.routes(table(route("m", "new")), 12.0)
    assert [(r.request_id, replica(r)) for r in released] == [(i, "new") for i in "1234"]


def test_hold_s_counts_from_the_first_arrival() -> None:
    admission = routed(route("m", "a", hold_s=60.0))
    admission.arrive("1", "m", 0.0)
    admission.failed("1", 50.0, "died", delivered=True)
    admission.routes(table(route("m", hold_s=60.0)), 51.0)
    ended = refusal(*admission.tick(60.0))
    assert (ended.request_id, ended.status) == ("1", 504)


def test_one_retry_at_another_live_replica_then_502_with_the_reason() -> None:
    admission = routed(route("m", "a", "b", "c"))
    admission.arrive("1", "m", 0.0)
    assert replica(admission.failed("1", 0.0, "closed the connection", delivered=True)) == "b"
    refused = refusal(admission.failed("1", 0.0, "closed the connection", delivered=True))
    assert (refused.status, refused.code) == (502, "replica_failed")
    assert "closed the connection" in refused.message
    admission.check_invariants()


def test_a_request_that_kills_every_new_engine_is_given_up() -> None:
    admission = routed(route("m", "a"))
    admission.arrive("1", "m", 0.0)
    for attempt in range(1, MAX_ATTEMPTS):
        assert isinstance(admission.failed("1", 0.0, "died", delivered=True), Held)
        (released,) = admission.routes(table(route("m", f"new-{attempt}")), 0.0)
        assert replica(released) == f"new-{attempt}"
    assert refusal(admission.failed("1", 0.0, "died", delivered=True)).status == 502


def test_refused_connections_are_no_attempts() -> None:
    admission = routed(route("m", "a", hold_s=60.0))
    admission.arrive("1", "m", 0.0)
    now = 0.0
    for _ in range(MAX_ATTEMPTS * 3):
        assert isinstance(admission.failed("1", now, "refused", delivered=False), Held)
        now = admission.due_at()
        (released,) = admission.tick(now)
        assert replica(released) == "a"


def test_more_than_max_in_flight_wait_and_follow_in_order() -> None:
    admission = Admission(max_in_flight=2)
    admission.routes(table(route("m", "a", "b", max_queue=2)), 0.0)
    assert [replica(admission.arrive(str(i), "m", 0.0)) for i in range(4)] == list("abab")
    assert isinstance(admission.arrive("4", "m", 1.0), Held)
    assert isinstance(admission.arrive("5", "m", 1.0), Held)
    assert refusal(admission.arrive("6", "m", 1.0)).status == 429
    (next_one,) = admission.finished("1", 2.0)
    assert (next_one.request_id, replica(next_one)) == ("4", "b")
    assert admission.finished("5", 2.0) == []
    assert admission.finished("0", 2.0) == []
    admission.check_invariants()


def test_an_id_in_use_is_refused_loudly() -> None:
    admission = routed(route("m", "a"))
    admission.arrive("1", "m", 0.0)
    with pytest.raises(ValueError, match="already in use"):
        admission.arrive("1", "m", 0.0)


MODELS, REPLICAS = ("x", "y"), ("x1", "x2", "y1")


class Machine(RuleBasedStateMachine):
    """Any order of events: every admitted request ends exactly once, and nothing is miscounted."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(max_in_flight=3)
        self.now = 0.0
        self.count = 0
        self.held: dict[str, float] = {}
        self.flying: dict[str, str] = {}
        self.ended: set[str] = set()
        self.hold_s = {"x": 5.0, "y": 1000.0}
        self.routes({"x": [], "y": ["y1"]}, set(), 1000)

    def end(self, request_id: str) -> None:
        assert request_id not in self.ended, "ended twice"
        self.ended.add(request_id)
        self.held.pop(request_id, None)
        self.flying.pop(request_id, None)

    def note(self, decisions: list) -> None:
        for decision in decisions:
            assert decision.request_id in self.held, "released without having waited"
            self.apply(decision)

    def apply(self, decision: Forward | Held | Refused) -> None:
        if isinstance(decision, Refused):
            self.end(decision.request_id)
        elif isinstance(decision, Held):
            self.flying.pop(decision.request_id, None)
            self.held.setdefault(decision.request_id, self.now)
        else:
            self.held.pop(decision.request_id, None)
            self.flying[decision.request_id] = decision.endpoint.replica_id

    @rule(
        replicas=st.fixed_dictionaries(
            {}, optional={m: st.lists(st.sampled_from(REPLICAS), unique=True) for m in MODELS}
        ),
        refusing=st.sets(st.sampled_from(MODELS), max_size=1),
        max_queue=st.integers(1, 5),
    )
    def routes(self, replicas: dict, refusing: set, max_queue: int) -> None:
        self.max_queue = max_queue
        models = [
            route(
                model,
                *(r for r in chosen if r[0] == model),
                hold_s=self.hold_s[model],
                max_queue=max_queue,
                target_concurrency=max_queue,
                refusal="no" if model in refusing else None,
            )
            for model, chosen in replicas.items()
        ]
        self.note(self.admission.routes(table(*models), self.now))

    @rule(
        model=st.sampled_from((*MODELS, "unknown")),
        profile=st.builds(
            RequestProfile,
            tenant=st.sampled_from("ab"),
            priority=st.sampled_from((100, 0, BACKGROUND)),
            tokens=st.integers(1, 1000),
            affinity=st.sampled_from(((), (-1,), (1,), (1, 2), (1, 2, 3))),
            wait_s=st.sampled_from((None, 3.0)),
            weight=st.sampled_from((1.0, 3.0)),
        ),
    )
    def arrive(self, model: str, profile: RequestProfile) -> None:
        self.count += 1
        self.apply(self.admission.arrive(str(self.count), model, self.now, profile))
        self.note(self.admission.shed())

    @rule(data=st.data(), delivered=st.booleans())
    def failed(self, data: st.DataObject, delivered: bool) -> None:
        if self.flying:
            request_id = data.draw(st.sampled_from(sorted(self.flying)))
            self.apply(self.admission.failed(request_id, self.now, "died", delivered))

    @rule(data=st.data())
    def hedge(self, data: st.DataObject) -> None:
        if self.flying:
            request_id = data.draw(st.sampled_from(sorted(self.flying)))
            second = self.admission.hedge(request_id, str(self.count + 1), self.now)
            if second is not None:
                self.count += 1
                assert second.endpoint.replica_id != self.flying[request_id]
                self.apply(second)

    @rule(data=st.data())
    def finished(self, data: st.DataObject) -> None:
        here = sorted([*self.flying, *self.held])
        if here:
            request_id = data.draw(st.sampled_from(here))
            released = self.admission.finished(request_id, self.now)
            self.end(request_id)
            self.note(released)
            assert self.admission.finished(request_id, self.now) == []  # harmless

    @rule(data=st.data(), status=st.sampled_from((200, 404, 500)))
    def answered(self, data: st.DataObject, status: int) -> None:
        if self.flying:
            request_id = data.draw(st.sampled_from(sorted(self.flying)))
            self.note(self.admission.answered(request_id, self.now, status))

    @rule(step=st.sampled_from((0.0, 0.5, 2.0, 10.0)))
    def tick(self, step: float) -> None:
        self.now += step
        self.note(self.admission.tick(self.now))

    @invariant()
    def counts_are_right(self) -> None:
        self.admission.check_invariants()
        demand = self.admission.demand(self.now)
        assert sum(d.waiting for d in demand) == len(self.held)
        assert sum(d.in_flight for d in demand) == len(self.flying)
        assert sum(self.admission.in_flight().values()) == len(self.flying)

    @invariant()
    def whatever_waits_has_a_deadline(self) -> None:
        assert (self.admission.due_at() is not None) == bool(self.held)

    def teardown(self) -> None:
        """Time alone ends all that waits; then the rest finishes, and nothing is left."""
        self.now += 2000.0
        self.note(self.admission.tick(self.now))
        assert not self.held
        for request_id in sorted(self.flying):
            assert self.admission.finished(request_id, self.now) == []
            self.end(request_id)
        self.admission.check_invariants()
        assert self.ended == {str(i) for i in range(1, self.count + 1)}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40)
