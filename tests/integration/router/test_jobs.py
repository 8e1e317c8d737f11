"""Jobs: calls of /invoke that are answered later, and the webhooks that tell of their end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.resolver import ThreadedResolver
from openai import AsyncOpenAI

from runtime.contract.schema import SchemaError
from runtime.router.call.request import Caller
from runtime.router.front.api import RouterApi
from runtime.router.jobs import webhooks
from runtime.router.jobs.webhooks import PublicResolver
from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, eventually, never, unary

LATER = {"Prefer": "respond-async"}
MASTER = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(MASTER).decode()
KEY = hmac.digest(MASTER, b"stoker-webhook-v1\0anonymous", "sha256")  # callers have no API key
TENANT_SECRET = "whsec_" + base64.b64encode(KEY).decode()
PRIVATE = {"webhook_secret": SECRET, "webhook_private": True}


async def submit(stack: Stack, model: str = "m", **headers: str) -> dict[str, Any]:
    async with stack.post(f"/invoke/{model}", {"prompt": "x"}, headers=LATER | headers) as response:
        made = await response.json()
        assert response.status == 202, made
        assert response.headers["Location"] == f"/jobs/{made['id']}"
        assert response.headers["Preference-Applied"] == "respond-async"
    return made


async def look(stack: Stack, job: dict[str, Any]) -> dict[str, Any]:
    async with stack.session.get(f"{stack.url}/jobs/{job['id']}") as response:
        assert response.status == 200
        return await response.json()


async def until(stack: Stack, job: dict[str, Any], *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(kit.DEADLINE_S):
        while (job := await look(stack, job))["status"] not in statuses:
            await asyncio.sleep(0.02)
    return job


async def status_and_error(call: Any) -> tuple[int, str, str]:
    async with call as response:
        error = (await response.json())["error"]
        return response.status, error["code"], error["message"]


# ------------------------------------------------------------------------------------- jobs


async def test_a_job_for_a_cold_model_has_its_answer_later(stack: Stack) -> None:
    await stack.serve("m", warmth="cold")
    job = await submit(stack)
    assert (job["object"], job["status"], job["model"]) == ("job", "queued", "m")
    await eventually(lambda: stack.scheduler.waiting() == 1, "no demand for the cold model")
    assert (await until(stack, job, "running"))["response"] is None
    engine = await stack.engine(unary(b'{"text": 1.0}', "201 Created"))
    await stack.serve("m", engine)
    job = await until(stack, job, "completed")
    assert job["response"] == {"status_code": 201, "body": {"text": 1.0}}
    assert job["created_at"] <= job["started_at"] <= job["ended_at"] < job["expires_at"]
    (received,) = engine.received
    assert received.target == "/v1/completions"
    assert received.json() == {"prompt": "x", "model": "m", "stream": False}
    assert received.header("X-Request-ID") == job["id"]
    metrics = await stack.metrics()
    assert 'stoker_router_jobs_total{status="completed"} 1.0' in metrics


async def test_an_engines_refusal_of_the_request_is_the_answer(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary(b'{"error":1}', "422 Unprocessable Entity")))
    job = await until(stack, await submit(stack), "failed")
    assert job["response"] == {"status_code": 422, "body": {"error": 1}}


async def test_a_model_that_cannot_be_served_now_is_tried_again(stack: Stack) -> None:
    await stack.serve("m", refusal="needs 80 GiB", retry_after_s=0.1)
    job = await submit(stack)
    async with asyncio.timeout(kit.DEADLINE_S):
        while not (await look(stack, job))["waits_for"]:
            await asyncio.sleep(0.02)
    waiting = await look(stack, job)
    assert waiting["status"] == "queued"
    assert "needs 80 GiB" in waiting["waits_for"]
    await stack.serve("m", await stack.engine(unary()))
    assert (await until(stack, job, "completed"))["waits_for"] is None


async def test_a_job_outlives_its_router(stack: Stack) -> None:
    engine = await stack.engine(never)
    await stack.serve("m", engine)
    job = await submit(stack)
    await eventually(lambda: engine.received, "not sent")
    await stack.ask_to_stop()
    engine.answer = unary()
    await stack.start_router()
    assert (await until(stack, job, "completed"))["response"]["body"] == {"ok": True}
    assert len(engine.received) == 2


async def test_delete_cancels_and_then_forgets(stack: Stack) -> None:
    engine = await stack.engine(never)
    await stack.serve("m", engine)
    job = await submit(stack)
    await eventually(lambda: engine.received, "not sent")
    url = f"{stack.url}/jobs/{job['id']}"
    async with stack.session.delete(url) as response:
        assert (await response.json())["status"] == "cancelled"
    await eventually(lambda: engine.hung_up == 1, "the engine still works on it")
    assert (await look(stack, job))["response"] is None
    async with stack.session.delete(url) as response:
        assert await response.json() == {"id": job["id"], "object": "job", "deleted": True}
    status, code, _ = await status_and_error(stack.session.get(url))
    assert (status, code) == (404, "not_found")


async def test_another_tenants_job_is_not_found(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouterApi, "_identify", lambda _, r: Caller(r.headers.get("X-Tenant", "a")))
    await stack.serve("m", await stack.engine(unary()))
    job = await until(stack, await submit(stack), "completed")
    url, other = f"{stack.url}/jobs/{job['id']}", {"X-Tenant": "b"}
    for call in (
        stack.session.get(url, headers=other),
        stack.session.delete(url, headers=other),
    ):
        assert (await status_and_error(call))[0] == 404
    assert (await look(stack, job))["status"] == "completed"


@pytest.mark.parametrize(
    ("prefer", "later"),
    [
        ("respond-async, wait=10", True),
        ("wait=10,Respond-Async", True),
        ("respond-asynchronous", False),
        ("return=minimal", False),
    ],
)
async def test_only_the_preference_itself_counts(stack: Stack, prefer: str, later: bool) -> None:
    await stack.serve("m", await stack.engine(unary()))
    async with stack.post("/invoke/m", {"prompt": "x"}, headers={"Prefer": prefer}) as response:
        assert response.status == (202 if later else 200)


async def test_an_unknown_model_is_refused_at_once(stack: Stack) -> None:
    await stack.serve("m")
    status, code, _ = await status_and_error(
        stack.post("/invoke/x", {"prompt": "x"}, headers=LATER)
    )
    assert (status, code) == (404, "model_not_found")


# ------------------------------------------------------------------------------------- webhooks


class Receiver:
    """Somebody's server; `answers` are the statuses it gives, the last forever."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    async def _answer(self, request: web.Request) -> web.Response:
        self.got.append((request.path, dict(request.headers), await request.read()))
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Receiver]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        try:
            yield self
        finally:
            await runner.cleanup()


