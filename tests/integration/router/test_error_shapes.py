"""Every way a call can fail, in the shape of its path's protocol, at both doors of the router."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from runtime.wire.routes import RouteRule, RouteTarget
from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, sse, unary

Fail = Callable[[Stack], Coroutine[Any, Any, None]]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COUNT = "/v1/messages/count_tokens"
PATHS = (CHAT, "/v1/completions", RESPONSES, MESSAGES)
VLLM_400 = (
    b'{"error":{"message":"the prompt is too long","type":"BadRequestError","param":"messages",'
    b'"code":400}}'
)
ANTHROPIC_400 = (
    b'{"type":"error","error":{"type":"BadRequestError","message":"the prompt is too long"}}'
)
EVENTS = {
    CHAT: b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    "/v1/completions": b'data: {"choices":[{"text":"a"}]}\n\n',
    RESPONSES: b'event: response.created\ndata: {"type":"x","sequence_number":4}\n\n',
    MESSAGES: b'event: ping\ndata: {"type":"ping"}\n\n',
}


@pytest.fixture(params=["plain", "handed over", "one model's URL"])
async def stack(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path) as made:
        if request.param == "handed over":
            made.make_calls_odd()
        elif request.param == "one model's URL":
            made.url += "/models/m"
        yield made


def assert_whole(path: str, status: int, body: bytes, request_id: str) -> str:
    """That it is an error of the path's protocol; its message."""
    told = json.loads(body)
    if "/v1/messages" not in path:
        assert set(told) == {"error"}
        assert set(told["error"]) == {"message", "type", "param", "code"}
        return told["error"]["message"]
    assert set(told) == {"type", "error", "request_id"}
    assert (told["type"], told["request_id"]) == ("error", request_id)
    kinds = {
        400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
        404: "not_found_error", 405: "invalid_request_error", 413: "request_too_large",
        429: "rate_limit_error", 500: "api_error", 502: "api_error", 503: "overloaded_error",
        504: "timeout_error",
    }  # fmt: skip
    assert told["error"]["type"] == kinds[status]
    return told["error"]["message"]


def assert_ended(path: str, events: bytes, request_id: str, number: int | None) -> str:
    """That a stream ends with one error event of the path's protocol; its message. `number`: that
    of a Responses event; None: real events went before, and nothing may look like an end."""
    *_, last, end = events.split(b"\n\n")
    assert end == b""
    if path in (CHAT, "/v1/completions"):
        if number is not None:
            assert last == b"data: [DONE]"
            last = events.split(b"\n\n")[-3]
        assert last.startswith(b"data: ")
        return assert_whole(path, 0, last[6:], request_id)
    assert b"[DONE]" not in events
    name, data = last.split(b"\n", 1)
    assert (name, data[:6]) == (b"event: error", b"data: ")
    told = json.loads(data[6:])
    if path == RESPONSES:
        assert set(told) == {"type", "code", "message", "param", "sequence_number"}
        assert (told["type"], told["sequence_number"]) == ("error", 5 if number is None else number)
        assert told["code"] is None or isinstance(told["code"], str)
        return told["message"]
    assert told["request_id"] == request_id
    assert told["type"] == "error"
    return told["error"]["message"]


# ------------------------------------------------------------------------------------- whole


async def unavailable(stack: Stack) -> None:
    await stack.serve("m", refusal="it broke")


async def engines_400(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary(VLLM_400, "400 Bad Request")))


async def anthropic_400(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary(ANTHROPIC_400, "400 Bad Request")))


