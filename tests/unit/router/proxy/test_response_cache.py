"""Which requests a kept answer serves, for whom, for how long, and what makes room."""

from __future__ import annotations

import msgspec
import pytest

from runtime.router.call.body import read_head
from runtime.router.proxy.response_cache import ENTRY_BYTES, Kept, ResponseCache, Wanted, wanted
from runtime.wire.routes import CacheRule

RULE = CacheRule(ttl_s=60.0, shared=False, revision="r1")
CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"


def ask(
    path: str = CHAT,
    tenant: str = "a",
    rule: CacheRule = RULE,
    headers: dict[bytes, bytes] | None = None,
    **fields: object,
) -> Wanted | None:
    body = msgspec.json.encode({"model": "m", **fields})
    return wanted(rule, tenant, path, (headers or {}).items(), body, read_head(body))


@pytest.mark.parametrize(
    ("path", "fields", "kept"),
    [
        (CHAT, {}, False),
        (CHAT, {"temperature": 0}, True),
        (CHAT, {"temperature": 0.0}, True),
        (CHAT, {"temperature": 0.1}, False),
        (CHAT, {"temperature": 0.1, "seed": 7}, True),
        (CHAT, {"seed": None}, False),
        (CHAT, {"seed": True}, False),
        (CHAT, {"temperature": False}, True),  # equal to 0 for every engine as well
        (EMBED, {}, True),
        ("/v1/audio/transcriptions", {"temperature": 0}, False),
        ("/v1/rerank", {}, True),
    ],
)
def test_which_requests_are_repeatable(path: str, fields: dict, kept: bool) -> None:
    assert (ask(path, **fields) is not None) is kept


def test_a_key_is_one_tenants_path_revision_and_body() -> None:
    keys = [
        ask(EMBED, input="x"),
        ask(EMBED, input="y"),
        ask(EMBED, tenant="b", input="x"),
        ask("/v1/score", input="x"),
        ask(EMBED, rule=msgspec.structs.replace(RULE, revision="r2"), input="x"),
    ]
    assert len({asked.key for asked in keys}) == len(keys)
    shared = msgspec.structs.replace(RULE, shared=True)
    assert ask(EMBED, "a", shared, input="x") == ask(EMBED, "b", shared, input="x")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"no-store", None),
        (b"No-Store, max-age=9", None),
        (b"no-cache", 0.0),
        (b"max-age=9", 9.0),
        (b"max-age=900", 60.0),
        (b"private", 60.0),
    ],
)
def test_cache_control(said: bytes, expected: float | None) -> None:
    asked = ask(EMBED, headers={b"Cache-Control": said})
    assert (asked.max_age_s if asked else None) == expected


def kept(size: int = 10, at: float = 0.0) -> Kept:
    return Kept(b"application/json", b"x" * size, at, 60.0)


def test_an_answer_is_given_until_it_is_too_old() -> None:
    cache = ResponseCache(10_000)
    asked = Wanted(b"k", 60.0)
    assert cache.look("m", asked, 0.0) is None
    cache.keep(asked, kept())
    assert cache.look("m", asked, 59.0) == kept()
    assert cache.look("m", Wanted(b"k", 9.0), 10.0) is None  # max-age
    assert cache.look("m", Wanted(b"k", 0.0), 0.0) is None  # no-cache
    assert cache.look("m", asked, 60.0) is None
    assert cache.size_bytes == 0
    assert (cache.counts["m"].hits, cache.counts["m"].misses) == (1, 4)


def test_what_was_not_asked_for_longest_makes_room() -> None:
    cache = ResponseCache(3 * 1512)
    for name in (b"a", b"b", b"c"):
        cache.keep(Wanted(name, 60.0), kept(1000))
    cache.look("m", Wanted(b"a", 60.0), 0.0)
    cache.keep(Wanted(b"d", 60.0), kept(1000))
    held = [n for n in (b"a", b"b", b"c", b"d") if cache.look("m", Wanted(n, 60.0), 0.0)]
    assert held == [b"a", b"c", b"d"]
    assert (cache.evicted, cache.size_bytes) == (1, 3 * 1512)


def test_too_large_an_answer_is_not_kept_and_a_new_one_takes_the_olds_place() -> None:
    cache = ResponseCache(10 * ENTRY_BYTES)
    cache.keep(Wanted(b"k", 60.0), kept(ENTRY_BYTES + 1))
    assert cache.size_bytes == 0
    cache.keep(Wanted(b"k", 60.0), kept(100))
    cache.keep(Wanted(b"k", 60.0), kept(200))
    assert cache.size_bytes == 712
    none = ResponseCache(0)
    none.keep(Wanted(b"k", 60.0), kept(1))
    assert none.size_bytes == 0
