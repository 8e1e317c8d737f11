"""The router's HTTP surface as strangers use it: paths, methods, versions, heads, browsers."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kits import router_stack as kit
from tests.kits.router_keys import token
from tests.kits.router_stack import Stack, unary

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHAT = "/v1/chat/completions"
PAGE = "https://chat.example.com"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    log = str(tmp_path / "access.log")
    async with kit.stack(tmp_path, access_log=log, cors_origins=(PAGE,)) as made:
        yield made


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool

    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def raw(stack: Stack, data: bytes, wait_s: float = 5.0, cut: int = 2**20) -> Answer:
    """What comes back for these bytes, up to the first answer's end by its framing."""
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for at in range(0, len(data), cut):
            writer.write(data[at : at + cut])
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(wait_s):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            if "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
            else:
                body = await reader.read()
        try:
            async with asyncio.timeout(0.2):
                closed = await reader.read(1) == b""
        except TimeoutError:
            closed = False
        return Answer(int(lines[0].split()[1]), headers, body, closed)
    finally:
        writer.close()


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    fields = [line, "Host: localhost", *headers]
    if body:
        fields += [f"Content-Length: {len(body)}"]
        if not any(h.lower().startswith("content-type") for h in headers):
            fields += ["Content-Type: application/json"]
    return ("\r\n".join(fields) + "\r\n\r\n").encode("latin-1") + body


BODY = b'{"model":"m"}'


# ------------------------------------------------------------------------- before any handler


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("GET /healthz HTTP/2.0"), 505),
        (request(f"POST {CHAT} HTTP/2.0", body=BODY), 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (request("FOO / HTTP/1.1"), 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (request("GET /" + "a" * 20_000 + " HTTP/1.1"), 431),
        (request("GET /healthz HTTP/1.1", "Cookie: " + "a" * 20_000), 431),
        (request("GET /healthz HTTP/1.1", *(f"X-{n}: y" for n in range(300))), 431),
        (request(f"POST {CHAT} HTTP/1.1", "Content-Encoding: br", body=BODY), 415),
        (request(f"POST {CHAT} HTTP/1.1", "Expect: miracles", body=BODY), 417),
        (request("GET /v1/models/\xff HTTP/1.1"), 400),
        (request(f"POST {CHAT} HTTP/1.1", "Content-Length: x"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100, 400),
    ],
)
async def test_what_fails_before_a_handler_is_answered_as_any_other_failure(
    stack: Stack, tmp_path: Path, data: bytes, status: int
) -> None:
    await stack.serve("m", await stack.engine(unary()))
    answer = await raw(stack, data)
    assert answer.status == status
    assert answer.error().keys() == {"message", "type", "param", "code"}
    assert "install" not in answer.error()["message"]
    assert answer.closed
    log = tmp_path / "access.log"
    request_id = answer.headers["x-request-id"]
    await kit.eventually(lambda: request_id in log.read_text(), "not in the access log")
    assert not stack.engines[0].received


@pytest.mark.parametrize(
    "header", ["Cookie: " + "a" * 9_000, "\r\n".join(f"X-{n}: y" for n in range(200))]
)
async def test_large_cookies_and_many_headers_are_served(stack: Stack, header: str) -> None:
    await stack.serve("m", await stack.engine(unary()))
    for body in (BODY, b""):
        line = f"POST {CHAT} HTTP/1.1" if body else "GET /v1/models HTTP/1.1"
        assert (await raw(stack, request(line, header, body=body))).status == 200


@pytest.mark.parametrize("fields", [20, 12])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("cut", [3_000, 1_000_000])
async def test_a_head_is_bounded_as_a_whole(
    stack: Stack, tmp_path: Path, fields: int, ends: bool, cut: int
) -> None:
    """Each of its lines may be there, and all come in one piece or in many."""
    await stack.serve("m", await stack.engine(unary()))
    lines = (f"X-{n}: {'y' * 8000}" for n in range(fields))
    data = request("GET /healthz HTTP/1.1", f"Origin: {PAGE}", *lines)
    answer = await raw(stack, data if ends else data[:-2], cut=cut)
    assert (answer.status, answer.error()["code"]) == (431, "head_too_large")
    assert "65536 bytes" in answer.error()["message"]
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["connection"] == "close"
    log = tmp_path / "access.log"
    request_id = answer.headers["x-request-id"]
    await kit.eventually(lambda: request_id in log.read_text(), "not in the access log")


async def test_a_head_that_is_as_large_as_it_may_be_is_served(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    lines = [f"X-{n}: {'y' * 8000}" for n in range(7)]
    for body in (BODY, b'{"model":"m","x":"' + b"x" * 200_000 + b'"}'):
        data = request(f"POST {CHAT} HTTP/1.1", *lines, body=body)
        assert (await raw(stack, data)).status == 200


@pytest.mark.parametrize(("name", "pack"), [("zstd", zstd.compress), ("gzip", gzip.compress)])
async def test_compressed_bodies_are_read(stack: Stack, name: str, pack: Any) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    packed = pack(BODY)
    answer = await raw(
        stack, request(f"POST {CHAT} HTTP/1.1", f"Content-Encoding: {name}", body=packed)
    )
    assert (answer.status, engine.received[0].body) == (200, BODY)
    damaged = request(
        f"POST {CHAT} HTTP/1.1", f"Content-Encoding: {name}", body=packed[: len(packed) // 2]
    )
    assert (await raw(stack, damaged)).status == 400


# ------------------------------------------------------------------------------------ slow ones


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/mo",
        b"POST /v1/completions HTTP/1.1\r\nX: %b\r\nY: %b\r\n" % (b"a" * 7000, b"a" * 7000),
    ],
)
async def test_who_does_not_say_what_he_wants_is_closed(tmp_path: Path, data: bytes) -> None:
    async with kit.stack(tmp_path, read_timeout_s=0.5) as stack:
        await stack.serve("m", await stack.engine(unary()))
        host, port = stack.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(data)
        async with asyncio.timeout(20):
            await reader.read()  # until it is closed
        writer.close()


async def test_silent_sockets_do_not_keep_callers_out(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, max_connections=10) as stack:
        await stack.serve("m", await stack.engine(unary()))
        host, port = stack.url.removeprefix("http://").split(":")
        silent = [await asyncio.open_connection(host, port) for _ in range(10)]
        for _ in range(3):
            answer = await raw(stack, request(f"POST {CHAT} HTTP/1.1", body=BODY))
            assert answer.status == 200, answer.body
        for _, writer in silent:
            writer.close()


# ------------------------------------------------------------------------------ paths and methods


async def test_what_vllm_offers_beside_v1(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    for line in ("GET /health", "GET /ping", "POST /ping"):
        answer = await raw(stack, request(f"{line} HTTP/1.1"))
        assert (answer.status, answer.body) == (200, b"")
    version = await raw(stack, request("GET /version HTTP/1.1"))
    assert json.loads(version.body)["version"]
    load = await raw(stack, request("GET /load HTTP/1.1"))
    assert json.loads(load.body) == {"server_load": 0}
    for path in ("/invocations", "/generative_scoring", "/inference/v1/generate"):
        answer = await raw(stack, request(f"POST {path} HTTP/1.1", body=BODY))
        assert (answer.status, stack.engines[0].received[-1].target) == (200, path)


async def test_a_mistyped_path_is_refused_before_it_is_held(stack: Stack) -> None:
    await stack.serve("m")  # cold
    for path in ("/v1/chat/completion", "/v1/chat", "/models/m/v1/chat/completion", "/v2/chat"):
        answer = await raw(stack, request(f"POST {path} HTTP/1.1", body=BODY))
        assert (answer.status, answer.error()["code"]) == (404, "not_found")
    assert stack.scheduler.waiting() == 0


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        (f"GET {CHAT}", {"POST"}),
        ("DELETE /v1/models", {"GET", "HEAD"}),
        ("PUT /models/m/v1/completions", {"POST"}),
        ("OPTIONS /v1/completions", {"POST"}),
        ("POST /healthz", {"GET", "HEAD"}),
    ],
)
async def test_405_says_what_is_allowed(stack: Stack, line: str, allowed: set[str]) -> None:
    await stack.serve("m", await stack.engine(unary()))
    answer = await raw(stack, request(f"{line} HTTP/1.1"))
    assert answer.status == 405
    assert set(answer.headers["allow"].upper().split(",")) == allowed


