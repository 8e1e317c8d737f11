"""The router between real sockets: bytes, queues, failures, and life without its scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from runtime.engine import guard
from runtime.router.control import saved_tables
from runtime.wire.routes import RouteTable
from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT
from tests.kits.router_stack import KEY, Engine, Stack, eventually, never, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


async def error_of(response: aiohttp.ClientResponse) -> dict:
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert KEY not in body["error"]["message"]
    assert "127.0.0.1" not in body["error"]["message"]
    return body["error"]


# ------------------------------------------------------------------------------------- bytes


async def test_a_request_reaches_the_engine_unchanged_but_for_the_keys(stack: Stack) -> None:
    engine = await stack.engine(
        unary(b'{"id": 1.00}', "201 Created", "X-Engine: a\r\nX-Engine: b\r\n")
    )
    await stack.serve("m", engine)
    body = b'{ "model":"m", "n": 1.0e2,"text":"\\u00e9\xc3\xa9" }\n'
    headers = {
        "Authorization": "Bearer the-client's",
        "X-Request-ID": "mine-1",
        "X-Custom": "kept",
        "X-Stoker-Model": "another",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "dropped",
        "Content-Type": "application/json",
    }
    async with stack.post(CHAT + "?a=b%20c", body, headers=headers) as response:
        assert response.status == 201
        assert await response.read() == b'{"id": 1.00}'
        assert response.headers.getall("X-Engine") == ["a", "b"]
        assert response.headers["X-Request-ID"] == "mine-1"
    (received,) = engine.received
    assert received.target == CHAT + "?a=b%20c"
    assert received.body == body
    assert [v for n, v in received.headers if n.lower() == "authorization"] == [f"Bearer {KEY}"]
    assert received.header("X-Request-ID") == "mine-1"
    assert received.header("X-Custom") == "kept"
    assert [v for n, v in received.headers if n.lower() == "x-stoker-model"] == ["m"]
    assert received.header("Content-Type") == "application/json"
    assert received.header("X-Hop") is None


async def test_a_request_id_is_made_where_there_is_none_worth_keeping(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m"}, headers={"X-Request-ID": "no spaces"}) as response:
        made = response.headers["X-Request-ID"]
    assert len(made) == 32
    assert engine.received[0].header("X-Request-ID") == made


@pytest.mark.parametrize("seed", range(6))
async def test_streams_pass_byte_for_byte_however_they_are_split(stack: Stack, seed: int) -> None:
    rng = random.Random(seed)
    payload = [rng.randbytes(rng.choice((1, 2, 7, 180, 5000, 70_000))) for _ in range(60)]
    raw = kit.SSE_HEAD + b"".join(map(kit.chunk, payload)) + b"0\r\nX-Trailer: t\r\n\r\n"

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        left = raw
        while left:
            size = rng.choice((1, 3, 50, 1000, 60_000))
            writer.write(left[:size])
            left = left[size:]
            await writer.drain()
            if rng.random() < 0.3:
                await asyncio.sleep(0)

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for _ in range(2):
        async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert await response.read() == b"".join(payload)
    assert engine.connections == 1, "the connection was not kept"


async def test_events_are_not_delayed(stack: Stack) -> None:
    more = asyncio.Event()
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=more))
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        more.set()
        assert await response.content.read() == b"data: 2\n\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nuntil the end",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 13\r\n\r\nuntil the end",
    ],
)
async def test_every_framing_of_an_answer(stack: Stack, raw: bytes) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        writer.close()

    await stack.serve("m", await stack.engine(answer))
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert (response.status, await response.read()) == (200, b"until the end")


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_not_http_is_502(stack: Stack, raw: bytes) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        writer.close()

    # Three replicas, of which two are tried: it could be the request that breaks them.
    await stack.serve("m", *[await stack.engine(answer) for _ in range(3)])
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 502
        assert (await error_of(response))["code"] == "replica_failed"
    assert [len(engine.received) for engine in stack.engines] == [1, 1, 0]


async def test_a_second_answer_after_the_first_is_never_given_to_anyone(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        one = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        writer.write(one + str(len(engine.received)).zfill(2).encode() + one + b"no")
        await writer.drain()

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for expected in (b"01", b"02", b"03"):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert await response.read() == expected


async def test_a_connection_the_engine_closed_while_idle_is_replaced(stack: Stack) -> None:
    """The engine closes only when the next request has come, as when uvicorn's timer wins."""

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        if len(engine.received) == 2:
            writer.transport.abort()
            return
        await unary()(received, writer)

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    for _ in range(2):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200
    assert (len(engine.received), engine.connections) == (3, 2)


