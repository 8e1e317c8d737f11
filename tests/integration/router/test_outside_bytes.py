"""Odd and large bytes at every door of a router: each gets an answer, and none holds up another."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runtime.router.call.paths import JSON_PATHS
from runtime.router.jobs import batches as batch_work
from tests.kits import router_stack as kit
from tests.kits.router_stack import Engine, Stack, unary

MIB = 2**20
CHAT = "/v1/chat/completions"
AUDIO = "/v1/audio/transcriptions"
FORM = "multipart/form-data; boundary=XB"
DEEP = [b"[" * n + b"]" * n for n in (1_000, 100_000)]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path) as made:
        made.engine_ = await made.engine(unary())  # type: ignore[attr-defined]
        await made.serve("m", made.engine_)  # type: ignore[attr-defined]
        yield made


def engine_of(stack: Stack) -> Engine:
    return stack.engine_  # type: ignore[attr-defined]


def form(*parts: tuple[str, bytes]) -> bytes:
    """Parts by what follows `form-data; ` in their Content-Disposition, and their contents."""
    body = b"".join(
        b"--XB\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), data)
        for head, data in parts
    )
    return body + b"--XB--\r\n"


async def said(stack: Stack, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    async with stack.session.post(stack.url + path, data=body, headers=shown) as answer:
        return answer.status, (await answer.read()).decode()


@pytest.mark.parametrize(
    "path",
    [
        *sorted(JSON_PATHS),
        "/v1/systemone",
        "/invoke/m",
        "/models/m/v1/chat/completions",
        "/v1/batches",
    ],
)
async def test_a_body_nested_too_deep_is_a_400_that_names_the_depth(
    stack: Stack, path: str
) -> None:
    for deep in DEEP:
        for body in (b'{"model":"m","prompt":"x","y":%b}' % deep, b'{"model":%b}' % deep):
            status, text = await said(stack, path, body)
            assert (status, "nested too deep: at most" in text) == (400, True) or status == 413
    assert not engine_of(stack).received


@pytest.mark.parametrize("header", [b"Authorization: Bearer \xff", b"X-Api-Key: \xff",
                                    b"Authorization: Bearer sk-stoker-\xff\xfe", b"Cookie: \xff",
                                    b"X-Request-ID: \xff", b"Prefer: \xff",
                                    b"Content-Type: \xff", b"X-Stoker-Webhook: \xff"])  # fmt: skip
@pytest.mark.parametrize(
    "target",
    ["GET /v1/models", "GET /metrics", "POST " + CHAT, "POST /invoke/m", "GET /jobs/%FF",
     "GET /v1/files?after=%FF", "POST /v1/files", "GET /v1/models/%FF"],
)  # fmt: skip
async def test_bytes_that_are_no_text_in_a_header_are_never_a_500(
    stack: Stack, target: str, header: bytes
) -> None:
    reader, writer = await asyncio.open_connection(*stack.url.removeprefix("http://").split(":"))
    body = b'{"model":"m","prompt":"x"}' if target.startswith("POST") else b""
    head = f"{target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    if not header.startswith(b"Content-Type") and body:
        head += "Content-Type: application/json\r\n"
    writer.write(head.encode() + header + b"\r\n\r\n" + body)
    status = int((await reader.read()).split(b" ", 2)[1])
    writer.close()
    assert 200 <= status < 500


SIZES = [1, 64 * 1024, MIB, 30 * MIB]


def doors(size: int) -> list[tuple[str, bytes, str]]:
    """(path, body of about that size, Content-Type) of each door that takes one."""
    text = b"x" * size
    asks = {
        CHAT: b'{"model":"m","messages":[{"role":"user","content":"%b"}]}',
        "/v1/completions": b'{"model":"m","prompt":"%b"}',
        "/v1/embeddings": b'{"model":"m","input":"%b"}',
        "/v1/messages": b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"%b"}]}',
        "/v1/responses": b'{"model":"m","input":"%b"}',
        "/invoke/m": b'{"prompt":"%b"}',
        "/models/m/v1/completions": b'{"model":"x","prompt":"%b"}',
    }
    audio = form(('name="file"; filename="a.wav"', text), ('name="model"', b"m"))
    first = form(('name="model"', b"m"), ('name="file"; filename="a.wav"', text))
    upload = form(('name="purpose"', b"batch"), ('name="file"; filename="a"', text))
    return [
        *((path, body % text, "application/json") for path, body in asks.items()),
        *((AUDIO, body, FORM) for body in (audio, first)),
        ("/models/m" + AUDIO, audio, FORM),
        ("/v1/files", upload, FORM),
    ]


@pytest.mark.parametrize("size", SIZES)
async def test_each_door_takes_bodies_of_every_size(stack: Stack, size: int) -> None:
    for path, body, kind in doors(size):
        status, text = await said(stack, path, body, Content_Type=kind)
        assert status == 200, (path, size, text[:200])
    calls = [received.body for received in engine_of(stack).received]
    assert len(calls) == len(doors(size)) - 1
    assert all(len(body) >= size for body in calls)


@pytest.mark.parametrize("size", SIZES)
async def test_a_job_and_a_batch_of_every_size_are_carried_out(stack: Stack, size: int) -> None:
    prompt = "x" * size
    headers = {"Prefer": "respond-async"}
    async with stack.post("/invoke/m", {"prompt": prompt}, headers=headers) as answer:
        job = await answer.json()
        assert answer.status == 202
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": {"model": "m", "user": prompt}}
    batch = await submitted(stack, json.dumps(line).encode())
    await ended(stack, f"/jobs/{job['id']}", "completed")
    await ended(stack, f"/v1/batches/{batch}", "completed")


async def submitted(stack: Stack, data: bytes) -> str:
    """The id of a new batch."""
    body = form(('name="purpose"', b"batch"), ('name="file"; filename="a"', data))
    status, text = await said(stack, "/v1/files", body, Content_Type=FORM)
    assert status == 200, text
    asked = {"input_file_id": json.loads(text)["id"], "endpoint": CHAT, "completion_window": "24h"}
    async with stack.post("/v1/batches", asked) as answer:
        made = await answer.json()
        assert answer.status == 200, made
        return str(made["id"])


async def ended(stack: Stack, path: str, status: str) -> dict[str, Any]:
    """What is shown of a job or batch once it has that status."""
    deadline = time.monotonic() + 60
    while True:
        async with stack.session.get(stack.url + path) as answer:
            shown: dict[str, Any] = await answer.json()
        if shown["status"] == status:
            return shown
        assert time.monotonic() < deadline, shown
        await asyncio.sleep(0.05)


GOOD = json.dumps(
    {"custom_id": "1", "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}}
).encode()


async def test_a_line_nested_too_deep_fails_its_batch_and_no_other(stack: Stack) -> None:
    for deep in DEEP:
        evil = GOOD.replace(b'"messages": []', b'"messages": ' + deep)
        poisoned, good = await submitted(stack, evil), await submitted(stack, GOOD)
        shown = await ended(stack, f"/v1/batches/{poisoned}", "failed")
        assert "nested too deep" in shown["errors"]["data"][0]["message"]
        await ended(stack, f"/v1/batches/{good}", "completed")


async def test_a_batch_at_which_the_router_fails_ends_and_the_others_go_on(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a restart, which forgets how often it has failed."""
    real = vars(batch_work)["validate"]

    async def failing(store: Any, row: Any, most: int) -> None:
        if row.id == poisoned:
            raise RuntimeError("no such thing was thought of")
        await real(store, row, most)

    poisoned = ""
    monkeypatch.setattr(batch_work, "validate", failing)
    poisoned = await submitted(stack, GOOD)
    good = await submitted(stack, GOOD)
    await ended(stack, f"/v1/batches/{good}", "completed")
    await stack.ask_to_stop()
    await stack.start_router()
    second = await submitted(stack, GOOD)
    await ended(stack, f"/v1/batches/{second}", "completed")
    shown = await ended(stack, f"/v1/batches/{poisoned}", "failed")
    assert shown["errors"]["data"][0]["code"] == "internal_error"


