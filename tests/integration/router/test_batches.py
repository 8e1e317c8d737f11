"""Files and batches with OpenAI's own client: what goes in, what comes out, what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from runtime.router.admission.fairness import BACKGROUND
from runtime.router.call.request import Caller
from runtime.router.control import saved_tables
from runtime.router.front.api import RouterApi
from runtime.router.jobs import service
from runtime.router.jobs.handlers import batches
from runtime.router.jobs.store import file_rows
from runtime.router.jobs.store.rows import FileRow
from runtime.router.proxy.serving import Proxy
from runtime.wire.routes import RouteTable
from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT
from tests.kits.router_stack import Engine, Received, Stack, eventually

CHAT: Final = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")


@contextlib.asynccontextmanager
async def client_of(url: str, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=url + "/v1", api_key="sk-client", max_retries=0, timeout=20, **options
    ) as made:
        yield made


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(stack.url) as made:
        yield made


def line(number: int, model: str = "m", **body: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"{number}"}], **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}


def jsonl(*lines: object) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


async def submit(client: AsyncOpenAI, data: bytes, **fields: Any) -> Batch:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(
        **{
            "input_file_id": file.id,
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        | fields
    )


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(kit.DEADLINE_S):
        while batch.status not in ENDED:
            await asyncio.sleep(0.02)
            with contextlib.suppress(openai.APIConnectionError):
                batch = await client.batches.retrieve(batch.id)
    return batch


async def lines_of(client: AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    """custom_id -> result; each custom_id once."""
    if file_id is None:
        return {}
    results = [json.loads(each) for each in (await client.files.content(file_id)).text.splitlines()]
    assert all(count == 1 for count in Counter(r["custom_id"] for r in results).values())
    return {result["custom_id"]: result for result in results}


async def echo(received: Received, writer: asyncio.StreamWriter) -> None:
    """The engine says what it was asked; a body with `refuse` is a bad request to it."""
    asked = received.json()
    if "refuse" in asked:
        await kit.unary(b'{"error":{"message":"no"}}', "400 Bad Request")(received, writer)
        return
    said = asked["messages"][0]["content"]
    await kit.unary(json.dumps({"said": said}).encode())(received, writer)


async def test_a_batch_from_its_file_to_its_results(stack: Stack, client: AsyncOpenAI) -> None:
    engine = await stack.engine(echo)
    await stack.serve("m", engine)
    data = jsonl(*map(line, range(40)), line(40, "gone"), line(41, refuse=1))
    batch = await submit(client, data, metadata={"team": "a"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"team": "a"})
    batch = await ended(client, batch)
    assert (batch.status, batch.errors) == ("completed", None)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (42, 40, 2)
    stamps = [
        batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at,
        batch.expires_at,
    ]  # fmt: skip
    assert stamps == sorted(stamps)
    good = await lines_of(client, batch.output_file_id)
    assert {name: r["response"]["body"] for name, r in good.items()} == {
        f"c{number}": {"said": f"{number}"} for number in range(40)
    }
    bad = await lines_of(client, batch.error_file_id)
    assert bad["c40"]["response"] is None
    assert bad["c40"]["error"]["code"] == "model_not_found"
    assert bad["c41"]["response"]["status_code"] == 400
    assert bad["c41"]["response"]["body"] == {"error": {"message": "no"}}
    assert len(engine.received) == 41
    assert all("sk-client" not in str(each.headers) for each in engine.received)
    metrics = await stack.metrics()
    assert 'stoker_router_batch_lines_total{status="completed"} 40.0' in metrics
    assert 'stoker_router_batch_lines_total{status="failed"} 2.0' in metrics


async def test_lines_are_background_and_no_more_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers, flying, most = [], 0, 0
    serve = Proxy.serve

    async def noting(self: Proxy, call: Any, client: Any) -> None:
        nonlocal flying, most
        callers.append(call.caller)
        flying += 1
        most = max(most, flying)
        try:
            await asyncio.sleep(0.01)
            await serve(self, call, client)
        finally:
            flying -= 1

    monkeypatch.setattr(Proxy, "serve", noting)
    async with kit.stack(tmp_path, batch_concurrency=3) as stack, client_of(stack.url) as client:
        await stack.serve("m", await stack.engine(echo))
        batch = await ended(client, await submit(client, jsonl(*map(line, range(30)))))
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 30
    assert {caller.priority for caller in callers} == {BACKGROUND}
    assert most == 3


async def test_a_bad_file_fails_its_batch_with_the_lines_named(
    stack: Stack, client: AsyncOpenAI
) -> None:
    engine = await stack.engine(echo)
    await stack.serve("m", engine)
    other = {**line(3), "url": "/v1/completions"}
    data = jsonl(line(1)) + b"\nnot json\n" + jsonl(other, line(1), {**line(5), "custom_id": None})
    batch = await ended(client, await submit(client, data))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or ()] == [
        (3, "invalid_json_line"),
        (4, "invalid_url"),
        (5, "duplicate_custom_id"),
        (6, "missing_required_parameter"),
    ]
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert engine.received == []


async def test_a_busy_engine_costs_no_line(stack: Stack, client: AsyncOpenAI) -> None:
    refusals = 3

    async def busy(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            answer = kit.unary(b"{}", "503 Service Unavailable", "Retry-After: 1\r\n")
            await answer(received, writer)
        else:
            await echo(received, writer)

    await stack.serve("m", await stack.engine(busy))
    batch = await ended(client, await submit(client, jsonl(*map(line, range(5)))))
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 5
    assert 'batch_lines_total{status="put_back"} 3.0' in await stack.metrics()


async def test_a_line_that_never_gets_an_answer_is_given_up_and_the_others_are_not(
    stack: Stack, client: AsyncOpenAI
) -> None:
    async def dies(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.json()["messages"][0]["content"] == "1":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")  # and no more
            await writer.drain()
            writer.close()
            return
        await echo(received, writer)

    await stack.serve("m", await stack.engine(dies))
    batch = await ended(client, await submit(client, jsonl(*map(line, range(4)))))
    assert set(await lines_of(client, batch.output_file_id)) == {"c0", "c2", "c3"}
    errors = await lines_of(client, batch.error_file_id)
    assert errors["c1"]["error"]["code"] == "replica_failed"


async def test_a_cold_model_is_waited_for(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m", warmth="cold")
    batch = await submit(client, jsonl(line(1), line(2)))
    await eventually(lambda: stack.scheduler.waiting() == 1, "no demand for the cold model")
    assert (await client.batches.retrieve(batch.id)).status == "in_progress"
    await stack.serve("m", await stack.engine(echo))
    batch = await ended(client, batch)
    assert set(await lines_of(client, batch.output_file_id)) == {"c1", "c2"}


async def test_cancel_keeps_what_was_answered_and_names_the_rest(
    stack: Stack, client: AsyncOpenAI
) -> None:
    async def some(received: Received, writer: asyncio.StreamWriter) -> None:
        answer = echo if received.json()["messages"][0]["content"] in "01" else kit.never
        await answer(received, writer)

    engine = await stack.engine(some)
    await stack.serve("m", engine)
    batch = await submit(client, jsonl(*map(line, range(9))))
    await eventually(lambda: len(engine.received) > 2, "nothing under way")
    with pytest.raises(openai.ConflictError, match="cancel the batch first"):
        await client.files.delete(batch.input_file_id)
    cancelled = await client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    batch = await ended(client, cancelled)
    assert batch.status == "cancelled"
    await eventually(lambda: engine.hung_up > 0, "the engine still works on it")
    good = await lines_of(client, batch.output_file_id)
    bad = await lines_of(client, batch.error_file_id)
    assert set(good) == {"c0", "c1"}
    assert set(bad) == {f"c{number}" for number in range(2, 9)}
    assert {result["error"]["code"] for result in bad.values()} == {"batch_cancelled"}
    assert (await client.batches.cancel(batch.id)).status == "cancelled"
    await client.files.delete(batch.input_file_id)


async def test_pages_of_files_and_batches(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m", await stack.engine(echo))
    made = [await submit(client, jsonl(line(number))) for number in range(5)]
    for batch in made:
        await ended(client, batch)
    page = await client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == [made[4].id, made[3].id]
    assert page.has_more
    assert [b.id async for b in client.batches.list(limit=2)] == [b.id for b in reversed(made)]
    inputs = [b.input_file_id for b in made]
    assert [f.id async for f in client.files.list(purpose="batch", order="asc", limit=2)] == inputs
    assert len([f async for f in client.files.list(purpose="batch_output")]) == 5
    file = await client.files.retrieve(inputs[0])
    assert (file.bytes, file.filename) == (len(jsonl(line(0))), "in.jsonl")
    assert (await client.files.content(inputs[0])).content == jsonl(line(0))
    url = f"{stack.url}/v1/files/{inputs[0]}"
    async with stack.session.head(url) as response:
        assert response.status == 200
    async with stack.session.head(f"{url}/content") as response:  # it must not send a body
        assert response.status == 405
    assert (await client.files.delete(inputs[0])).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(inputs[0])
    with pytest.raises(openai.BadRequestError, match="limit must be a number from 1 to 100"):
        await client.batches.list(limit=101)


async def test_another_tenants_things_are_not_found(
    stack: Stack, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterApi, "_identify", lambda _, r: Caller(r.headers.get("X-Tenant", "a")))
    await stack.serve("m", await stack.engine(echo))
    batch = await ended(client, await submit(client, jsonl(line(1))))
    async with client_of(stack.url, default_headers={"X-Tenant": "b"}) as other:
        for call in (
            other.files.retrieve(batch.input_file_id),
            other.files.content(batch.output_file_id),
            other.files.delete(batch.input_file_id),
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            other.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert (await other.batches.list()).data == []
        assert (await other.files.list()).data == []


async def test_what_cannot_be_is_refused_at_once(stack: Stack, client: AsyncOpenAI) -> None:
    file = await client.files.create(file=("in.jsonl", b"x\n"), purpose="batch")

    async def refused(match: str, **fields: Any) -> None:
        wanted = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | fields
        with pytest.raises(openai.BadRequestError, match=match):
            await client.batches.create(**wanted)

    await refused("endpoint must be one of", endpoint="/v1/moderations")
    await refused("completion_window", completion_window="1h")
    await refused("metadata", metadata={"k": "x" * 513})
    await refused("router.webhook_secret", metadata={"webhook": "https://x.example"})
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id="file-0", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
        await client.files.create(file=("in.jsonl", b"x"), purpose="fine-tune")
    async with stack.session.post(stack.url + "/v1/files", json={}) as response:
        assert response.status == 400
    assert [f.id async for f in client.files.list()] == [file.id]


async def test_limits_of_a_file_and_of_the_store(tmp_path: Path) -> None:
    settings = {
        "batch_file_max_bytes": 300_000, "store_max_bytes": 500_000, "store_tenant_share": 1.0,
    }  # fmt: skip
    async with kit.stack(tmp_path, **settings) as stack, client_of(stack.url) as client:
        with pytest.raises(openai.APIStatusError, match=r"router\.batch_file_max_bytes") as large:
            await client.files.create(file=("a", b"x" * 300_001), purpose="batch")
        assert large.value.status_code == 413
        file = await client.files.create(file=("a", b"x" * 300_000), purpose="batch")
        with pytest.raises(openai.APIStatusError, match=r"router\.store_max_bytes") as full:
            await client.files.create(file=("b", b"x" * 300_000), purpose="batch")
        assert full.value.status_code == 507
        await client.files.delete(file.id)
        await client.files.create(file=("b", b"x" * 300_000), purpose="batch")


async def test_an_upload_that_breaks_off_leaves_nothing(stack: Stack, client: AsyncOpenAI) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * 3_000_000
        raise ConnectionError

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        async with stack.session.post(stack.url + "/v1/files", data=broken(), headers=headers):
            pass
    assert (await client.files.list()).data == []

    def empty() -> bool:
        with contextlib.closing(sqlite3.connect(stack.state_dir / "jobs.db")) as db:
            return db.execute("SELECT count(*) FROM chunks").fetchone() == (0,)

    await eventually(empty, "a part of it is left")


async def test_a_file_that_is_deleted_while_it_is_read_does_not_look_whole(
    stack: Stack, client: AsyncOpenAI
) -> None:
    file = await client.files.create(file=("a", b"x" * 24_000_000), purpose="batch")
    async with stack.session.get(f"{stack.url}/v1/files/{file.id}/content") as response:
        assert await response.content.read(1)
        await client.files.delete(file.id)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_file_that_is_deleted_before_its_first_byte_is_read_is_not_found(
    stack: Stack, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemathesis' two workers did: the answer began, and broke off."""
    file = await client.files.create(file=("a", b"x" * 8), purpose="batch")

    def deleted_meanwhile(
        db: sqlite3.Connection, row: FileRow, position: int
    ) -> tuple[bytes, int | None]:
        db.execute("DELETE FROM chunks")
        return content(db, row, position)

    content = file_rows.content
    monkeypatch.setattr(file_rows, "content", deleted_meanwhile)
    with pytest.raises(openai.NotFoundError, match=file.id):
        await client.files.content(file.id)