async def dying(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    await stack.serve("m", *[await stack.engine(answer) for _ in range(3)])


async def late(stack: Stack) -> None:
    await stack.serve("m", hold_s=0.2)


@pytest.mark.parametrize("path", [*PATHS, COUNT, MESSAGES + "?beta=true"])
@pytest.mark.parametrize("fail", [unavailable, engines_400, dying, late])
async def test_a_whole_error_has_the_shape_of_its_path(stack: Stack, path: str, fail: Fail) -> None:
    await fail(stack)
    async with stack.post(path, {"model": "m"}) as response:
        body = await response.read()
        assert response.status >= 400
        assert response.headers["Content-Type"].startswith("application/json")
        message = assert_whole(path, response.status, body, response.headers["X-Request-ID"])
    words: dict[Fail, str] = {
        unavailable: "it broke",
        engines_400: "prompt is too long",
        dying: "gave up",
    }
    assert words.get(fail, "hold_s") in message


async def test_an_engines_anthropic_error_gets_anthropics_types_and_the_id(stack: Stack) -> None:
    await anthropic_400(stack)
    async with stack.post(MESSAGES, {"model": "m"}) as response:
        body, request_id = await response.read(), response.headers["X-Request-ID"]
        assert "prompt is too long" in assert_whole(MESSAGES, response.status, body, request_id)


@pytest.mark.parametrize(
    ("path", "send", "status"),
    [
        (MESSAGES, {"data": b"{"}, 400),
        (COUNT, {"data": b"[1]"}, 400),
        (MESSAGES, {"data": b'{"model":1}'}, 400),
        (MESSAGES, {"data": b'{"model":"nope"}'}, 404),
        (MESSAGES + "/batches/x/y/..z", {"data": b"{}"}, 404),
        (MESSAGES, {"method": "PUT", "data": b"{}"}, 405),
        (MESSAGES, {"data": b'{"model":"m"}' + b" " * 40 * 2**20}, 413),
        (MESSAGES, {"data": b'{"model":"m"}', "headers": {"X-Api-Key": "wrong"}}, 401),
    ],
)
async def test_what_fails_before_a_model_is_known(
    tmp_path: Path, path: str, send: dict[str, Any], status: int
) -> None:
    async with kit.stack(tmp_path, anonymous="off" if status == 401 else "on") as stack:
        await stack.scheduler.publish_keys()
        await stack.serve("m", await stack.engine(unary()))
        await kit.eventually((stack.state_dir / "keys.json").exists, "it has heard of no keys")
        method = send.pop("method", "POST")
        async with stack.session.request(method, stack.url + path, **send) as response:
            body, request_id = await response.read(), response.headers["X-Request-ID"]
            assert response.status == status
            assert_whole(path, status, body, request_id)
            assert response.headers["x-should-retry"] == "false"


async def test_a_failure_of_our_own(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    await stack.serve("m", await stack.engine(unary()))

    async def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("runtime.router.proxy.exchange.Exchange.run", broken)
    async with stack.post(MESSAGES, {"model": "m"}) as response:
        body, request_id = await response.read(), response.headers["X-Request-ID"]
        assert response.status == 500
        assert "the router failed" in assert_whole(MESSAGES, 500, body, request_id)


# ------------------------------------------------------------------------------------- held


async def begin(stack: Stack, path: str) -> Any:
    """A stream that is held: its comments have begun."""
    response = await stack.post(path, {"model": "m", "stream": True})
    assert response.status == 200
    await response.content.readuntil(b"\n\n")
    return response


async def removed(stack: Stack) -> None:
    await stack.scheduler.publish()
    await stack.scheduler.in_force()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fail", [unavailable, engines_400, anthropic_400, dying, removed])
async def test_a_held_stream_ends_with_an_event_of_its_protocol(
    stack: Stack, path: str, fail: Fail
) -> None:
    await stack.serve("m")
    response = await begin(stack, path)
    await fail(stack)
    rest = await response.content.read()
    message = assert_ended(path, rest, response.headers["X-Request-ID"], number=0)
    words: dict[Fail, str] = {
        unavailable: "it broke", engines_400: "prompt is too long", dying: "gave up",
        anthropic_400: "prompt is too long",
    }  # fmt: skip
    assert words.get(fail, "was removed") in message


@pytest.mark.parametrize("path", PATHS)
async def test_a_held_stream_of_a_route_whose_chain_fails(tmp_path: Path, path: str) -> None:
    rule = RouteRule(name="r", targets=(RouteTarget(model="a", weight=1),), fallback=("b",))
    async with kit.stack(tmp_path) as stack:
        models = (kit.model("a", hold_s=0.3), kit.model("b", refusal="it broke"))
        await stack.scheduler.publish(*models, rules=(rule,))
        await stack.scheduler.in_force()
        async with stack.post(path, {"model": "r", "stream": True}) as response:
            rest, request_id = await response.content.read(), response.headers["X-Request-ID"]
    assert "'a' was not ready" in assert_ended(path, rest, request_id, number=0)


async def test_a_failure_of_our_own_ends_a_held_stream(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stack.serve("m")

    async def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("runtime.router.proxy.exchange.Exchange._relay", broken)
    async with begun(stack, MESSAGES) as broken_off:
        await stack.serve("m", await stack.engine(unary()))
        request_id, got = await broken_off()
    assert "the router failed" in assert_ended(MESSAGES, got, request_id, number=0)


# ------------------------------------------------------------------------------------- begun


def cut_off(first: bytes) -> kit.Answer:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD + kit.chunk(first))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    return answer


@contextlib.asynccontextmanager
async def begun(stack: Stack, path: str) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Any]]]:
    """A stream of which something has come, by bytes: clients' libraries drop what they have read
    when a connection breaks. What is given waits for its end, which must not look like one, and
    returns the request's id and all that came."""
    base = urlsplit(stack.url)
    reader, writer = await asyncio.open_connection(base.hostname, base.port)
    body = b'{"model":"m","stream":true}'
    sent = {
        "Host": base.netloc, "Content-Type": "application/json", "Content-Length": len(body),
        **stack.session.headers,
    }  # fmt: skip
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    head = f"POST {base.path}{path} HTTP/1.1\r\n{lines}\r\n"
    writer.write(head.encode() + body)
    answered = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    assert " 200 " in answered[0]
    headers = dict(line.lower().split(": ", 1) for line in answered[1:] if line)
    first = await reader.read(1)

    async def broken_off() -> tuple[str, bytes]:
        rest = first
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(65536):
                rest += piece
        if "content-length" in headers:
            assert len(rest) < int(headers["content-length"])
            return headers["x-request-id"], rest
        got = b""
        while rest:
            size, rest = rest.split(b"\r\n", 1)
            assert int(size, 16), "its framing says that it is complete"
            got, rest = got + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return headers["x-request-id"], got

    try:
        yield broken_off
    finally:
        writer.close()


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_breaks_off_says_so_and_looks_complete_nowhere(
    stack: Stack, path: str
) -> None:
    engine = await stack.engine(cut_off(EVENTS[path]))
    await stack.serve("m", engine)
    async with begun(stack, path) as broken_off:
        request_id, got = await broken_off()
    message = assert_ended(path, got, request_id, number=None)
    assert "in the middle of its answer" in message
    assert len(engine.received) == 1


