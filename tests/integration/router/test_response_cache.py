"""Kept answers through a real router: both paths, streams, tenants, directives, what breaks off."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from runtime.contract.access import KEY_PREFIX, KeySpec, StoredKey, digest
from runtime.wire.routes import CacheRule
from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"
RULE = CacheRule(ttl_s=60.0, shared=False, revision="r1")


async def ask(stack: Stack, path: str = CHAT, token: str = "", **fields: object) -> tuple:
    body = {"model": "m", "temperature": 0, **fields}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with stack.post(path, body, headers=headers) as response:
        return response.status, await response.read(), response.headers.get("X-Stoker-Cache")


async def test_a_repeat_is_answered_without_the_engine(stack: Stack) -> None:
    engine = await stack.engine(unary(b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'))
    await stack.serve("m", engine, cache=RULE)
    first, second = await ask(stack), await ask(stack)
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == ("miss", "hit")
    assert await ask(stack, temperature=1) == (200, first[1], None)
    assert len(engine.received) == 2
    told = await stack.metrics()
    assert 'llm_response_cache_requests_total{model="m",result="hit"} 1.0' in told
    assert 'llm_inference_requests_total{model="m",status="200",version=""} 3.0' in told
    assert 'llm_tokens_generated_total{model="m",version=""} 8.0' in told  # computed twice


async def test_a_stream_is_kept_whole_or_not_at_all(stack: Stack) -> None:
    events = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
    breaks = [True]

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        if breaks:
            breaks.pop()
            writer.write(kit.SSE_HEAD + kit.chunk(events[0]))
            await writer.drain()
            writer.transport.abort()
        else:
            await sse(*events)(received, writer)

    engine = await stack.engine(answer)
    await stack.serve("m", engine, cache=RULE)
    with pytest.raises(aiohttp.ClientError):
        await ask(stack, stream=True)
    whole, again = await ask(stack, stream=True), await ask(stack, stream=True)
    assert whole[1] == again[1] == b"".join(events)
    assert (whole[2], again[2]) == ("miss", "hit")
    assert len(engine.received) == 2


async def test_errors_are_not_kept(stack: Stack) -> None:
    engine = await stack.engine(unary(b'{"error":{}}', "400 Bad Request"))
    await stack.serve("m", engine, cache=RULE)
    assert [(await ask(stack))[0] for _ in range(2)] == [400, 400]
    assert len(engine.received) == 2


async def test_a_changed_model_is_asked_again_and_no_rule_keeps_nothing(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, cache=RULE)
    await ask(stack)
    await stack.serve("m", engine, cache=CacheRule(ttl_s=60.0, shared=False, revision="r2"))
    assert (await ask(stack))[2] == "miss"
    await stack.serve("m", engine)
    assert (await ask(stack))[2] is None
    assert len(engine.received) == 3


async def test_a_hit_needs_no_replica(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, cache=RULE)
    await ask(stack)
    await stack.serve("m", cache=RULE)  # it went cold
    assert (await ask(stack))[2] == "hit"


async def test_no_tenant_gets_anothers_answer(stack: Stack) -> None:
    tokens = [KEY_PREFIX + letter * 10 + "-" + letter * 43 for letter in "ab"]
    keys = [
        StoredKey(
            key_id=t[len(KEY_PREFIX) :][:10], digest=digest(t), created_at=0.0,
            spec=KeySpec(tenant=f"t{n}"),
        )
        for n, t in enumerate(tokens)
    ]  # fmt: skip
    engine = await stack.engine(unary())
    await stack.serve("m", engine, cache=RULE)
    await stack.scheduler.publish_keys(*keys)
    async with asyncio.timeout(20):
        while (await ask(stack, token=tokens[0], x=1))[0] != 200:
            await asyncio.sleep(0.02)
    assert [(await ask(stack, token=t))[2] for t in (*tokens, *tokens)] == [
        "miss", "miss", "hit", "hit",
    ]  # fmt: skip
