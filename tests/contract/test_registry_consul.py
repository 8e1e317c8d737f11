"""What only Consul does: outages in the middle, odd answers, access control."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

import runtime.registry.consul
from runtime.contract.config import Config, RegistryConfig
from runtime.registry.consul import ConsulRegistry
from runtime.registry.open import open_registry
from runtime.registry.protocol import Registry, RegistryError
from tests.kits.consul_server import MISSING, bootstrap_token, consul_is_installed, consul_server
from tests.kits.registry_services import service
from tests.kits.registry_waits import eventually, still_waits

needs_consul = pytest.mark.skipif(not consul_is_installed(), reason=MISSING)


@contextlib.asynccontextmanager
async def answering(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[ConsulRegistry]:
    """A registry whose "Consul" is `handler`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    registry = ConsulRegistry(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield registry
    finally:
        await registry.close()
        await runner.cleanup()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8500", "ftp://host", "http://", "http://host:port", "http://host/consul", ""]
)
def test_an_invalid_url_is_refused(url: str):
    with pytest.raises(RegistryError, match=r"registry\.consul_url: .*write it as http"):
        ConsulRegistry(url)


async def test_no_answer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime.registry.consul, "CALL_S", 0.2)

    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    async with answering(hang) as registry:
        with pytest.raises(RegistryError, match=r"cannot get a: no answer within 0\.2 s"):
            await registry.get("a")
        with pytest.raises(RegistryError, match=r"cannot list a/: no answer within"):
            await registry.list("a/", 1, wait_s=0.1)


async def test_an_answer_that_is_not_consuls_is_an_error():
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>hello</html>", content_type="text/html")

    async with answering(page) as registry:
        with pytest.raises(RegistryError, match=r"cannot get a: .*hello"):
            await registry.get("a")


async def test_reads_outlast_an_election_and_writes_are_not_repeated():
    asked: list[str] = []

    async def electing(request: web.Request) -> web.StreamResponse:
        asked.append(request.method)
        if len(asked) < 3 or request.method == "PUT":
            return web.Response(status=500, text="No cluster leader")
        return web.json_response([], headers={"X-Consul-Index": "7"})

    async with answering(electing) as registry:
        assert await registry.list("a/") == ((), 7)
        assert asked == ["GET"] * 3
        with pytest.raises(RegistryError, match="No cluster leader"):
            await registry.put("a", b"")
        assert asked == ["GET"] * 3 + ["PUT"]


@pytest.mark.parametrize("answer", ["false", "lost"])
async def test_a_lock_not_surely_ours_leaves_no_session(
    monkeypatch: pytest.MonkeyPatch, answer: str
):
    monkeypatch.setattr(runtime.registry.consul, "CALL_S", 0.2)
    asked: list[str] = []

    async def busy(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        if request.path == "/v1/session/create":
            return web.json_response({"ID": "the-session"})
        if request.path == "/v1/kv/leader" and request.method == "GET":
            return web.Response(status=404, headers={"X-Consul-Index": "7"})
        if request.path == "/v1/kv/leader" and answer == "lost":
            await asyncio.sleep(60)
        return web.json_response(request.path != "/v1/kv/leader")

    async with answering(busy) as registry:
        if answer == "lost":
            with pytest.raises(RegistryError, match="cannot lock leader: no answer"):
                await registry.acquire("leader", b"me", 10)
        else:
            assert await registry.acquire("leader", b"me", 10) is None
    assert asked[-1] == "PUT /v1/session/destroy/the-session"


@pytest.mark.consul
@needs_consul
async def test_a_server_that_dies_ends_a_wait_with_an_error():
    with consul_server() as url:
        registry = ConsulRegistry(url)
        await registry.put("a/b", b"1")
        lock = await registry.acquire("a/leader", b"me", ttl_s=10)
        assert lock is not None
        _, index = await registry.list("a/")
        waiting = asyncio.create_task(registry.list("a/", index, wait_s=60))
        assert await still_waits(waiting)
    with pytest.raises(RegistryError, match="cannot list a/"):
        await asyncio.wait_for(waiting, 20)
    with pytest.raises(RegistryError, match="cannot renew the lock a/leader"):
        await lock.renew()
    assert lock.held  # until its ttl ends: nobody else can have it sooner
    await registry.close()


@pytest.mark.consul
@needs_consul
async def test_the_token_opens_everything_and_none_opens_nothing(monkeypatch: pytest.MonkeyPatch):
    with consul_server(acl=True) as url:
        token = bootstrap_token(url)
        without = ConsulRegistry(url)
        for refused in (
            without.put("a/b", b"1"),
            without.get("a/b"),
            without.delete("a/b", version=3),
            without.register(service("name"), 10),
            without.acquire("a/leader", b"me", 10),
        ):
            with pytest.raises(RegistryError, match=r"registry\.consul_token|Permission denied"):
                await refused
        await without.close()
        monkeypatch.setenv("CONSUL_HTTP_TOKEN", "another-shells-token")
        config = Config(registry=RegistryConfig(consul_url=url, consul_token=token))
        await use_everything(open_registry(config))


async def use_everything(registry: Registry) -> None:
    assert await registry.put("a/b", b"1", version=0)
    entry = await registry.get("a/b")
    assert entry is not None
    assert (await registry.list("a/"))[0] == (entry,)
    assert await registry.delete("a/b", version=entry.version)
    await registry.register(service("name"), 60)
    assert await registry.keep_alive("name-1")

    async def found() -> bool:
        return (await registry.services("name"))[0] == (service("name"),)

    await eventually(found)
    lock = await registry.acquire("a/leader", b"me", 10)
    assert lock is not None
    assert await lock.renew()
    await lock.release()
    await registry.deregister("name-1")
    await registry.close()


@pytest.mark.consul
@needs_consul
async def test_who_may_write_is_known_without_writing():
    with consul_server() as url:
        opened = ConsulRegistry(url)
        words = await opened.open_to("stoker/leader")
        assert words is not None
        assert "its ACLs are off" in words
        assert await opened.get("stoker/leader") is None
        await opened.close()
    with consul_server(acl=True) as url:
        token = bootstrap_token(url)
        closed = ConsulRegistry(url, token)
        assert await closed.open_to("stoker/leader") is None
        await closed.close()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, "ACL support disabled", "its ACLs are off"),
        (200, '[{"Allow": true}]', "without a token"),
        (200, '[{"Allow": false}]', None),
        (200, "null", None),
        (403, "Permission denied", None),
        (404, "", None),
    ],
)
async def test_what_consul_says_of_who_may_write(status: int, body: str, words: str | None):
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.method, request.path, request.headers.get("X-Consul-Token")))
        assert "stoker/leader" in await request.text()
        return web.Response(status=status, text=body)

    async with answering(answer) as registry:
        registry._token = "our-token"
        who = await registry.open_to("stoker/leader")
        assert (who is None) if words is None else (who is not None and words in who)
    assert asked == [("POST", "/v1/internal/acl/authorize", None)], "it asks as nobody"