async def test_within_an_event_nothing_is_added(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(cut_off(b'data: {"choices":[{"del')))
    async with begun(stack, CHAT) as broken_off:
        _, got = await broken_off()
    assert got == b'data: {"choices":[{"del'


@pytest.mark.parametrize("extra", ["Content-Length: 4096", "Content-Encoding: gzip"])
async def test_nothing_is_added_to_a_body_that_is_counted_or_packed(
    stack: Stack, extra: str
) -> None:
    counted = extra.startswith("Content-Length")
    framing = extra if counted else f"{extra}\r\nTransfer-Encoding: chunked"

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n"
        writer.write(head.encode() + (b"data: 1\n\n" if counted else kit.chunk(b"data: 1\n\n")))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    await stack.serve("m", await stack.engine(answer))
    async with begun(stack, CHAT) as broken_off:
        _, got = await broken_off()
    assert got == b"data: 1\n\n"


# -------------------------------------------------------------------- an engine's core that died

CORE_DIED = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root '
    b'cause.","type":"InternalServerError","param":null,"code":500}}'
)


@pytest.mark.parametrize("streams", [False, True])
async def test_before_its_first_token_another_replica_answers(stack: Stack, streams: bool) -> None:
    dead = unary(CORE_DIED, "500 Internal Server Error")
    if streams:
        dead = sse(b"data: " + CORE_DIED + b"\n\n", b"data: [DONE]\n\n")
    await stack.serve("m", await stack.engine(dead), await stack.engine(unary()))
    for _ in range(3):
        async with stack.post(CHAT, {"model": "m", "stream": streams}) as response:
            assert (response.status, await response.read()) == (200, b'{"ok":true}')
    assert stack.engines[0].received


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_in_its_middle_the_caller_is_not_sent_to_a_stack_trace(
    stack: Stack, path: str
) -> None:
    died = b"data: " + CORE_DIED + b"\n\n"
    if path == MESSAGES:
        died = b"event: error\n" + died
    answer = sse(EVENTS[path], died, b"data: [DONE]\n\n")
    await stack.serve("m", await stack.engine(answer))
    async with begun(stack, path) as broken_off:
        request_id, got = await broken_off()
    assert "engine died at work" in assert_ended(path, got, request_id, number=None)
    assert b"stack trace" not in got