async def test_a_call_at_which_the_router_fails_is_given_up_on(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.router.proxy.serving import Proxy

    real = Proxy.serve

    async def failing(self: Proxy, call: Any, client: Any) -> None:
        if b"poison" in call.body:
            raise RuntimeError("no such thing was thought of")
        await real(self, call, client)

    monkeypatch.setattr(Proxy, "serve", failing)
    headers = {"Prefer": "respond-async"}
    async with stack.post("/invoke/m", {"prompt": "poison"}, headers=headers) as answer:
        job = (await answer.json())["id"]
    shown = await ended(stack, f"/jobs/{job}", "failed")
    assert shown["response"]["body"]["error"]["code"] == "internal_error"
    await ended(stack, f"/v1/batches/{await submitted(stack, GOOD)}", "completed")


async def test_a_name_too_long_is_refused_wherever_it_stands(stack: Stack) -> None:
    name = "a" * 300
    for path, body in (
        (CHAT, b'{"model":"%b","messages":[]}' % (b"ab" * 15 * MIB)),
        (CHAT, b'{"model":"%b","messages":[]}' % name.encode()),
        (f"/invoke/{name}", b'{"prompt":"x"}'),
        (f"/models/{name}{CHAT}", b'{"messages":[]}'),
    ):
        status, text = await said(stack, path, body)
        assert (status, "at most 256 bytes" in text) == (400, True)
        assert len(text) < 500
    async with stack.session.get(f"{stack.url}/v1/models/{name}") as answer:
        assert answer.status == 400


async def test_many_keys_are_refused_where_they_would_be_read_one_by_one(stack: Stack) -> None:
    many = b",".join(b'"k%d":1' % i for i in range(5_000))
    for path in ("/invoke/m", "/models/m/v1/completions"):
        status, text = await said(stack, path, b'{"prompt":"x",%b}' % many)
        assert (status, "more than 4096 keys" in text) == (400, True)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", FORM])
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/embeddings", "/tokenize", "/invoke/cold", "/models/cold" + CHAT]
)
async def test_another_content_type_starts_nothing(stack: Stack, path: str, kind: str) -> None:
    await stack.serve("cold")  # no replica: a call would be held
    status, text = await said(stack, path, b'{"model":"cold"}', Content_Type=kind)
    assert (status, "Only 'application/json' is allowed" in text) == (400, True)
    assert 'llm_queue_depth{model="cold"}' not in await stack.metrics()