async def test_a_large_body_goes_up_and_comes_back(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await unary(received.body)(received, writer)

    await stack.serve("m", await stack.engine(answer))
    body = json.dumps({"model": "m", "input": "x" * 8_000_000}).encode()
    async with stack.post("/v1/embeddings", body) as response:
        assert await response.read() == body


# ------------------------------------------------------------------------------------- waiting


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


# ------------------------------------------------------------------------------------- failures


async def test_an_engine_killed_before_its_first_byte_is_replaced_by_another(stack: Stack) -> None:
    dying, other = await stack.engine(never), await stack.engine(unary())
    await stack.serve("m", dying, other)
    calls = [asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__()) for _ in range(4)]
    await eventually(lambda: len(dying.received) == 2, "not spread")
    dying.kill()
    assert [(await call).status for call in calls] == [200] * 4
    assert len(other.received) == 4


async def test_headers_without_a_body_are_not_yet_an_answer(stack: Stack) -> None:
    async def only_headers(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD)
        await asyncio.Event().wait()

    dying, other = await stack.engine(only_headers), await stack.engine(sse(b"data: 1\n\n"))
    await stack.serve("m", dying, other)
    call = asyncio.create_task(stack.post(CHAT, {"model": "m", "stream": True}).__aenter__())
    await eventually(lambda: dying.received, "not sent")
    dying.kill()
    assert await (await call).read() == b"data: 1\n\n"


async def test_a_killed_engines_requests_wait_for_its_successor(stack: Stack) -> None:
    dying, successor = await stack.engine(never), await stack.engine(unary())
    await stack.serve("m", dying, target_concurrency=20)
    calls = [asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__()) for _ in range(20)]
    await eventually(lambda: len(dying.received) == 20, "not sent")
    dying.kill()
    await eventually(lambda: stack.scheduler.waiting() == 20, "they do not wait")
    await stack.serve("m")
    await stack.serve("m", successor)
    assert [(await call).status for call in calls] == [200] * 20


async def test_an_engine_that_is_not_there_is_held_for(stack: Stack) -> None:
    gone, there = await stack.engine(unary()), await stack.engine(unary())
    gone.kill()
    await stack.serve("m", gone)
    call = asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__())
    await eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    await stack.serve("m", there)
    assert (await call).status == 200


async def test_a_replica_that_refuses_our_key_is_not_the_callers_fault(stack: Stack) -> None:
    wrong = await stack.engine(unary(b"{}", "401 Unauthorized"))
    right = await stack.engine(unary())
    await stack.serve("m", wrong, right)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 200
    assert wrong.received


async def test_a_request_that_meets_an_engine_going_to_sleep_is_held_not_refused(
    stack: Stack,
) -> None:
    asleep = await stack.engine(
        unary(b'{"error":{}}', "503 Service Unavailable", "x-stoker-closed: 1\r\n")
    )
    awake = await stack.engine(unary())
    await stack.serve("m", asleep)
    call = asyncio.ensure_future(_status(stack, "m"))
    await kit.eventually(lambda: asleep.received, "the closed engine was asked")
    await kit.eventually(stack.scheduler.waiting, "the request is held")
    assert not call.done()
    await stack.serve("m", awake)
    assert await asyncio.wait_for(call, 20) == 200
    # a 503 of the engine's own making is the caller's to see
    busy = await stack.engine(unary(b'{"error":{}}', "503 Service Unavailable"))
    await stack.serve("n", busy)
    assert await _status(stack, "n") == 503


async def _status(stack: Stack, model: str) -> int:
    async with stack.post(CHAT, {"model": model}) as response:
        return int(response.status)


