"""Routes in a real router: who is asked, what is sent on, who stands in, what the mirror sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from runtime.contract.access import KEY_PREFIX, KeySpec, Limits, Scope, StoredKey, digest
from runtime.router.control import saved_tables
from runtime.router.proxy.route_serving import MIRRORS_AT_ONCE
from runtime.wire.routes import CacheRule, Mirror, RouteRule, RouteTable, RouteTarget
from tests.kits import router_stack as kit
from tests.kits.router_stack import Engine, Stack, eventually, never, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


def rule(*models: str, **fields: Any) -> RouteRule:
    targets = tuple(RouteTarget(model=model) for model in models)
    return RouteRule(name="r", targets=targets, **fields)


async def publish(stack: Stack, made: RouteRule, **engines: Engine | None) -> None:
    """Models served by these engines (None: it can't be served) and one route."""
    models = [
        kit.model(name, engine) if engine else kit.model(name, refusal="no node can run it")
        for name, engine in engines.items()
    ]
    await stack.scheduler.publish(*models, rules=(made,))
    await stack.scheduler.in_force()


async def ask(stack: Stack, path: str = CHAT, **fields: Any) -> tuple[int, str | None, bytes]:
    """Status, who answered, and the body."""
    async with stack.post(path, {"model": "r", **fields}) as response:
        return response.status, response.headers.get("X-Stoker-Model"), await response.read()


# ------------------------------------------------------------------------------ targets


async def test_the_target_gets_its_own_name_and_the_caller_is_told_it(stack: Stack) -> None:
    engine = await stack.engine(unary(b'{"a":1}'))
    await publish(stack, rule("m1"), m1=engine)
    sent = b'{ "model":"r", "n":1.00, "text":"\\u00e9" }'
    async with stack.post(CHAT + "?x=1", sent) as response:
        assert (response.status, await response.read()) == (200, b'{"a":1}')
        assert response.headers.getall("X-Stoker-Model") == ["m1"]
    (received,) = engine.received
    assert received.target == CHAT + "?x=1"
    assert received.body == b'{"model":"m1","n":1.00,"text":"\\u00e9"}'


async def test_a_model_asked_for_by_its_own_name_meets_no_route(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await publish(stack, rule("m1"), m1=engine)
    body = b'{ "model": "m1" }'
    async with stack.post(CHAT, body) as response:
        assert "X-Stoker-Model" not in response.headers
    assert engine.received[0].body == body
    assert stack.scheduler.reports[-1].targets == ()


async def test_every_way_in_knows_routes(stack: Stack) -> None:
    engine = await stack.engine(unary())
    targets = (RouteTarget(model="m1", version="1.2.3"),)
    await publish(stack, RouteRule(name="r", targets=targets), m1=engine)
    for path in (
        "/invoke/r",
        "/models/r/v1/completions",
        "/invoke/r@1",
        "/models/r@1.2.3/v1/score",
    ):
        status, who, _ = await ask(stack, path, prompt="hi")
        assert (path, status, who) == (path, 200, "m1")
    assert {r.json()["model"] for r in engine.received} == {"m1"}
    form = aiohttp.FormData({"model": "r", "language": "en"}, default_to_multipart=True)
    form.add_field("audio", b"\r\n\x00sound", filename="a.wav")
    async with stack.session.post(stack.url + "/v1/audio/transcriptions", data=form) as response:
        assert (response.status, response.headers["X-Stoker-Model"]) == (200, "m1")
    assert b'name="model"\r\n\r\nm1\r\n' in engine.received[-1].body
    assert b"\r\n\x00sound\r\n" in engine.received[-1].body


async def test_routes_are_listed_as_models(stack: Stack) -> None:
    engine = await stack.engine(unary())
    targets = (RouteTarget(model="m1", version="1.2.3"),)
    await publish(stack, RouteRule(name="r", targets=targets), m1=engine)
    for path in ("/v1/models/r", "/v1/models/r@1", "/models/r/v1/models/r"):
        async with stack.session.get(stack.url + path) as response:
            shown = await response.json()
            assert shown["id"] == path.rpartition("/")[2]
            assert shown["aliases"] == ["r@1", "r@1.2", "r@1.2.3"]
    async with stack.session.get(stack.url + "/v1/models") as response:
        listed = [m["id"] for m in (await response.json())["data"]]
        assert listed == ["m1", "r", "r@1", "r@1.2", "r@1.2.3"]
    async with stack.session.get(stack.url + "/v1/models/rr") as response:
        assert response.status == 404
        assert "did you mean 'r'" in (await response.json())["error"]["message"]


async def test_sticky_callers_meet_the_same_target(stack: Stack) -> None:
    engines = {name: await stack.engine(unary()) for name in ("m1", "m2")}
    await publish(stack, rule("m1", "m2", sticky="user"), **engines)
    users = [f"u{n}" for n in range(12)]
    first = [(await ask(stack, user=user))[1] for user in users]
    assert set(first) == {"m1", "m2"}
    assert [(await ask(stack, user=user))[1] for user in users] == first
    await publish(stack, rule("m1", "m2", sticky="header:X-Session"), **engines)
    seen = set()
    for _ in range(8):
        async with stack.post(CHAT, {"model": "r"}, headers={"x-session": "s1"}) as response:
            seen.add(response.headers["X-Stoker-Model"])
    assert len(seen) == 1


async def test_the_scheduler_is_told_what_became_of_each_targets_requests(stack: Stack) -> None:
    good = await stack.engine(unary())
    bad = await stack.engine(unary(b"{}", "500 Oh"))
    await publish(stack, rule("m1"), m1=good, m2=bad)
    await ask(stack)
    await publish(stack, rule("m2"), m1=good, m2=bad)
    assert (await ask(stack))[:2] == (500, "m2")

    def told() -> dict[str, tuple[int, int, int]]:
        parts = stack.scheduler.reports[-1].targets
        return {p.model: (p.requests, p.errors, p.first_bytes) for p in parts}

    await eventually(lambda: told() == {"m1": (1, 0, 1), "m2": (1, 1, 1)}, "both were reported")
    metrics = await stack.metrics()
    assert 'stoker_router_route_errors_total{model="m2",route="r"} 1.0' in metrics


# ------------------------------------------------------------------------------ fallback


async def test_a_target_that_cant_be_served_is_replaced(stack: Stack) -> None:
    engine = await stack.engine(unary(b'{"from":"m3"}'))
    made = rule("m1", fallback=("gone", "m2", "m3"))
    await publish(stack, made, m1=None, m2=None, m3=engine)
    assert await ask(stack) == (200, "m3", b'{"from":"m3"}')


async def test_a_target_whose_engine_is_dead_is_replaced(stack: Stack) -> None:
    async def dies(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    dead, live = await stack.engine(dies), await stack.engine(unary())
    other = await stack.engine(dies)
    models = (kit.model("m1", dead, other), kit.model("m2", live))
    await stack.scheduler.publish(*models, rules=(rule("m1", fallback=("m2",)),))
    await stack.scheduler.in_force()
    assert (await ask(stack))[:2] == (200, "m2")


async def test_a_stream_that_waited_in_vain_is_replaced_though_it_was_told_why(
    stack: Stack,
) -> None:
    live = await stack.engine(sse(b"data: 1\n\n", b"data: [DONE]\n\n"))
    models = (kit.model("m1", hold_s=0.3), kit.model("m2", live))
    await stack.scheduler.publish(*models, rules=(rule("m1", fallback=("m2",)),))
    await stack.scheduler.in_force()
    status, _, body = await ask(stack, stream=True)
    assert status == 200
    assert body.startswith(b": waiting for m1")
    assert body.endswith(b"data: 1\n\ndata: [DONE]\n\n")
    assert b"error" not in body


async def test_if_none_can_be_had_the_first_ones_error_is_told(stack: Stack) -> None:
    await publish(stack, rule("m1", fallback=("gone",)), m1=None)
    status, _, body = await ask(stack)
    assert (status, json.loads(body)["error"]["code"]) == (503, "model_unavailable")
    assert "'m1'" in json.loads(body)["error"]["message"]
    models = (kit.model("m1", hold_s=0.2), kit.model("m2", hold_s=0.2))
    await stack.scheduler.publish(*models, rules=(rule("m1", fallback=("m2",)),))
    await stack.scheduler.in_force()
    _, _, body = await ask(stack, stream=True)
    events = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert "'m1' was not ready within" in json.loads(events[0][6:])["error"]["message"]
    assert events[1] == "data: [DONE]"


async def test_what_the_engine_itself_answers_is_nobody_elses(stack: Stack) -> None:
    bad, live = await stack.engine(unary(b"{}", "400 No")), await stack.engine(unary())
    await publish(stack, rule("m1", fallback=("m2",)), m1=bad, m2=live)
    assert (await ask(stack))[:2] == (400, "m1")
    assert live.received == []


async def test_a_version_asked_for_by_number_has_no_stand_in(stack: Stack) -> None:
    live = await stack.engine(unary())
    targets = (RouteTarget(model="m1", version="1.0.0"),)
    made = RouteRule(name="r", targets=targets, fallback=("m2",))
    await publish(stack, made, m1=None, m2=live)
    assert (await ask(stack, model="r@1"))[0] == 503
    assert (await ask(stack))[:2] == (200, "m2")


# ------------------------------------------------------------------------------ kept answers


async def test_each_targets_answers_are_kept_apart(stack: Stack) -> None:
    kept = {"cache": CacheRule(ttl_s=60.0, shared=True, revision="1")}
    engines = {name: await stack.engine(unary(name.encode())) for name in ("m1", "m2")}
    models = [kit.model(name, engine, **kept) for name, engine in engines.items()]
    for name in ("m1", "m2", "m1", "m2"):
        await stack.scheduler.publish(*models, rules=(rule(name),))
        await stack.scheduler.in_force()
        assert await ask(stack, temperature=0) == (200, name, name.encode())
    assert [len(engine.received) for engine in engines.values()] == [1, 1]


async def test_a_stream_that_was_told_to_wait_is_not_answered_from_what_is_kept(
    stack: Stack,
) -> None:
    kept = {"cache": CacheRule(ttl_s=60.0, shared=True, revision="1")}
    live = await stack.engine(sse(b"data: 1\n\n", b"data: [DONE]\n\n"))
    models = (kit.model("m1", hold_s=0.3), kit.model("m2", live, **kept))
    await stack.scheduler.publish(*models, rules=(rule("m1", fallback=("m2",)),))
    await stack.scheduler.in_force()
    for _ in range(2):  # the headers have gone out with the comments: they can't go out again
        status, _, body = await ask(stack, stream=True, temperature=0)
        assert (status, body.count(b"HTTP/1.1"), body.count(b"data: 1\n\n")) == (200, 0, 1)
        assert body.startswith(b": waiting for m1")


# ------------------------------------------------------------------------------ mirror


async def test_the_mirror_gets_a_copy_and_its_answer_is_thrown_away(stack: Stack) -> None:
    live, shadow = await stack.engine(unary(b'{"from":"m1"}')), await stack.engine(unary())
    await publish(stack, rule("m1", mirror=Mirror(model="m2")), m1=live, m2=shadow)
    assert await ask(stack, n=7) == (200, "m1", b'{"from":"m1"}')
    await eventually(lambda: shadow.received, "the copy came")
    assert shadow.received[0].json() == {"model": "m2", "n": 7}
    assert shadow.received[0].header("X-Request-ID").endswith("-mirror")


async def test_a_mirror_that_hangs_slows_nobody_and_is_bounded(stack: Stack) -> None:
    live, shadow = await stack.engine(unary()), await stack.engine(never)
    # What is in the background gets no more than this of a replica; the rest would wait.
    models = (kit.model("m1", live), kit.model("m2", shadow, target_concurrency=64))
    await stack.scheduler.publish(*models, rules=(rule("m1", mirror=Mirror(model="m2")),))
    await stack.scheduler.in_force()
    for _ in range(MIRRORS_AT_ONCE + 3):
        assert (await ask(stack))[0] == 200
    await eventually(lambda: len(shadow.received) == MIRRORS_AT_ONCE, "as many as may be")
    assert 'stoker_router_mirrors_dropped_total{route="r"} 3.0' in await stack.metrics()


async def test_a_mirror_that_fails_fails_nobody(stack: Stack) -> None:
    live = await stack.engine(unary())
    await publish(stack, rule("m1", mirror=Mirror(model="m2")), m1=live, m2=None)
    assert (await ask(stack))[:2] == (200, "m1")

    def counted() -> bool:
        parts = {p.model: p for p in stack.scheduler.reports[-1].targets}
        return "m2" in parts and parts["m2"].errors == 1

    await eventually(counted, "the mirror's failure was counted")


# ------------------------------------------------------------------------------ keys

TOKEN = KEY_PREFIX + "aaaaaaaaaa-" + "s" * 43


async def with_key(stack: Stack, **spec: Any) -> None:
    """From now on nobody but the holder of TOKEN is let in."""
    stored = StoredKey(
        key_id="aaaaaaaaaa", digest=digest(TOKEN), created_at=0.0,
        spec=KeySpec(**({"tenant": "acme"} | spec)),
    )  # fmt: skip
    await stack.scheduler.publish_keys(stored)
    stack.session.headers["Authorization"] = f"Bearer {TOKEN}"
    async with asyncio.timeout(20):
        while (await stack.session.get(stack.url + "/v1/models")).status != 200:
            await asyncio.sleep(0.02)


@pytest.fixture(params=["plain", "handed over"])
async def guarded(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path, anonymous="off") as made:
        if request.param == "handed over":
            made.make_calls_odd()
        yield made


@pytest.mark.parametrize(
    ("scope", "answers"),
    [
        ("r", {"r": 200, "r@1": 200, "m1": 403}),
        ("r@1", {"r": 403, "r@1": 200, "m1": 403}),
        ("m1", {"r": 403, "r@1": 403, "m1": 200}),
    ],
)
async def test_a_key_is_for_the_names_that_callers_write(
    guarded: Stack, scope: str, answers: dict[str, int]
) -> None:
    engine, shadow = await guarded.engine(unary()), await guarded.engine(unary())
    targets = (RouteTarget(model="m1", version="1.0.0"),)
    made = RouteRule(name="r", targets=targets, mirror=Mirror(model="m2"))
    await publish(guarded, made, m1=engine, m2=shadow)
    await with_key(guarded, scope=Scope(models=(scope,)))
    assert {name: (await ask(guarded, model=name))[0] for name in answers} == answers
    mirrored = 1 if answers["r"] == 200 else 0
    await eventually(lambda: len(shadow.received) == mirrored, "what was let in was mirrored")


async def test_a_request_counts_once_however_many_models_are_tried(guarded: Stack) -> None:
    live, shadow = await guarded.engine(unary()), await guarded.engine(unary())
    made = rule("m1", fallback=("m2", "m3"), mirror=Mirror(model="m4"))
    await publish(guarded, made, m1=None, m2=None, m3=live, m4=shadow)
    await with_key(guarded, limits=Limits(requests_per_min=3))
    assert [(await ask(guarded))[0] for _ in range(4)] == [200, 200, 200, 429]
    assert len(live.received) == 3
    await eventually(lambda: len(shadow.received) == 3, "what was let in was mirrored")


# ------------------------------------------------------------------------------ live, and alone


async def test_routes_change_under_load_and_no_request_is_lost(stack: Stack) -> None:
    engines = {name: await stack.engine(unary()) for name in ("m1", "m2")}
    await publish(stack, rule("m1"), **engines)
    answers: list[tuple[int, str | None]] = []
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            answers.append((await ask(stack))[:2])

    def came(count: int) -> bool:
        return len(answers) >= count

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    for models in (("m2",), ("m1", "m2"), ("m1",), ("m2",)):
        await publish(stack, rule(*models), **engines)
        enough = len(answers) + 9
        await eventually(partial(came, enough), "calls go on")
    stop.set()
    await asyncio.gather(*callers)
    assert {status for status, _ in answers} == {200}
    assert answers[-1][1] == "m2"


async def test_a_router_that_starts_alone_goes_by_the_routes_it_had(tmp_path: Path) -> None:
    engine = await Engine(unary()).start("e")
    table = RouteTable(version=3, models=(kit.model("m1", engine),), rules=(rule("m1"),))
    saved_tables.save(tmp_path / "routes.json", table)
    made = Stack(tmp_path)
    made.registry.down = True
    try:
        await made.start_router()
        assert (await ask(made))[:2] == (200, "m1")
    finally:
        await made.close()
        engine.kill()