async def test_a_form_reaches_the_engine_with_the_model_that_was_checked(stack: Stack) -> None:
    engine = engine_of(stack)
    await stack.serve("m", engine, adapters=("m:sql", "m:secret"))
    file = ('name="file"; filename="a.wav"', b"x")
    twice = form(('name="model"', b"m:sql"), file, ('name="model"', b"m:secret"))
    status, text = await said(stack, AUDIO, twice, Content_Type=FORM)
    assert (status, "the form has 2 fields model: send one" in text) == (400, True)
    body = form(('name="model"', b"m:secret"), file)
    for path, sent in (("/models/m:sql" + AUDIO, body), ("/models/m:sql" + AUDIO, form(file))):
        status, text = await said(stack, path, sent, Content_Type=FORM)
        assert status == 200, text
        last = engine.received[-1].body
        assert (last.count(b'name="model"'), b"\r\n\r\nm:sql\r\n" in last) == (1, True)
        assert b"secret" not in last


async def test_many_odd_names_and_headers_leave_nothing_behind(stack: Stack) -> None:
    """What is kept by a caller's text is bounded in bytes."""
    from runtime.router.proxy.headers import not_sent

    names = len(not_sent)
    for number in range(20):
        long = f"x-{number}-" + "a" * 2_000
        headers = {"Content-Type": "application/json", long: "1"}
        await said(stack, CHAT, b'{"model":"m"}', **headers)
    assert len(not_sent) <= names + 8
    assert all(len(name) <= 64 for name in not_sent)


async def test_every_line_of_a_bom_file_is_read(stack: Stack) -> None:
    batch = await submitted(stack, b"\xef\xbb\xbf" + GOOD)
    await ended(stack, f"/v1/batches/{batch}", "completed")
    status, _ = await said(stack, CHAT, b'\xef\xbb\xbf{"model":"m","messages":[]}')
    assert status == 200


async def test_a_form_that_breaks_off_leaves_no_file(stack: Stack) -> None:
    body = form(('name="purpose"', b"batch"), ('name="file"; filename="a"', b"x" * 100))
    status, text = await said(stack, "/v1/files", body[:-10], Content_Type=FORM)
    assert (status, "no final boundary" in text) == (400, True)
    async with stack.session.get(stack.url + "/v1/files") as answer:
        assert (await answer.json())["data"] == []


async def test_others_are_answered_while_odd_bodies_are_read(stack: Stack) -> None:
    """30 MiB of parts, keys or brackets hold the loop for moments, of all the time they take."""
    parts = b'--XB\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 500_000
    keys = b'{"prompt":"x",%b}' % b",".join(b'"k%d":1' % i for i in range(600_000))
    odd = [(AUDIO, parts, FORM), ("/invoke/m", keys, "application/json")]
    odd += [(CHAT, b'{"model":"m","user":[%b1]}' % (b"[]," * 3 * MIB), "application/json")]
    for path, body, kind in odd:
        began = time.monotonic()
        reading = asyncio.create_task(said(stack, path, body, Content_Type=kind))
        answered = [began]
        while not reading.done():
            async with stack.session.get(stack.url + "/healthz") as answer:
                assert answer.status == 200
            answered.append(time.monotonic())
        assert (await reading)[0] in (200, 400)
        assert len(answered) > 2, "nobody was answered meanwhile"
        held_s = max(b - a for a, b in itertools.pairwise(answered))
        assert held_s < max(1.0, (answered[-1] - began) / 2), path
