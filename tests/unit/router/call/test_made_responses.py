"""Which replica keeps which response, and for whom."""

from __future__ import annotations

import pytest

from runtime.router.call.body import Head
from runtime.router.call.errors import CallError
from runtime.router.call.made_responses import Made, MadeResponses, id_in


def made(tenant: str, replica_id: str = "r1") -> Made:
    return Made(tenant, "m", "m", replica_id)


def test_a_response_is_its_tenants_alone() -> None:
    stored = MadeResponses()
    stored.keep("resp_1", made("a"))
    assert stored.find("a", "resp_1") == made("a")
    assert stored.find("b", "resp_1") is None
    stored.keep("resp_1", made("b", "r2"))  # an id that its caller chose
    assert stored.find("a", "resp_1") == made("a")
    assert stored.find("b", "resp_1") is None
    stored.keep("resp_1", made("a", "r2"))
    assert stored.find("a", "resp_1") == made("a", "r2")


def test_an_engine_is_not_asked_to_go_on_with_another_tenants() -> None:
    stored = MadeResponses()
    stored.keep("resp_1", made("a"))
    after, named = Head(previous_response_id="resp_1"), Head(request_id="resp_1")
    for head in (after, named, Head(request_id="resp_2"), Head()):
        stored.check(head, "a", keyed=True)
    with pytest.raises(CallError, match="no response 'resp_1'") as error:
        stored.check(after, "b", keyed=True)
    assert (error.value.status, error.value.param) == (404, "previous_response_id")
    with pytest.raises(CallError, match="'resp_1' is taken") as error:
        stored.check(named, "b", keyed=True)
    assert (error.value.status, error.value.param) == (400, "request_id")
    unknown = Head(previous_response_id="resp_0")
    stored.check(unknown, "", keyed=False)
    with pytest.raises(CallError, match="no response 'resp_0'"):
        stored.check(unknown, "a", keyed=True)


def test_a_tenant_with_many_pushes_out_its_own() -> None:
    stored = MadeResponses(most=8, most_of_tenant=6)
    stored.keep("small", made("small"))
    for n in range(20):
        stored.keep(f"big_{n}", made("big"))
    assert stored.find("big", "big_13") is None
    assert stored.find("big", "big_14") is not None
    for n in range(20):
        stored.keep(f"third_{n}", made("third"))
        assert len(stored) <= 8
    assert stored.find("small", "small") is not None


def test_what_was_asked_for_stays_longer() -> None:
    stored = MadeResponses(most_of_tenant=2)
    stored.keep("one", made("a"))
    stored.keep("two", made("a"))
    assert stored.find("a", "one")
    stored.keep("three", made("a"))
    assert stored.find("a", "one")
    assert stored.find("a", "two") is None


@pytest.mark.parametrize(
    ("beginning", "found"),
    [
        (b'{"id":"resp_1","created_at":1', "resp_1"),
        (b'event: response.created\ndata: {"response":{"id":"resp_2","x":{"id":"no"}}}', "resp_2"),
        (b'{"id": "resp_3"}', "resp_3"),
        (b'{"id":"../x"}', None),
        (b'{"id":"' + b"x" * 200 + b'"}', None),
        (b" " * 2000 + b'{"id":"resp_1"}', None),
        (b"", None),
    ],
)
def test_the_id_is_the_first_of_an_answer(beginning: bytes, found: str | None) -> None:
    assert id_in(beginning) == found
