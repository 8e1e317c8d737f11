"""What the router reads off a request's bytes: about how many tokens, and keys of its beginning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.call.body import Head, read_head
from runtime.router.call.prompt import keys_of, taken_tokens, tokens_of
from runtime.router.call.token_meter import NOTHING, TokenUsage

CHAT = "/v1/chat/completions"


def chat(*contents: str, **fields: Any) -> bytes:
    roles = ("system", "user", "assistant")
    messages = [{"role": roles[i % 3], "content": text} for i, text in enumerate(contents)]
    return json.dumps({"model": "m", "messages": messages} | fields).encode()


def keys(
    body: bytes, path: str = CHAT, headers: Any = (), model: str = "m", tenant: str = "t"
) -> tuple[int, ...]:
    return keys_of(path, headers, body, read_head(body), model, tenant)


@pytest.mark.parametrize(
    ("size", "head", "tokens"),
    [
        (2000, Head(max_tokens=100), 600),
        (2000, Head(), 756),
        (2000, Head(max_tokens=100, max_completion_tokens=10), 510),
        (2000, Head(max_tokens="100"), 756),  # type: ignore[arg-type]
        (2000, Head(max_tokens=-1), 756),
        (2000, Head(max_tokens=True), 756),
        (2000, Head(max_tokens=10**9), 756),
        (2000, Head(max_tokens=1e3), 756),  # type: ignore[arg-type]
        (2, Head(max_tokens=0), 1),
    ],
)
def test_tokens(size: int, head: Head, tokens: int) -> None:
    assert tokens_of(b"x" * size, head) == tokens


@pytest.mark.parametrize(
    ("usage", "answered", "worked_s", "tokens"),
    [
        (TokenUsage(7, 3, True, False), True, 0.0, 10),
        (TokenUsage(None, 3, False, True), True, 0.0, 503),
        (NOTHING, True, 0.0, 756),
        (NOTHING, False, 2.0, 600),
        (NOTHING, False, 0.001, 500),
        (NOTHING, False, 3600.0, 756),
        (NOTHING, False, 0.0, 0),
    ],
)
def test_who_hangs_up_before_the_answer_pays_for_the_engines_work(
    usage: TokenUsage, answered: bool, worked_s: float, tokens: int
) -> None:
    """And nobody for a failure, which is no work of an engine for its caller."""
    body = b"x" * 2000
    assert taken_tokens(body, 756, usage, answered=answered, worked_s=worked_s) == tokens


@given(size=st.integers(0, 2**24), limit=st.none() | st.booleans() | st.integers() | st.text())
def test_tokens_are_at_least_one_and_never_absurd(size: int, limit: Any) -> None:
    assert 1 <= tokens_of(b"x" * size, Head(max_tokens=limit)) <= size // 4 + 1_000_000


def test_a_later_turn_has_the_keys_of_the_earlier_and_more() -> None:
    first = keys(chat("be brief", "x" * 3000))
    second = keys(chat("be brief", "x" * 3000, "y" * 3000, "z"))
    assert len(first) == 2  # of 1 and 2 KiB
    assert second[:2] == first
    assert len(second) == 3


def test_what_differs_changes_only_the_keys_after_it() -> None:
    one, other = (keys(chat("s" * 3000, mark * 9000)) for mark in "ab")
    assert len(one) == len(other) == 4
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert one[3] != other[3]


def test_fields_around_the_prompt_do_not_matter_nor_does_their_order() -> None:
    late = json.loads(chat("x" * 5000))
    early = {"messages": late["messages"], "temperature": 0.5, "max_tokens": 9, "model": "m"}
    assert keys(json.dumps(late).encode()) == keys(json.dumps(early).encode()) != ()


def test_a_prompt_that_quotes_a_body_is_one_prompt() -> None:
    quoted = [{"model": "m", "user_text": chat("inner").decode(), "messages": ["x" * 2000]}]
    (body,) = (json.dumps(fields).encode() for fields in quoted)
    plain = json.dumps({"model": "m", "messages": ["x" * 2000]}).encode()
    assert keys(body) == keys(plain) != ()


def test_keys_stop_at_128_kib() -> None:
    assert len(keys(chat("x" * 130_000))) == 7
    assert len(keys(chat("x" * 140_000))) == 8
    assert len(keys(chat("x" * 900_000))) == 8


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("short")),
        (CHAT, json.dumps({"model": "m", "prompt": "x" * 5000}).encode()),
        ("/v1/embeddings", json.dumps({"model": "m", "input": "x" * 5000}).encode()),
        ("/v1/embeddings", json.dumps({"model": "m", "user": "u", "input": "x"}).encode()),
        ("/v1/audio/transcriptions", chat("x" * 5000)),
    ],
)
def test_no_keys(path: str, body: bytes) -> None:
    assert keys(body, path) == ()


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/completions", "prompt"), ("/v1/responses", "input"), ("/v1/messages", "messages")],
)
def test_where_a_prompt_begins_depends_on_the_path(path: str, field: str) -> None:
    body = json.dumps({"model": "m", "user": 5, field: "x" * 5000}).encode()
    assert len(keys(body, path)) == 3


def test_the_header_wins_over_the_cache_key_that_wins_over_the_user() -> None:
    session = [(b"Accept", b"*/*"), (b"X-Session-ID", b"s1")]
    bodies = [chat("x" * 2000), chat("y", user="u"), chat("z", prompt_cache_key="k", user="u")]
    (by_header,) = {keys(body, headers=session) for body in bodies}
    user = keys(chat("other", user="u"))
    cache = keys(chat("other", prompt_cache_key="k"))
    assert keys(bodies[1]) == user
    assert keys(bodies[2]) == cache
    assert all(len(made) == 1 and made[0] < 0 for made in (by_header, user, cache))
    assert len({by_header, user, cache}) == 3


def test_hints_of_the_wrong_type_and_empty_ones_are_none() -> None:
    plain = keys(chat("x" * 1500))
    for user in (5, None, ["u"], ""):
        assert keys(chat("x" * 1500, user=user)) == plain
    assert keys(chat("x" * 1500), headers=[(b"x-session-id", b"")]) == plain


def test_sessions_are_of_one_tenant_and_all_keys_of_one_model() -> None:
    named, unnamed = chat("x", user="u"), chat("x" * 2000)
    assert keys(named, tenant="t") != keys(named, tenant="other")
    assert keys(unnamed, tenant="t") == keys(unnamed, tenant="other")
    assert keys(named, model="m") != keys(named, model="n")
    assert keys(unnamed, model="m") != keys(unnamed, model="n")


def test_text_that_is_no_utf8_text_is_a_session_too() -> None:
    body = b'{"model": "m", "messages": [], "user": "\\ud800"}'
    assert len(keys_of(CHAT, (), body, Head(user="\ud800"), "m", "t")) == 1


@pytest.mark.parametrize(
    "url",
    [b'{"url":"data:image/png;base64,%b"}', b'{"data":"%b","format":"wav"}', b'{"data": "%b"}'],
)
def test_media_are_no_text(url: bytes) -> None:
    """A picture of 600 kB is some 1,500 tokens, not 200,000."""
    media = b"QUJD" * 200_000
    assert 1500 <= tokens_of(b'{"messages":[%b]}' % (url % media), Head(max_tokens=0)) < 1600
    two = b",".join([url % media] * 2)
    assert 3000 <= tokens_of(b"[%b]" % two, Head(max_tokens=0)) < 3100


def test_a_forms_file_is_no_text() -> None:
    assert tokens_of(b"--b\r\n" + bytes(2**20), Head(max_tokens=0)) == 1500


def test_text_that_looks_like_media_is_text() -> None:
    text = b'{"prompt":";base64, ' + b"word " * 4000 + b'"}'
    assert tokens_of(b'"x";base64,"' + text, Head(max_tokens=0)) > 1000