@pytest.mark.parametrize("framing", ["chunked", "length", "http/1.0"])
async def test_an_answer_broken_off_is_seen_to_be_broken(stack: Stack, framing: str) -> None:
    cut = asyncio.Event()

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        if framing == "length":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: 1\n\n")
        else:
            writer.write(kit.SSE_HEAD + kit.chunk(b"data: 1\n\n"))
        await cut.wait()
        writer.transport.abort()

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    body = b'{"model":"m","stream":true}'
    version = "1.0" if framing == "http/1.0" else "1.1"
    reader, writer = await asyncio.open_connection(*stack.url.removeprefix("http://").split(":"))
    writer.write(
        f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await reader.readuntil(b"\r\n\r\n")
    received = await reader.readuntil(b"data: 1\n\n")
    cut.set()
    if framing == "http/1.0":
        with pytest.raises(ConnectionResetError):
            await reader.read()
    else:
        rest = await reader.read()  # ends: the connection is closed …
        assert b"0\r\n\r\n" not in received + rest  # … and the framing shows the gap
    writer.close()
    assert len(engine.received) == 1, "an answer that had begun was asked for again"


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (CHAT, b'{"model":', 400, "invalid_json", None),
        (CHAT, b"[1]", 400, "invalid_json", None),
        (CHAT, b"", 400, "invalid_json", None),
        (CHAT, b'{"model":"\xff"}', 400, "invalid_json", None),
        ("/invoke/m", b'{"prompt":"a","\xff":1}', 400, "invalid_json", None),
        ("/models/m/v1/completions", b'{"user":"\xff"}', 400, "invalid_json", None),
        (CHAT, b'{"model":3}', 400, "invalid_field", "model"),
        (CHAT, b'{"model":"m","stream":"yes"}', 400, "invalid_field", "stream"),
        (CHAT, b'{"model":"mm"}', 404, "model_not_found", "model"),
        (CHAT, b'{"model":"m","x":"' + b"x" * 5000 + b'"}', 413, "body_too_large", None),
        ("/v1/load_lora_adapter", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/UNLOAD_lora_adapter", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/%6coad_lora_adapter", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/load_lora_adapter/", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/x/..%2fload_lora_adapter", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/../sleep", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/..%2f..%2fsleep", b'{"model":"m"}', 404, "not_found", None),
        ("/v1//sleep", b'{"model":"m"}', 404, "not_found", None),
        ("/v1/%2e%2e/sleep", b'{"model":"m"}', 404, "not_found", None),
        ("/models/m/v1/..%2fsleep", b"{}", 404, "not_found", None),
        ("/models/m/v1/load_lora_adapter", b"{}", 404, "not_found", None),
        ("/sleep", b"{}", 404, "not_found", None),
        ("/healthz", b"{}", 405, "method_not_allowed", None),
        ("/invoke/m", b"{}", 400, "invalid_body", "prompt"),
        ("/invoke/m", b'{"prompt":"a","input":"b"}', 400, "invalid_body", "input"),
        ("/invoke/m?stream=perhaps", b'{"prompt":"a"}', 400, "invalid_field", "stream"),
        ("/invoke/m?stream=1", b'{"input":"a"}', 400, "invalid_body", "stream"),
        ("/invoke/other", b'{"prompt":"a"}', 404, "model_not_found", "model"),
        ("/models/other/v1/completions", b"{}", 404, "model_not_found", "model"),
    ],
)
async def test_refusals(
    tmp_path: Path, path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    async with kit.stack(tmp_path, max_body_bytes=4096) as stack:
        engine = await stack.engine(unary())
        await stack.serve("m", engine)
        host, port = stack.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port)  # no client tidies the path up
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        head, _, payload = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        error = json.loads(payload)["error"]
        got = (int(head.split()[1]), error["code"], error["param"])
        assert got == (status, code, param), error["message"]
        assert b"x-request-id: " in head.lower()
        assert not engine.received


async def test_a_body_too_large_is_refused_without_a_length_too(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, max_body_bytes=4096) as stack:
        await stack.serve("m", await stack.engine(unary()))

        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"model":"m","x":"'
            for _ in range(100):
                yield b"x" * 100

        async with stack.session.post(stack.url + CHAT, data=pieces()) as response:
            assert response.status == 413
            assert "4096" in (await error_of(response))["message"]


async def test_queue_full_hold_timeout_and_refusal(stack: Stack) -> None:
    await stack.serve(
        "m", max_queue=1, hold_s=1.0, retry_after_s=7.2, waiting_for="starting on gpu-1"
    )
    first = asyncio.create_task(stack.post(CHAT, {"model": "m"}).__aenter__())
    await eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "8")
        assert (await error_of(response))["type"] == "rate_limit_error"
    timed_out = await first
    assert (timed_out.status, timed_out.headers["Retry-After"]) == (504, "8")
    assert "starting on gpu-1" in (await error_of(timed_out))["message"]
    await stack.serve("m", refusal="needs 80 GiB", retry_after_s=0.2)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "needs 80 GiB" in (await error_of(response))["message"]