async def test_a_slash_at_the_end_makes_no_difference(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    for line in ("POST /v1/chat/completions/", "POST /models/m/v1/completions/?x=/"):
        assert (await raw(stack, request(f"{line} HTTP/1.1", body=BODY))).status == 200
    for line in ("GET /v1/models/", "GET /v1/models/m/", "GET /healthz/"):
        assert (await raw(stack, request(f"{line} HTTP/1.1"))).status == 200
    targets = [received.target for received in stack.engines[0].received]
    assert targets == [CHAT, "/v1/completions?x=/"]


async def test_a_body_without_a_model_means_the_only_one(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.serve("m", engine, aliases=("org/m",))
    bodies = (b'{"messages":[]}', b'{"model":null,"messages":[]}', b'{"model" : null}')
    for body in bodies:
        answer = await raw(stack, request(f"POST {CHAT} HTTP/1.1", body=body))
        assert (answer.status, engine.received[-1].json()["model"]) == (200, "m")
    await stack.scheduler.publish(kit.model("m", engine), kit.model("n", engine))
    await stack.scheduler.in_force()
    for body in bodies:
        answer = await raw(stack, request(f"POST {CHAT} HTTP/1.1", body=body))
        assert (answer.status, answer.error()["param"]) == (400, "model")
        assert answer.error()["message"] == "the body has no model; add it"


# ------------------------------------------------------------------------------- streams, versions


async def test_a_stream_to_http_1_0_ends_with_its_connection(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(kit.sse(b"data: 1\n\n", b"data: [DONE]\n\n")))
    body = b'{"model":"m","stream":true}'
    for keep in ((), ("Connection: keep-alive",)):
        answer = await raw(stack, request(f"POST {CHAT} HTTP/1.0", *keep, body=body))
        assert answer.body == b"data: 1\n\ndata: [DONE]\n\n"
        assert answer.closed
        assert answer.headers.get("connection") != "keep-alive"


@pytest.mark.parametrize("odd", [(), (f"Origin: {PAGE}",)])
async def test_proxies_are_told_not_to_buffer_streams(stack: Stack, odd: tuple[str, ...]) -> None:
    body = b'{"model":"m","stream":true}'
    await stack.serve("m", await stack.engine(kit.sse(b"data: 1\n\n")))
    warm = await raw(stack, request(f"POST {CHAT} HTTP/1.1", "Connection: close", *odd, body=body))
    await stack.serve("m", refusal="no room", refusal_final=True)
    await stack.serve("c")  # cold
    call = asyncio.create_task(
        raw(stack, request(f"POST {CHAT} HTTP/1.1", "Connection: close", *odd,
                           body=b'{"model":"c","stream":true}'))
    )  # fmt: skip
    await kit.eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    await stack.serve("c", await stack.engine(kit.sse(b"data: 1\n\n")))
    for answer in (warm, await call):
        assert answer.headers["x-accel-buffering"] == "no"


# --------------------------------------------------------------------------------------- browsers


async def test_pages_of_a_listed_origin_may_call(stack: Stack) -> None:
    engine = await stack.engine(
        unary(extra="Access-Control-Allow-Origin: *\r\n", body=b'{"ok":true}')
    )
    await stack.serve("m", engine)
    asked = ("Access-Control-Request-Method: POST",
             "Access-Control-Request-Headers: authorization, content-type")  # fmt: skip
    async with stack.session.options(
        stack.url + CHAT, headers={"Origin": PAGE, **dict(line.split(": ") for line in asked)}
    ) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
        assert response.headers["Access-Control-Allow-Methods"] == "POST"
    stream = b'{"model":"m","stream":true}'
    for path, body in ((CHAT, BODY), (CHAT, stream), (CHAT, b"nonsense"), ("/v1/nonsense", BODY)):
        for origin, allowed in ((PAGE, PAGE), ("https://evil.example.com", None)):
            data = request(f"POST {path} HTTP/1.1", f"Origin: {origin}", body=body)
            answer = await raw(stack, data)
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert "origin" in answer.headers["vary"]
    plain = await raw(stack, request(f"POST {CHAT} HTTP/1.1", body=BODY))
    assert "access-control-allow-origin" not in plain.headers, "the engine's word is not ours"


@pytest.mark.parametrize(
    ("line", "field", "status"),
    [
        (f"POST {CHAT} HTTP/1.1", f"X-Api-Key: {token('nobody')}", 401),
        (
            f"POST {CHAT} HTTP/1.1",
            "Content-Type: application/json\r\nContent-Length: 99999999999",
            413,
        ),
        (f"POST {CHAT} HTTP/1.1", "Content-Encoding: br", 415),
        (f"POST {CHAT} HTTP/1.1", "Content-Type: text/plain", 400),
        (f"POST {CHAT} HTTP/1.1", "Expect: miracles", 417),
        (f"POST {CHAT} HTTP/2.0", "X: y", 505),
        ("GET /v1/models HTTP/1.1", "Cookie: " + "a" * 20_000, 431),
        ("GET /nothing HTTP/1.1", "X: y", 404),
        (f"DELETE {CHAT} HTTP/1.1", "X: y", 405),
        ("GET /v1/models/\xff HTTP/1.1", "X: y", 400),
    ],
)
async def test_a_page_can_read_why_it_failed_before_a_handler(
    stack: Stack, line: str, field: str, status: int
) -> None:
    await stack.scheduler.publish_keys()
    await stack.serve("m", await stack.engine(unary()))
    unknown = request("GET /v1/models HTTP/1.1", f"X-Api-Key: {token('nobody')}")
    async with asyncio.timeout(kit.DEADLINE_S):  # until the table of keys is in force
        while (await raw(stack, unknown)).status != 401:
            await asyncio.sleep(0.05)
    body = BODY if line.startswith("POST") and "Length" not in field else b""
    for origin, allowed in ((PAGE, PAGE), ("https://evil.example.com", None)):
        answer = await raw(stack, request(line, f"origin:{origin}", field, body=body))
        assert answer.status == status or (allowed is None and answer.status == 403)
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert "origin" in answer.headers["vary"]
        if allowed:
            assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_a_large_body_that_was_handed_over_is_no_head(stack: Stack) -> None:
    """Its last piece comes when the body is nearly whole: it must not be counted as a head."""
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    body = b'{"model":"m","x":"%b"}' % (b"x" * 3_000_000)
    data = request(f"POST {CHAT} HTTP/1.1", "Accept: */*", body=body)
    assert (await raw(stack, data, 20.0)).status == 200
    assert engine.received[0].body == body