@pytest.mark.parametrize("streams", [False, True])
async def test_the_cause_is_told_once_the_scheduler_knows_it(stack: Stack, streams: bool) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        if streams:
            writer.write(kit.SSE_HEAD + kit.chunk(EVENTS[CHAT]))
            await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    engines = [await stack.engine(answer) for _ in range(3)]
    await stack.serve("m", *engines)
    why = {engine.endpoint.replica_id: "OutOfMemoryError: 2 GiB" for engine in engines}
    if streams:
        async with begun(stack, CHAT) as broken_off:
            ended = asyncio.create_task(broken_off())
            await stack.serve("m", failures=why)
            request_id, got = await ended
        message = assert_ended(CHAT, got, request_id, number=None)
    else:
        call = asyncio.create_task(failed_call(stack))
        await kit.eventually(lambda: sum(len(e.received) for e in engines) == 2, "not tried twice")
        await asyncio.sleep(0.2)  # it is given up by now
        await stack.serve("m", failures=why)
        message = await call
    assert "(OutOfMemoryError: 2 GiB)" in message


async def failed_call(stack: Stack) -> str:
    """Its message."""
    async with stack.post(CHAT, {"model": "m"}) as response:
        return str((await response.json())["error"]["message"])


# ------------------------------------------------------------------------------- coming back


async def test_what_waiting_cannot_change_is_not_tried_again(stack: Stack) -> None:
    await stack.serve("m", refusal="needs 80 GiB on one device", refusal_final=True)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.status == 503
        assert response.headers["x-should-retry"] == "false"
        assert "Retry-After" not in response.headers


async def test_what_passes_says_when(stack: Stack) -> None:
    await stack.serve("m", refusal="it did not start", retry_after_s=2.25)
    async with stack.post(CHAT, {"model": "m"}) as response:
        assert response.headers["Retry-After"] == "3"
        assert response.headers["retry-after-ms"] == "2250"
        assert "x-should-retry" not in response.headers


@pytest.mark.parametrize(
    ("header", "limit"),
    [("X-Stainless-Timeout", "1s"), ("X-Stainless-Read-Timeout", "1s"), (None, "0.9s")],
)
async def test_the_limit_that_ended_a_call_is_named(
    stack: Stack, header: str | None, limit: str
) -> None:
    await stack.serve("m", hold_s=300.0 if header else 0.9, waiting_for="a start on n1 (g0)")
    began_at = asyncio.get_running_loop().time()
    async with stack.post(
        CHAT, {"model": "m"}, headers={header: "1"} if header else {}
    ) as response:
        message = (await response.json())["error"]["message"]
    said = f"the request's header {header} says" if header else "the model's hold_s"
    assert message.startswith(f"model 'm' was not ready within {limit}, ")
    assert said in message
    assert "a start on n1 (g0)" in message
    if header:
        assert asyncio.get_running_loop().time() - began_at < 20  # not the model's 300 s
