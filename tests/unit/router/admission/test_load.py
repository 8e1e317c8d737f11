"""Where admission sends a request: outstanding tokens first, and the prompt's beginning."""

from __future__ import annotations

from runtime.router.admission.decisions import SUSPECT_S, Admission, Forward, Held
from runtime.router.admission.fairness import RequestProfile
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable


def routed(*replicas: str, max_in_flight: int | None = None) -> Admission:
    admission = Admission(max_in_flight)
    admission.routes(table(*replicas), 0.0)
    return admission


def table(*replicas: str, version: int = 1) -> RouteTable:
    endpoints = tuple(Endpoint(replica_id=r, base_url=f"http://{r}", key="k") for r in replicas)
    return RouteTable(version=version, models=(ModelRoute(name="m", endpoints=endpoints),))


def forward(decision: object) -> Forward:
    assert isinstance(decision, Forward), decision
    return decision


def send(admission: Admission, request_id: str, now: float = 0.0, **profile: object) -> str:
    decision = admission.arrive(request_id, "m", now, RequestProfile(**profile))  # type: ignore[arg-type]
    assert isinstance(decision, Forward), decision
    admission.check_invariants()
    return decision.endpoint.replica_id


def test_fewest_outstanding_tokens_win_over_fewest_requests() -> None:
    admission = routed("a", "b")
    assert send(admission, "0", tokens=5000) == "a"
    assert [send(admission, str(i), tokens=100) for i in range(1, 6)] == ["b"] * 5
    assert admission.in_flight() == {"a": 1, "b": 5}
    admission.finished("0", 1.0)
    assert send(admission, "6", tokens=100) == "a"


def test_equal_tokens_go_to_the_fewest_requests_then_round() -> None:
    admission = routed("a", "b", "c")
    assert send(admission, "0", tokens=200) == "a"
    assert send(admission, "1", tokens=100) == "b"
    assert send(admission, "2", tokens=200) == "c"
    assert send(admission, "3", tokens=100) == "b"
    assert [send(admission, str(i), tokens=200) for i in (4, 5)] == ["c", "a"]


def test_limits_count_requests_not_tokens() -> None:
    admission = routed("a", "b", max_in_flight=1)
    assert send(admission, "0", tokens=1) == "a"
    assert send(admission, "1", tokens=10_000) == "b"
    assert isinstance(admission.arrive("2", "m", 0.0, RequestProfile(tokens=1)), Held)
    released = forward(*admission.finished("1", 1.0))
    assert (released.request_id, released.endpoint.replica_id) == ("2", "b")
    admission.check_invariants()


def test_tokens_of_a_failed_request_leave_with_it() -> None:
    admission = routed("a", "b")
    assert send(admission, "0", tokens=5000) == "a"
    again = forward(admission.failed("0", 1.0, "died", delivered=True))
    assert again.endpoint.replica_id == "b"
    admission.check_invariants()
    assert send(admission, "1", now=1.0 + SUSPECT_S, tokens=1) == "a"


def test_a_session_stays_although_others_are_emptier() -> None:
    admission = routed("a", "b", "c")
    first = send(admission, "0", tokens=100, affinity=(-7,))
    others = [send(admission, f"x{i}", tokens=300) for i in range(2)]
    assert first not in others
    admission.finished("x1", 1.0)
    assert send(admission, "1", tokens=100, affinity=(-7,)) == first
    assert send(admission, "2", tokens=100) == others[1]


def test_a_session_leaves_a_replica_that_has_too_much_to_do() -> None:
    admission = routed("a", "b", "c", "d")
    first = send(admission, "0", tokens=1000, affinity=(-7,))
    other = send(admission, "1", tokens=100, affinity=(-7,))
    assert other != first
    admission.finished("0", 1.0)
    admission.finished("1", 1.0)
    assert send(admission, "2", now=1.0, tokens=100, affinity=(-7,)) == other


def test_a_session_leaves_a_failed_replica_a_full_one_and_one_that_is_gone() -> None:
    admission = routed("a", "b")
    first = send(admission, "0", tokens=10, affinity=(-7,))
    other = {"a": "b", "b": "a"}[first]
    again = forward(admission.failed("0", 1.0, "died", delivered=True))
    assert again.endpoint.replica_id == other
    admission.finished("0", 1.0)
    assert send(admission, "1", now=1.0, tokens=10, affinity=(-7,)) == other
    admission.routes(table(first, "new", version=2), 1.0 + SUSPECT_S)
    assert send(admission, "2", now=1.0 + SUSPECT_S, tokens=10, affinity=(-7,)) in {first, "new"}

    full = routed("a", "b", max_in_flight=1)
    taken = {send(full, str(i), tokens=10, affinity=(-7,)) for i in range(2)}
    assert taken == {"a", "b"}


def test_where_all_rest_the_keys_do_not_matter() -> None:
    admission = routed("a", "b")
    for request_id in ("0", "1"):
        send(admission, request_id, tokens=10, affinity=(1,))
        admission.failed(request_id, 0.0, "refused", delivered=False)
        admission.finished(request_id, 0.0)
    assert isinstance(admission.arrive("2", "m", 0.5, RequestProfile(affinity=(1,))), Held)
    admission.check_invariants()


def test_a_held_request_goes_by_its_own_keys() -> None:
    admission = routed("a", "b")
    places = {}
    for key in range(-6, 0):
        places[key] = send(admission, str(key), tokens=10, affinity=(key,))
        admission.finished(str(key), 0.0)
    assert set(places.values()) == {"a", "b"}
    for version, key in enumerate(places, 1):
        admission.routes(table(version=2 * version), 1.0)
        assert isinstance(
            admission.arrive("h", "m", 1.0, RequestProfile(tokens=10, affinity=(key,))), Held
        )
        released = forward(*admission.routes(table("a", "b", version=2 * version + 1), 1.0))
        assert released.endpoint.replica_id == places[key]
        admission.finished("h", 1.0)