async def test_a_batch_that_takes_too_long_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WINDOW_S", 1.0)
    async with kit.stack(tmp_path) as stack, client_of(stack.url) as client:
        await stack.serve("m")  # cold, and nobody starts it
        batch = await ended(client, await submit(client, jsonl(line(1), line(2))))
        assert batch.status == "expired"
        assert batch.expired_at is not None
        errors = await lines_of(client, batch.error_file_id)
        assert {r["error"]["code"] for r in errors.values()} == {"batch_expired"}
        assert set(errors) == {"c1", "c2"}
        await eventually(lambda: stack.scheduler.waiting() == 0, "it still asks for the model")


async def test_what_is_kept_long_enough_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SWEEP_S", 0.2)
    async with kit.stack(tmp_path, results_keep_s=5.0) as stack, client_of(stack.url) as client:
        await stack.serve("m", await stack.engine(echo))
        batch = await ended(client, await submit(client, jsonl(line(1))))
        output = await client.files.retrieve(batch.output_file_id)
        assert output.expires_at is not None
        assert output.expires_at - output.created_at in (5, 6)
        async with asyncio.timeout(kit.DEADLINE_S):
            while (await client.files.list()).data or (await client.batches.list()).data:
                await asyncio.sleep(0.05)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(output.id)


# ------------------------------------------------------------------------------------- processes


