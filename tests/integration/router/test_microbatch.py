"""Calls that arrive one by one and share a request to the engine, through a real router."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.contract.access import KEY_PREFIX, KeySpec, Limits, StoredKey, digest
from runtime.wire.model_spec import Batching
from tests.kits import router_stack as kit
from tests.kits.router_stack import Received, Stack, eventually, unary

pytestmark = pytest.mark.both_doors

EMBED = "/v1/embeddings"
RULE = Batching(max_batch_size=8, max_wait_ms=100)


async def embed(received: Received, writer: asyncio.StreamWriter) -> None:
    """A vector of each text's length; "bad" is refused, with all that came with it."""
    asked = received.json()["input"]
    texts = asked if isinstance(asked, list) else [asked]
    if "bad" in texts:
        await unary(b'{"error":{"message":"bad"}}', "400 Bad Request")(received, writer)
        return
    data = [{"object": "embedding", "index": i, "embedding": [len(t)]} for i, t in enumerate(texts)]
    usage = {"prompt_tokens": 10 * len(texts), "total_tokens": 10 * len(texts)}
    answer = {"object": "list", "model": "m", "data": data, "usage": usage}
    await unary(json.dumps(answer).encode())(received, writer)


async def ask(stack: Stack, text: str, **fields: Any) -> tuple[int, Any]:
    async with stack.post(EMBED, {"model": "m", "input": text, **fields}) as response:
        return response.status, await response.json()


async def test_calls_of_one_moment_share_a_request_and_get_their_own(stack: Stack) -> None:
    engine = await stack.engine(embed)
    await stack.serve("m", engine, batching=RULE)
    texts = ["x" * n for n in range(1, 9)]
    answers = await asyncio.gather(*(ask(stack, text) for text in texts))
    for text, (status, answer) in zip(texts, answers, strict=True):
        assert status == 200
        assert [item["embedding"] for item in answer["data"]] == [[len(text)]]
    assert sum(answer["usage"]["prompt_tokens"] for _, answer in answers) == 80
    assert len(engine.received) == 1  # full: sent at once
    told = await stack.metrics()
    assert 'llm_inference_requests_total{model="m",status="200",version=""} 8.0' in told
    assert 'llm_prompt_tokens_total{model="m",version=""} 80.0' in told


async def test_one_alone_waits_no_longer_than_it_may_and_goes_as_it_came(stack: Stack) -> None:
    engine = await stack.engine(embed)
    await stack.serve("m", engine, batching=RULE)
    status, answer = await ask(stack, "alone")
    assert (status, answer["data"][0]["embedding"]) == (200, [5])
    assert engine.received[0].json()["input"] == "alone"


async def test_one_bad_input_is_nobody_elses_fault(stack: Stack) -> None:
    engine = await stack.engine(embed)
    await stack.serve("m", engine, batching=RULE)
    answers = await asyncio.gather(*(ask(stack, text) for text in ("a", "bad", "ccc")))
    assert [status for status, _ in answers] == [200, 400, 200]
    assert answers[2][1]["data"][0]["embedding"] == [3]
    assert len(engine.received) == 4  # together, then each alone


async def test_a_caller_who_hangs_up_leaves_the_others_request_as_it_is(stack: Stack) -> None:
    go = asyncio.Event()

    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await embed(received, writer)

    engine = await stack.engine(slow)
    await stack.serve("m", engine, batching=RULE)
    calls = [asyncio.create_task(ask(stack, text)) for text in ("a", "bb", "ccc")]
    await eventually(lambda: engine.received, "the engine has them")
    calls[1].cancel()
    await asyncio.sleep(0.05)
    go.set()
    assert [(await calls[i])[1]["data"][0]["embedding"] for i in (0, 2)] == [[1], [3]]
    assert len(engine.received) == 1


async def test_calls_that_differ_and_models_without_the_setting_go_alone(stack: Stack) -> None:
    engine = await stack.engine(embed)
    await stack.serve("m", engine, batching=RULE)
    await asyncio.gather(ask(stack, "a", dimensions=1), ask(stack, "a", dimensions=2))
    assert len(engine.received) == 2
    await stack.serve("m", engine)
    await asyncio.gather(ask(stack, "a"), ask(stack, "a"))
    assert len(engine.received) == 4


async def test_what_the_engine_cannot_do_now_each_is_told(stack: Stack) -> None:
    await stack.serve("m", refusal="needs 80 GiB", retry_after_s=3.0, batching=RULE)
    answers = await asyncio.gather(*(ask(stack, text) for text in "ab"))
    assert [(status, body["error"]["code"]) for status, body in answers] == [
        (503, "model_unavailable")
    ] * 2


async def test_each_pays_for_its_own(tmp_path: Path) -> None:
    token = KEY_PREFIX + "aaaaaaaaaa-" + "s" * 43
    limits = Limits(requests_per_min=1000, tokens_per_day=10**6)
    key = StoredKey(
        key_id="aaaaaaaaaa", digest=digest(token), created_at=0.0,
        spec=KeySpec(tenant="acme", limits=limits),
    )  # fmt: skip
    async with kit.stack(tmp_path, anonymous="off") as stack:
        stack.session.headers["Authorization"] = f"Bearer {token}"
        engine = await stack.engine(embed)
        await stack.serve("m", engine, batching=RULE)
        await stack.scheduler.publish_keys(key)
        async with asyncio.timeout(20):
            while (await ask(stack, "x"))[0] != 200:
                await asyncio.sleep(0.02)
        before = len(engine.received)
        await asyncio.gather(*(ask(stack, "y" * n) for n in range(1, 9)))
        assert len(engine.received) == before + 1

        def used() -> tuple[int, int]:
            total = stack.scheduler.usage.totals(0.0).get("key:aaaaaaaaaa")
            return (total.requests, total.tokens) if total else (0, 0)

        await eventually(lambda: used() == (9, 90), "nine calls of ten tokens")
