"""API keys: who is let in, what a key reaches, and what routers tell each other of its use."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from runtime.contract.access import (
    KEY_PREFIX,
    KeySpec,
    KeyTable,
    Limits,
    PeerUsage,
    RouterUsage,
    Scope,
    StoredKey,
    Tenant,
    UsageReport,
    Used,
    digest,
    opens,
    token_id,
)
from runtime.router.call.errors import CallError
from runtime.router.call.request import ANONYMOUS
from runtime.router.callers.keys import Keys, given_token, may, rate_headers, sees
from scheduler.usage import LIVE_S, BootUsage, Usage

TOKEN = KEY_PREFIX + "aaaaaaaaaa-" + "s" * 43
OTHER = KEY_PREFIX + "bbbbbbbbbb-" + "t" * 43


def stored(token: str = TOKEN, **fields: Any) -> StoredKey:
    spec = KeySpec(**({"tenant": "acme"} | fields))
    return StoredKey(
        key_id=token_id(token, KEY_PREFIX), digest=digest(token), spec=spec, created_at=0.0
    )


def keys(*listed: StoredKey, anonymous: bool = False, tenants: tuple[Tenant, ...] = ()) -> Keys:
    made = Keys(anonymous)
    made.load(KeyTable(version=1, keys=listed, tenants=tenants), 0.0)
    return made


def refusal(ring: Keys, token: str, wall_s: float = 0.0) -> tuple[int, str]:
    with pytest.raises(CallError) as caught:
        ring.identify(token, wall_s)
    assert token == "" or token not in caught.value.body().decode()
    return caught.value.status, caught.value.message


def test_the_right_secret_opens_and_nothing_else_does() -> None:
    ring = keys(stored())
    caller = ring.identify(TOKEN, 0.0)
    assert (caller.tenant, caller.key_id, caller.priority) == ("acme", "aaaaaaaaaa", 0)
    for wrong in (TOKEN[:-1], TOKEN + "s", TOKEN[:-1] + "x", OTHER, digest(TOKEN)):
        assert refusal(ring, wrong)[0] == 401
    assert refusal(ring, "")[0] == 401
    # A wrong secret and an id that never was read the same.
    assert refusal(ring, TOKEN[:-1] + "x") == refusal(ring, OTHER)


def test_a_revoked_key_opens_nothing_more() -> None:
    ring = keys(stored())
    ring.identify(TOKEN, 0.0)
    ring.load(KeyTable(version=2), 0.0)
    assert refusal(ring, TOKEN)[0] == 401


def test_an_expired_key_says_so() -> None:
    ring = keys(stored(expires_at=100.0))
    ring.identify(TOKEN, 99.9)
    assert refusal(ring, TOKEN, 100.0) == (401, "the API key has expired")


def test_after_a_rotation_both_secrets_open_until_the_grace_ends() -> None:
    rotated = TOKEN[:-1] + "z"
    key = msgspec.structs.replace(
        stored(), digest=digest(rotated), old_digest=digest(TOKEN), old_until=50.0
    )
    assert opens(rotated, key, 0.0)
    assert opens(rotated, key, 60.0)
    assert opens(TOKEN, key, 49.0)
    assert not opens(TOKEN, key, 50.0)


def test_anonymous_callers_where_they_are_let_in() -> None:
    ring = Keys(anonymous=True)
    assert ring.identify("", 0.0) is ANONYMOUS
    assert ring.identify("unused", 0.0) is ANONYMOUS  # what OpenAI's clients are given
    ring.load(KeyTable(version=1, keys=(stored(),)), 0.0)
    assert ring.identify(TOKEN, 0.0).tenant == "acme"
    assert refusal(ring, OTHER)[0] == 401  # meant as a key of ours: not quietly anonymous


def test_without_a_table_nobody_is_let_in() -> None:
    assert refusal(Keys(anonymous=False), TOKEN)[0] == 503


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (b"Bearer abc", "abc"),
        (b"bearer  abc ", "abc"),
        (b"abc", "abc"),
        (b"", ""),
        (b"Basic dXNlcg==", "Basic"),
        (b"Bearer " + b"x" * 600, ""),
    ],
)
def test_the_token_of_a_header(header: bytes, token: str) -> None:
    assert given_token(header) == token


def test_scopes_of_key_and_tenant_both_count() -> None:
    tenant = Tenant(name="acme", scope=Scope(models=("llama-*", "bge")))
    ring = keys(
        stored(scope=Scope(models=("*-8b", "bge"), endpoints=("/v1/chat/*", "/v1/embeddings"))),
        tenants=(tenant,),
    )
    caller = ring.identify(TOKEN, 0.0)
    chat = "/v1/chat/completions"
    assert may(caller, ("llama-8b",), "llama-8b", chat)
    assert may(caller, ("llama-8b",), "meta/alias", chat)  # by the model's own name
    assert not may(caller, ("llama-70b",), "llama-70b", chat)
    assert not may(caller, ("qwen-8b",), "qwen-8b", chat)
    assert not may(caller, ("llama-8b",), "llama-8b", "/v1/completions")
    assert may(caller, ("bge",), "bge", "/v1/embeddings")
    assert sees(caller, ("bge",))
    assert not sees(caller, ("qwen-8b",))


def test_an_alias_that_is_new_is_not_what_it_was_when_nobody_had_it() -> None:
    caller = keys(stored(scope=Scope(models=("llama-*",)))).identify(TOKEN, 0.0)
    assert not may(caller, (), "fast", "/v1/completions")
    assert may(caller, ("llama-8b",), "fast", "/v1/completions")
    assert not may(caller, ("qwen",), "fast", "/v1/completions")


def test_priority_and_weight_come_from_the_tenant_unless_the_key_says() -> None:
    tenant = Tenant(name="acme", priority="low", weight=3.0)
    ring = keys(stored(), stored(OTHER, priority="high"), tenants=(tenant,))
    assert (ring.identify(TOKEN, 0.0).priority, ring.identify(TOKEN, 0.0).weight) == (-100, 3.0)
    assert ring.identify(OTHER, 0.0).priority == 100


def test_a_tenants_limit_holds_for_all_its_keys_together() -> None:
    tenant = Tenant(name="acme", limits=Limits(requests_per_min=2))
    ring = keys(stored(), stored(OTHER), tenants=(tenant,))
    one, two = ring.identify(TOKEN, 0.0), ring.identify(OTHER, 0.0)
    ring.begin(one, 1, 0.0)
    ring.begin(two, 1, 0.0)
    with pytest.raises(CallError) as caught:
        ring.begin(one, 1, 0.0)
    assert caught.value.status == 429
    assert "tenant acme" in caught.value.message
    headers = caught.value.headers()
    assert headers["Retry-After"] == "30"
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert dict(rate_headers(two, 30.0))[b"x-ratelimit-remaining-requests"] == b"1"


def test_a_new_table_does_not_forget_what_was_used() -> None:
    key = stored(limits=Limits(requests_per_min=1))
    ring = keys(key)
    ring.begin(ring.identify(TOKEN, 0.0), 1, 0.0)
    ring.load(KeyTable(version=2, keys=(key, stored(OTHER))), 0.0)
    with pytest.raises(CallError):
        ring.begin(ring.identify(TOKEN, 0.0), 1, 0.0)


def test_two_routers_hold_a_key_to_one_limit() -> None:
    key = stored(limits=Limits(requests_per_min=10, tokens_per_day=1000))
    rings, day = [keys(key), keys(key)], "2026-11-25"
    usage = Usage(day)

    def exchange(now: float) -> None:
        for index, ring in enumerate(rings):
            ring.day(day, 1000.0, now)
            told = RouterUsage(router_id=f"r{index}", boot_id=1, usage=ring.report(False))
            ring.hear(usage.tell(told, now), now)

    exchange(0.0)
    for ring in rings:
        for _ in range(5):
            caller = ring.identify(TOKEN, 0.0)
            ring.begin(caller, 10, 0.0)
            ring.end(caller, 10, 10, 0.5)
    exchange(0.0)
    exchange(0.0)  # told twice, it counts once
    for ring in rings:
        with pytest.raises(CallError) as caught:
            ring.begin(ring.identify(TOKEN, 0.0), 10, 0.0)
        assert caught.value.code == "rate_limit_exceeded"
    assert usage.totals(0.0)["key:aaaaaaaaaa"] == Used(10, 100, 5000, 0)


def test_a_routers_restart_gives_no_fresh_quota() -> None:
    key = stored(limits=Limits(tokens_per_day=100))
    day, usage = "2026-11-25", Usage("2026-11-25")
    before = keys(key)
    before.day(day, 1000.0, 0.0)
    caller = before.identify(TOKEN, 0.0)
    before.begin(caller, 1, 0.0)
    before.end(caller, 1, 100, 0.0)
    usage.tell(RouterUsage(router_id="r", boot_id=1, usage=before.report(True)), 0.0)
    # ... and the scheduler's own restart does not either: it is stored.
    usage = Usage(day, [usage.boot(boot) for boot in usage.unsaved])
    after = keys(key)
    after.day(day, 1000.0, 10.0)
    after.hear(
        usage.tell(RouterUsage(router_id="r", boot_id=2, usage=after.report(True)), 10.0), 10.0
    )
    with pytest.raises(CallError) as caught:
        after.begin(after.identify(TOKEN, 0.0), 1, 10.0)
    assert caught.value.code == "quota_exceeded"


def test_requests_in_flight_at_a_router_that_is_gone_do_not_count() -> None:
    usage = Usage("2026-11-25")
    told = UsageReport(day="2026-11-25", accounts={"key:k": Used(3, 0, 0, 3)})
    usage.tell(RouterUsage(router_id="r", boot_id=1, usage=told), 0.0)
    assert usage.totals(LIVE_S - 0.1)["key:k"].in_flight == 3
    assert usage.totals(LIVE_S + 0.1)["key:k"] == Used(3, 0, 0, 0)


def test_a_report_of_another_day_changes_nothing() -> None:
    usage = Usage("2026-11-25", [BootUsage(router_id="r", boot_id=1, accounts={"key:k": Used(1)})])
    told = UsageReport(day="2026-11-24", accounts={"key:k": Used(9)})
    usage.tell(RouterUsage(router_id="r", boot_id=1, usage=told), 0.0)
    assert usage.totals(0.0) == {"key:k": Used(1)}
    ring = keys(stored(limits=Limits(tokens_per_day=1)))
    ring.day("2026-11-26", 100.0, 0.0)
    ring.hear(PeerUsage(day="2026-11-25", accounts={"key:aaaaaaaaaa": Used(tokens=5)}), 0.0)
    ring.begin(ring.identify(TOKEN, 0.0), 1, 0.0)


def test_what_is_not_an_api_key_is_told_from_none() -> None:
    keys = Keys(anonymous=False)
    keys.load(KeyTable(version=1, keys=()), 0.0)
    for token, said in (("", "send an API key"), ("foo", "what was sent is not an API key; send")):
        with pytest.raises(CallError) as caught:
            keys.identify(token, 0.0)
        assert caught.value.message.startswith(said)