@contextlib.asynccontextmanager
async def router_process(state_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A router as a process of its own; it is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", kit.__name__, str(state_dir), stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            url = (await process.stdout.readline()).decode().strip()
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("successor", ["restart", "sibling"])
async def test_kill_9_in_the_middle_loses_nothing_and_doubles_nothing(
    tmp_path: Path, successor: str
) -> None:
    """The next process of the host, started after it or running beside it, goes on."""

    async def slow(received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await echo(received, writer)

    engine = await Engine(slow).start("replica")
    saved_tables.save(
        tmp_path / "routes.json", RouteTable(version=3, models=(kit.model("m", engine),))
    )
    async with contextlib.AsyncExitStack() as exits:
        first, url = await exits.enter_async_context(router_process(tmp_path))
        if successor == "sibling":
            _, next_url = await exits.enter_async_context(router_process(tmp_path))
        taken_in_by = url if successor == "restart" else next_url
        client = await exits.enter_async_context(client_of(taken_in_by))
        batch = await submit(client, jsonl(*map(line, range(400))))
        await eventually(lambda: len(engine.received) > 100, "nothing under way")
        first.kill()
        await first.wait()
        if successor == "restart":
            _, next_url = await exits.enter_async_context(router_process(tmp_path))
        client = await exits.enter_async_context(client_of(next_url))
        before = (await client.batches.retrieve(batch.id)).request_counts
        assert before is not None
        assert before.completed > 50
        batch = await ended(client, batch)
        results = await lines_of(client, batch.output_file_id)
        assert {name: r["response"]["body"] for name, r in results.items()} == {
            f"c{number}": {"said": f"{number}"} for number in range(400)
        }
        assert batch.error_file_id is None
        # Only what was under way when it died was asked for again.
        assert 400 <= len(engine.received) <= 408
    engine.kill()