def assert_signed(headers: dict[str, str], body: bytes) -> None:
    """As the specification says, computed here; and as OpenAI's client has it."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(KEY, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    verifier = openai.OpenAI(api_key="x", webhook_secret=TENANT_SECRET)
    verifier.webhooks.verify_signature(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        verifier.webhooks.verify_signature(body + b" ", headers)


async def test_a_jobs_webhook_is_signed_and_sent_until_it_is_taken(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, **PRIVATE) as stack, Receiver(500, 302, 204).running() as hook:
        await stack.serve("m", await stack.engine(unary()))
        job = await submit(stack, **{"X-Stoker-Webhook": hook.url})
        await eventually(lambda: len(hook.got) == 3, "not sent again")
        assert {path for path, _, _ in hook.got} == {"/hook"}  # no redirect was followed
        assert len({headers["webhook-id"] for _, headers, _ in hook.got}) == 1
        for _, headers, body in hook.got:
            assert_signed(headers, body)
        told = json.loads(body)
        assert (told["type"], told["data"]["id"]) == ("job.completed", job["id"])
        assert told["data"]["status"] == "completed"

        async def counted() -> bool:
            metrics = await stack.metrics()
            return 'webhooks_total{status="delivered"} 1.0' in metrics and SECRET not in metrics

        async with asyncio.timeout(kit.DEADLINE_S):
            while not await counted():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.6)  # longer than it takes to look for more to send
        assert len(hook.got) == 3


async def test_a_webhook_that_was_not_taken_outlives_its_router(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, **PRIVATE) as stack, Receiver(500).running() as hook:
        await stack.serve("m", await stack.engine(unary()))
        await submit(stack, **{"X-Stoker-Webhook": hook.url})
        await eventually(lambda: hook.got, "not sent")
        await stack.ask_to_stop()
        before, hook.answers = len(hook.got), [200]
        await stack.start_router(**PRIVATE)
        await eventually(lambda: len(hook.got) == before + 1, "not sent again")
        assert hook.got[0][1]["webhook-id"] == hook.got[-1][1]["webhook-id"]


async def test_a_batchs_webhook(tmp_path: Path) -> None:
    line = {
        "custom_id": "a", "method": "POST", "url": "/v1/embeddings",
        "body": {"model": "m", "input": "x"},
    }  # fmt: skip
    async with (
        kit.stack(tmp_path, **PRIVATE) as stack,
        Receiver(200).running() as hook,
        AsyncOpenAI(base_url=stack.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        await stack.serve("m", await stack.engine(unary()))
        file = await client.files.create(file=("a", json.dumps(line).encode()), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h",
            metadata={"webhook": hook.url},
        )  # fmt: skip
        await eventually(lambda: hook.got, "not sent")
        _, headers, body = hook.got[0]
        assert_signed(headers, body)
        event: Any = client.webhooks.unwrap(body, headers, secret=TENANT_SECRET)
        assert (event.type, event.data.id) == ("batch.completed", batch.id)
        told = json.loads(body)["data"]
        assert (await client.files.content(told["output_file_id"])).text.count("\n") == 1


async def test_webhooks_that_cannot_be_are_refused(tmp_path: Path) -> None:
    async def refused(stack: Stack, url: str, headers: dict[str, str] = LATER) -> str:
        call = stack.post(
            "/invoke/m", {"prompt": "x"}, headers={"X-Stoker-Webhook": url, **headers}
        )
        status, code, message = await status_and_error(call)
        assert (status, code) == (400, "invalid_webhook")
        return message

    async with kit.stack(tmp_path / "1") as stack:
        await stack.serve("m")
        assert "router.webhook_secret" in await refused(stack, "https://hooks.example.com/")
    async with kit.stack(tmp_path / "2", webhook_secret=SECRET) as stack:
        await stack.serve("m")
        assert "https://" in await refused(stack, "http://hooks.example.com/")
        assert "webhook_private" in await refused(stack, "https://127.0.0.1:9/")
        assert "webhook_private" in await refused(stack, "https://[::ffff:10.0.0.1]/")
        message = await refused(stack, "https://hooks.example.com/", {})
        assert "Prefer: respond-async" in message


async def test_a_name_that_leads_into_the_own_network_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL itself looks harmless; only what it resolves to does not."""
    monkeypatch.setattr(webhooks, "ATTEMPTS", 1)
    real = ThreadedResolver.resolve

    async def rebound(self: Any, host: str, *more: Any) -> Any:
        return await real(self, "localhost" if host == "hooks.example.com" else host, *more)

    monkeypatch.setattr(ThreadedResolver, "resolve", rebound)
    with pytest.raises(OSError, match="no public address"):
        await PublicResolver().resolve("hooks.example.com", 443)
    connected = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, kit.stack(tmp_path, webhook_secret=SECRET) as stack:
        await stack.serve("m", await stack.engine(unary()))
        await submit(stack, **{"X-Stoker-Webhook": f"https://hooks.example.com:{port}/"})
        async with asyncio.timeout(kit.DEADLINE_S):
            while 'webhooks_total{status="given_up"} 1.0' not in await stack.metrics():
                await asyncio.sleep(0.02)
    assert connected == 0


async def test_a_bad_secret_ends_the_router_without_being_shown(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"router\.webhook_secret") as caught:
        async with kit.stack(tmp_path, webhook_secret="not-base64-at-all"):
            pass
    assert "not-base64" not in str(caught.value)
