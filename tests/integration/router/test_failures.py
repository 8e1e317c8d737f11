"""What fails: replicas that break off or refuse, tries elsewhere, and what the caller is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, error_of, eventually, never, sse, unary

pytestmark = pytest.mark.both_doors

CHAT = "/v1/chat/completions"


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
        said, _, payload = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        error = json.loads(payload)["error"]
        got = (int(said.split()[1]), error["code"], error["param"])
        assert got == (status, code, param), error["message"]
        assert b"x-request-id: " in said.lower()
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
