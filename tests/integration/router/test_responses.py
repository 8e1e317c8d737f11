"""GET and cancel of a response: of the replica that made it, and never another tenant's."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from runtime.contract.access import KeyTable, Limits, Scope
from runtime.engine import guard
from runtime.router.control import saved_tables
from runtime.wire.routes import Endpoint, ModelRoute, RouteTable
from tests.kits import router_stack as kit
from tests.kits.router_keys import ask, key, token
from tests.kits.router_stack import Stack, eventually
from tests.kits.router_workers import workers

RESPONSES = "/v1/responses"
ASKED = {"model": "m", "input": "one two", "max_output_tokens": 2}


@pytest.fixture
async def endpoints() -> AsyncIterator[tuple[Endpoint, ...]]:
    """Two stub engines that keep responses."""
    started, found = [], []
    for name in ("replica-1", "replica-2"):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        env = {
            **os.environ, "VLLM_ENABLE_RESPONSES_API_STORE": "1", guard.ROUTE_KEY_ENV: kit.KEY,
            guard.CONTROL_KEY_ENV: "control",
        }  # fmt: skip
        options = ["--names", "m", "--args", '{"start_s": 0, "token_s": 0.01}']
        argv = [sys.executable, "-m", "runtime.engine.stub.server", "--port", str(port), *options]
        started.append(await asyncio.create_subprocess_exec(*argv, env=env))
        found.append(Endpoint(replica_id=name, base_url=f"http://127.0.0.1:{port}", key=kit.KEY))
    try:
        async with asyncio.timeout(kit.DEADLINE_S), aiohttp.ClientSession() as session:
            for endpoint in found:
                while not await _healthy(session, endpoint):
                    await asyncio.sleep(0.05)
        yield tuple(found)
    finally:
        for process in started:
            process.kill()
            await process.wait()


async def _healthy(session: aiohttp.ClientSession, endpoint: Endpoint) -> bool:
    try:
        async with session.get(endpoint.base_url + "/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


@pytest.fixture
async def stack(tmp_path: Path, endpoints: tuple[Endpoint, ...]) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path, anonymous="off") as made:
        await made.scheduler.publish(ModelRoute(name="m", endpoints=endpoints))
        await made.scheduler.in_force()
        await made.scheduler.publish_keys(
            key("acme", "acme"), key("acme2", "acme"), key("globex", "globex"),
            key("narrow", "acme", scope=Scope(endpoints=("/v1/chat/*",))),
            key("slow", "slow", limits=Limits(requests_per_min=2)),
        )  # fmt: skip
        async with asyncio.timeout(kit.DEADLINE_S):
            while (await ask(made, "acme", "GET", "/v1/models"))[0] != 200:
                await asyncio.sleep(0.02)
        yield made


async def test_a_response_is_got_from_the_replica_that_made_it(stack: Stack) -> None:
    made = [await ask(stack, "acme", "POST", RESPONSES, ASKED) for _ in range(6)]
    assert {status for status, _, _ in made} == {200}
    for _, response, _ in made:
        status, got, headers = await ask(stack, "acme2", "GET", f"{RESPONSES}/{response['id']}")
        assert (status, got) == (200, response)
        assert headers["X-Request-ID"]
    own = f"/models/m{RESPONSES}/{made[0][1]['id']}"
    assert (await ask(stack, "acme", "GET", own))[:2] == (200, made[0][1])


async def test_a_response_in_the_background_is_followed_and_cancelled(stack: Stack) -> None:
    asked = {**ASKED, "background": True, "max_output_tokens": 3000}
    _, response, _ = await ask(stack, "acme", "POST", RESPONSES, asked)
    assert response["status"] == "queued"
    where = f"{RESPONSES}/{response['id']}"
    assert (await ask(stack, "globex", "POST", where + "/cancel"))[0] == 404
    assert (await ask(stack, "acme", "GET", where))[1]["status"] == "queued"
    status, cancelled, _ = await ask(stack, "acme", "POST", where + "/cancel")
    assert (status, cancelled["status"]) == (200, "cancelled")
    assert (await ask(stack, "acme", "GET", where))[1]["status"] == "cancelled"
    status, error, _ = await ask(stack, "acme", "POST", where + "/cancel")
    assert status == 400
    assert "Cannot cancel" in error["error"]["message"]


async def test_another_tenants_response_is_as_unknown_as_none(stack: Stack) -> None:
    _, response, _ = await ask(stack, "acme", "POST", RESPONSES, ASKED)
    for name, response_id in (
        ("globex", response["id"]), ("acme", "resp_none"), ("acme", "x" * 500), ("acme", "%2e%2e"),
    ):  # fmt: skip
        for method, tail in (("GET", ""), ("POST", "/cancel")):
            status, error, headers = await ask(
                stack, name, method, f"{RESPONSES}/{response_id}{tail}"
            )
            assert status == 404
            assert error["error"]["code"] in ("response_not_found", "not_found")
            assert error["error"]["type"] == "invalid_request_error"
            assert headers["x-should-retry"] == "false"
    status, error, _ = await ask(
        stack, "globex", "POST", RESPONSES, {**ASKED, "previous_response_id": response["id"]}
    )
    assert (status, error["error"]["param"]) == (404, "previous_response_id")
    status, error, _ = await ask(
        stack, "globex", "POST", RESPONSES, {**ASKED, "request_id": response["id"]}
    )
    assert (status, error["error"]["param"]) == (400, "request_id")
    status, _, _ = await ask(stack, "acme", "GET", f"/models/other{RESPONSES}/{response['id']}")
    assert status == 404


async def test_scopes_and_limits_hold_there(stack: Stack) -> None:
    _, response, _ = await ask(stack, "acme", "POST", RESPONSES, ASKED)
    status, error, _ = await ask(stack, "narrow", "GET", f"{RESPONSES}/{response['id']}")
    assert (status, error["error"]["code"]) == (403, "not_allowed")
    _, response, _ = await ask(stack, "slow", "POST", RESPONSES, ASKED)
    where = f"{RESPONSES}/{response['id']}"
    assert (await ask(stack, "slow", "GET", where))[0] == 200
    assert (await ask(stack, "slow", "GET", where))[0] == 429
    status, error, headers = await ask(stack, "acme", "DELETE", where)
    assert (status, headers["Allow"]) == (405, "GET")


async def test_of_a_replica_that_is_gone_it_is_said(
    stack: Stack, endpoints: tuple[Endpoint, ...]
) -> None:
    _, response, _ = await ask(stack, "acme", "POST", RESPONSES, ASKED)
    await stack.scheduler.publish(ModelRoute(name="m", warmth="cold"))
    await stack.scheduler.in_force()
    status, error, _ = await ask(stack, "acme", "GET", f"{RESPONSES}/{response['id']}")
    assert status == 404
    assert "the replica of 'm' that kept it is gone" in error["error"]["message"]
    await eventually(lambda: stack.scheduler.waiting() == 0, "a start was asked for")


async def test_a_stream_of_it_passes_as_it_comes(stack: Stack) -> None:
    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        created = b'event: response.created\ndata: {"response":{"id":"resp_s"}}\n\n'
        await kit.sse(created, b"event: response.completed\ndata: {}\n\n")(received, writer)

    engine = await stack.engine(answer)
    await stack.serve("m", engine)
    assert (await ask(stack, "acme", "POST", RESPONSES, {**ASKED, "stream": True}))[0] == 200
    where = f"{RESPONSES}/resp_s?stream=true&starting_after=3"
    status, body, headers = await ask(stack, "acme", "GET", where)
    assert status == 200
    assert body.endswith(b"event: response.completed\ndata: {}\n\n")
    assert headers["Content-Type"].startswith("text/event-stream")
    assert engine.received[1].target == where


async def test_any_worker_of_a_port_finds_it(
    tmp_path: Path, endpoints: tuple[Endpoint, ...]
) -> None:
    route = ModelRoute(name="m", endpoints=endpoints)
    saved_tables.save(tmp_path / "routes.json", RouteTable(version=3, models=(route,)))

    async def call(method: str, url: str, body: Any = None) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,  # a new connection: any worker may get it
            session.request(method, url, json=body) as response,
        ):
            assert len(response.headers.getall("X-Request-ID")) == 1
            return response.status, await response.json()

    async with workers(tmp_path, 3) as (_, url):
        _, response = await call("POST", url + RESPONSES, ASKED)
        where = f"{url}{RESPONSES}/{response['id']}"
        got = [await call("GET", where) for _ in range(12)]
        assert [body for _, body in got] == [response] * 12
        assert (await call("GET", url + RESPONSES + "/resp_none"))[0] == 404
        assert (await call("POST", where + "/cancel"))[0] == 400


async def test_any_worker_of_a_port_goes_on_with_it_for_its_tenant_alone(
    tmp_path: Path, endpoints: tuple[Endpoint, ...]
) -> None:
    route = ModelRoute(name="m", endpoints=endpoints[:1])
    saved_tables.save(tmp_path / "routes.json", RouteTable(version=3, models=(route,)))
    keys = (key("acme", "acme"), key("globex", "globex"))
    saved_tables.save(tmp_path / "keys.json", KeyTable(version=1, keys=keys))

    async def call(name: str, url: str, **more: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token(name)}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,  # any worker may get it
            session.post(url + RESPONSES, json=ASKED | more) as response,
        ):
            return response.status, await response.json()

    async with workers(tmp_path, 3) as (_, url):
        _, response = await call("acme", url)
        made = response["id"]
        again = [await call("acme", url, previous_response_id=made) for _ in range(12)]
        assert [status for status, _ in again] == [200] * 12
        others = [await call("globex", url, previous_response_id=made) for _ in range(6)]
        assert {(status, body["error"]["code"]) for status, body in others} == {
            (404, "response_not_found")
        }
        taken = [await call("globex", url, request_id=made) for _ in range(6)]
        assert {status for status, _ in taken} == {400}
        async with (  # only workers are told, by their socket
            aiohttp.ClientSession() as session,
            session.get(f"{url}/internal/made?id={made}") as response,
        ):
            assert response.status == 404