async def test_unknown_names_do_not_become_metrics(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()), aliases=("org/m",))
    for name in ("m", "org/m", "evil-1", "evil-2"):
        async with stack.post(CHAT, {"model": name}):
            pass
    metrics = await stack.metrics()
    assert "evil" not in metrics
    assert 'requests_total{model="_unknown",status="404",version=""} 2.0' in metrics
    assert 'requests_total{model="m",status="200",version=""} 2.0' in metrics


# ------------------------------------------------------------------------------------- API


async def test_models(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.scheduler.publish(
        kit.model("a", engine, warmth="hot", aliases=("org/a", "other:1")), kit.model("b")
    )
    await stack.scheduler.in_force()

    async def get(path: str) -> dict:
        async with stack.session.get(
            aiohttp.client.URL(stack.url + path, encoded=True)
        ) as response:
            return await response.json()

    listing = await get("/v1/models")
    assert listing["object"] == "list"
    a, *aliases, b = listing["data"]
    assert [card["id"] for card in aliases] == ["org/a", "other:1"]
    assert a == {
        "id": "a", "object": "model", "created": a["created"], "owned_by": "stoker",
        "root": "a", "parent": None, "max_model_len": None, "permission": a["permission"],
        "warmth": "hot", "aliases": ["org/a", "other:1"],
    }  # fmt: skip
    assert isinstance(a["created"], int)
    assert (b["id"], b["warmth"]) == ("b", "cold")
    assert await get("/v1/models/a") == a
    for name in ("org/a", "org%2Fa"):
        assert await get(f"/v1/models/{name}") == aliases[0]
    assert await get("/v1/models/other:1") == aliases[1]
    assert await get("/models/org%2Fa/v1/models") == {"object": "list", "data": [a, *aliases]}
    assert await get("/models/a/v1/models/org%2Fa") == aliases[0]
    assert (await get("/models/a/v1/models/b"))["error"]["code"] == "model_not_found"
    assert "did you mean" in (await get("/v1/models/org/b"))["error"]["message"]


@pytest.mark.parametrize(
    ("body", "query", "target", "sent"),
    [
        ({"prompt": "p", "n": 2}, "", "/v1/completions", {"prompt": "p", "n": 2}),
        ({"messages": []}, "", "/v1/chat/completions", {"messages": []}),
        ({"input": ["a"]}, "", "/v1/embeddings", {"input": ["a"]}),
        ({"prompt": "p"}, "?stream=true", "/v1/completions", {"prompt": "p", "stream": True}),
        ({"prompt": "p"}, "?stream=0", "/v1/completions", {"prompt": "p", "stream": False}),
    ],
)
async def test_invoke(stack: Stack, body: dict, query: str, target: str, sent: dict) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    for path, name in (
        ("/invoke/m", "m"),
        ("/invoke/org/m", "org/m"),
        ("/invoke/org%2Fm", "org/m"),
    ):
        url = aiohttp.client.URL(stack.url + path + query, encoded=True)
        async with stack.session.post(url, json={**body, "model": "ignored"}) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert (received.target, received.json()) == (target, {**sent, "model": name})


async def test_one_base_url_per_model(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    raw = b'{"model":"gpt-4","temperature":1.0e0,"text":"\\u0041"}'
    for path, name in (
        ("/models/m", "m"),
        ("/models/org/m", "org/m"),
        ("/models/org%2Fm", "org/m"),
    ):
        url = aiohttp.client.URL(f"{stack.url}{path}{CHAT}", encoded=True)
        async with stack.session.post(url, data=raw) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert received.target == CHAT
        assert received.body == raw.replace(b"gpt-4", name.encode())


PATHS = (
    "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v1/score",
    "/v1/rerank", "/score", "/rerank", "/v2/rerank", "/v2/embed", "/pooling",
    "/classify", "/tokenize", "/detokenize",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_every_inference_path_passes_unknown_fields_and_all(stack: Stack, path: str) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    body = b'{"x-new": {"n": 1.0e2}, "model": "m"}'
    async with stack.post(path, body, headers={"x-api-key": "the-client's"}) as response:
        assert (response.status, await response.read()) == (200, b'{"ok":true}')
    (received,) = engine.received
    assert (received.target, received.body) == (path, body)
    assert received.header("x-api-key") is None
    assert guard.refuse(path, b"Bearer k", guard.Keys(b"k", b"control")) is None


def form_of(model: str | None) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("file", bytes(range(256)) * 100 + b"\r\n--", filename="a.wav")
    if model is not None:
        form.add_field("model", model)
    form.add_field("language", "en")
    return form


async def test_a_forms_model_is_found_after_its_file(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    url = stack.url + "/v1/audio/transcriptions"
    for name in ("m", "org/m"):
        async with stack.session.post(url, data=form_of(name)) as response:
            assert response.status == 200
        received = engine.received[-1]
        assert received.header("Content-Type").startswith("multipart/form-data; boundary=")
        assert bytes(range(256)) * 100 + b"\r\n--" in received.body
        assert name.encode() in received.body
    async with stack.session.post(url, data=form_of(None)) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == "model"
    async with stack.session.post(
        stack.url + "/models/m/v1/audio/transcriptions", data=form_of(None)
    ) as response:
        assert response.status == 200
    assert [r.target for r in engine.received] == ["/v1/audio/transcriptions"] * 3


@pytest.mark.parametrize("body", [b"", b"--b\r\n", b"--b\r\nnonsense\r\n\r\nx\r\n--b--\r\n", b"x"])
async def test_a_damaged_form_is_400(stack: Stack, body: bytes) -> None:
    await stack.serve("m", await stack.engine(unary()))
    async with stack.session.post(
        stack.url + "/v1/audio/transcriptions", data=body,
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    ) as response:  # fmt: skip
        assert response.status == 400
        await error_of(response)


# ------------------------------------------------------------------------------------- the link


async def test_not_ready_until_there_is_a_table(stack: Stack) -> None:
    async def status(path: str) -> int:
        async with stack.session.get(stack.url + path) as response:
            return response.status

    assert (await status("/healthz"), await status("/readyz")) == (200, 503)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await error_of(response))["code"] == "no_routes"
    await stack.serve("m")
    assert await status("/readyz") == 200


async def test_it_serves_on_while_scheduler_and_registry_are_down(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    stack.registry.down = True
    await stack.scheduler.stop()
    for _ in range(20):
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200
        await asyncio.sleep(0.01)


async def test_a_new_leader_is_found_and_its_table_taken(stack: Stack) -> None:
    old, new = await stack.engine(unary(b'"old"')), await stack.engine(unary(b'"new"'))
    await stack.scheduler.publish(kit.model("m", old), version=1000)
    await stack.scheduler.in_force()
    await stack.scheduler.stop()
    stack.scheduler = kit.Scheduler()
    await stack.scheduler.start(stack.registry, term=2)
    await stack.scheduler.publish(kit.model("m", new), version=7)  # set up again: it counts again
    await stack.scheduler.in_force()
    assert stack.scheduler.polls[0] == 0
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert await response.read() == b'"new"'


async def test_a_leader_of_an_older_term_is_not_listened_to(stack: Stack) -> None:
    await stack.scheduler.stop()
    stack.scheduler = kit.Scheduler()
    await stack.scheduler.start(stack.registry, term=5)
    await stack.serve("m", await stack.engine(unary(b'"now"')))
    await stack.scheduler.stop()
    deposed = kit.Scheduler()
    await deposed.start(stack.registry, term=4)
    await deposed.publish(kit.model("m"))
    looked = 0
    original = stack.registry.get

    async def counted(key: str) -> object:
        nonlocal looked
        looked += 1
        return await original(key)

    stack.registry.get = counted
    await eventually(lambda: looked >= 3, "the leader was not looked up")
    assert not deposed.polls
    assert not deposed.reports
    await deposed.stop()


async def test_an_older_table_of_the_same_leader_is_ignored(stack: Stack) -> None:
    await stack.scheduler.publish(kit.model("m", await stack.engine(unary(b'"good"'))), version=10)
    await stack.scheduler.in_force()
    await stack.scheduler.publish(kit.model("m", refusal="stale"), version=9)
    polls = stack.scheduler.polls
    count = len(polls)
    await eventually(lambda: len(polls) > count + 1, "it did not poll on")
    assert polls[-1] == 10
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert await response.read() == b'"good"'


async def test_it_registers_and_withdraws(stack: Stack) -> None:
    (service,) = await eventually(lambda: tuple(stack.registry.registered.values()), "unregistered")
    assert service.name == "stoker-router"
    assert stack.url == f"http://{service.address}:{service.port}"
    await stack.ask_to_stop()
    assert not stack.registry.registered


# ------------------------------------------------------------------------------------- its life


@contextlib.asynccontextmanager
async def router_process(state_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", kit.__name__, str(state_dir),
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(kit.DEADLINE_S):
            url = (await process.stdout.readline()).decode().strip()
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def started(answer: kit.Answer) -> Engine:
    return await Engine(answer).start("replica")


async def test_the_table_is_kept_readable_by_its_owner_only(stack: Stack, tmp_path: Path) -> None:
    await stack.serve("m", await stack.engine(unary()))
    file = tmp_path / "routes.json"
    await eventually(file.exists, "not written")
    assert file.stat().st_mode & 0o777 == 0o600
    assert saved_tables.load(file, RouteTable) == stack.scheduler.table


async def test_a_restarted_router_serves_with_everything_else_down(tmp_path: Path) -> None:
    engine = await started(unary(b'"here"'))
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    async with router_process(tmp_path) as (process, url), aiohttp.ClientSession() as session:
        async with session.post(url + CHAT, json={"model": "m"}) as response:
            assert await response.read() == b'"here"'
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    engine.kill()


async def test_a_damaged_table_file_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_bytes(b'{"version": "')
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()))
        async with stack.post(CHAT, {"model": "m"}) as response:
            assert response.status == 200


async def test_streams_under_way_end_before_it_does(stack: Stack) -> None:
    more = asyncio.Event()
    engine = await stack.engine(sse(b"data: 1\n\n", b"data: 2\n\n", hold=more))
    await stack.serve("m", engine)
    async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
        await response.content.readany()
        ending = stack.ask_to_stop()
        host, port = stack.url.removeprefix("http://").split(":")

        def refuses() -> bool:
            import socket

            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) != 0

        await eventually(refuses, "it still accepts")
        assert not ending.done()
        more.set()
        assert await response.content.read() == b"data: 2\n\n"
    await ending


@pytest.mark.parametrize("odd", ["", "Expect: 100-continue\r\n"], ids=["plain", "odd"])
async def test_who_connected_before_its_end_is_answered(stack: Stack, odd: str) -> None:
    """Its request was on the way: a caller that knows only of its own connection loses nothing."""
    await stack.serve("m", await stack.engine(unary(b'"here"')))
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with stack.post(CHAT, {"model": "m"}) as later:  # so ours has been accepted
        assert later.status == 200
    ending = stack.ask_to_stop()
    await asyncio.sleep(0.1)
    body = '{"model": "m"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{odd}"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    async with asyncio.timeout(kit.DEADLINE_S):
        said = await reader.read()
    assert b" 200 OK\r\n" in said
    assert b'"here"' in said
    writer.close()
    await ending


async def test_who_connected_and_asks_nothing_holds_up_no_end(stack: Stack) -> None:
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(4.0):  # drain_s is 5
        await stack.ask_to_stop()
        assert await reader.read() == b""
    writer.close()


async def test_a_client_that_does_not_read_does_not_fill_the_routers_memory(tmp_path: Path) -> None:
    total, piece = 200 * 2**20, b"x" * 65536
    written = 0

    async def flood(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while written < total:
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    engine = await started(flood)
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    async with router_process(tmp_path) as (process, url):
        memory = psutil.Process(process.pid)
        before = memory.memory_info().rss
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port, limit=65536)
        body = b'{"model":"m"}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()
        stalled = await settled(lambda: written)
        assert 0 < stalled < total / 4, "the engine was not slowed down"
        assert memory.memory_info().rss - before < 32 * 2**20
        reader._transport.resume_reading()
        left = total
        while left:
            left -= len(await reader.read(2**20))
        writer.close()
        assert memory.memory_info().rss - before < 48 * 2**20
    engine.kill()


async def settled(value: object) -> int:
    """The value once it has not moved for a while."""
    last, same = value(), 0
    async with asyncio.timeout(kit.DEADLINE_S):
        while same < 30:
            await asyncio.sleep(0.02)
            same = same + 1 if value() == last and last else 0
            last = value()
    return last
