"""Calls that wait for a replica, and callers that hang up meanwhile."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, eventually, never, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


async def test_200_held_requests_are_all_answered_after_the_wake(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", warmth="cold")

    async def call() -> int:
        async with stack.post(CHAT, {"model": "m"}) as response:
            await response.read()
            return response.status

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), middlewares=(kit.json_by_default,)
    )
    await stack.session.close()
    stack.session = session
    calls = [asyncio.create_task(call()) for _ in range(200)]
    await eventually(lambda: stack.scheduler.waiting() == 200, "not all wait")
    assert not engine.received
    await stack.serve("m", engine)
    assert await asyncio.gather(*calls) == [200] * 200
    assert len(engine.received) == 200
    await eventually(lambda: stack.scheduler.waiting() == 0, "still waiting")
    assert 'llm_hold_seconds_count{model="m",rung="cold",version=""} 200.0' in await stack.metrics()


async def test_demand_is_reported_at_once_when_a_model_begins_to_wait(stack: Stack) -> None:
    await stack.serve("m")
    before = len(stack.scheduler.reports)
    call = asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__())
    await eventually(lambda: len(stack.scheduler.reports) > before, "no report")
    (demand,) = stack.scheduler.reports[before].models
    assert (demand.model, demand.waiting) == ("m", 1)
    call.cancel()


async def test_a_cold_stream_hears_at_once_why_it_waits(stack: Stack) -> None:
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: [DONE]\n\n"))
    await stack.serve("m", waiting_for="starting on\ngpu-1", eta_s=41.0)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache"
        assert len(response.headers["X-Request-ID"]) == 32
        for _ in range(3):
            comment = await response.content.readuntil(b"\n\n")
            assert comment == b": waiting for m: starting on gpu-1, 0s, about 41s left\n\n"
        await stack.serve("m", engine)
        rest = await response.content.read()
    assert rest.endswith(b"data: 1\n\ndata: [DONE]\n\n")
    assert all(part.startswith(b": ") for part in rest.split(b"\n\n")[:-3])


async def read_error_event(response: aiohttp.ClientResponse) -> dict:
    *_, event, done, end = (await response.content.read()).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    assert event.startswith(b"data: ")
    return json.loads(event[6:])["error"]


async def test_a_cold_stream_that_fails_ends_with_an_error_event(stack: Stack) -> None:
    await stack.serve("m")
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await stack.serve("m", refusal="the model's files are damaged")
        error = await read_error_event(response)
    assert error["code"] == "model_unavailable"
    assert "files are damaged" in error["message"]
    assert 'requests_total{model="m",status="503",version=""} 1.0' in await stack.metrics()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"context too long","type":"x","param":null,"code":400}}', "context"),
        (b"Bad Request", "status 400"),
    ],
)
async def test_an_engines_refusal_of_a_cold_stream_becomes_an_error_event(
    stack: Stack, body: bytes, message: str
) -> None:
    engine = await stack.engine(unary(body, "400 Bad Request"))
    await stack.serve("m")
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await stack.serve("m", engine)
        assert message in (await read_error_event(response))["message"]


async def test_a_warm_stream_keeps_the_engines_status(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary(b"{}", "422 Unprocessable Entity")))
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        assert response.status == 422


# ------------------------------------------------------------------------------------- hang-ups


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_hangs_up_cancels_the_engine(stack: Stack, streaming: bool) -> None:
    engine = await stack.engine(never)
    await stack.serve("m", engine)
    call = asyncio.create_task(stack.post(CHAT, {"model": "m", "stream": streaming}).__aenter__())
    await eventually(lambda: engine.received, "not forwarded")
    call.cancel()
    await eventually(lambda: engine.hung_up == 1, "the engine still works")
    await eventually(lambda: not stack.scheduler.reports[-1].in_flight, "still counted")
    assert 'requests_total{model="m",status="499",version=""} 1.0' in await stack.metrics()


async def test_a_client_that_hangs_up_in_mid_stream_cancels_the_engine(stack: Stack) -> None:
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=asyncio.Event()))
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        await response.content.readany()
        response.close()
    await eventually(lambda: engine.hung_up == 1, "the engine still works")


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_hangs_up_leaves_the_queue(stack: Stack, streaming: bool) -> None:
    await stack.serve("m")
    call = asyncio.create_task(stack.post(CHAT, {"model": "m", "stream": streaming}).__aenter__())
    await eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    if call.done():
        call.result().close()
    call.cancel()
    await eventually(lambda: stack.scheduler.waiting() == 0, "still waits")
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    assert not engine.received
