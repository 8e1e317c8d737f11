"""What the router's tests stand it on: a registry, a scheduler and engines that do as told.

Run as a program it is one router without scheduler and registry, which serves by its last table:
`python -m tests.kits.router_stack STATE_DIR` prints its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from runtime import outside
from runtime.contract.access import KeyTable, RouterUsage, StoredKey, Tenant
from runtime.contract.config import Config, RouterConfig
from runtime.registry.protocol import Entry, Registry, RegistryError, Service
from runtime.router.driver import run_router
from runtime.wire.routes import DemandReport, Endpoint, ModelRoute, RouteRule, RouteTable
from scheduler.usage import Usage

TOKEN = "the-cluster-token"
# Of this test process alone: a router of one beside it may still know a port that is ours by now.
_KEYS = "engine-secret-"
KEY = _KEYS + secrets.token_hex(8)
DEADLINE_S = 20.0


async def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition()` is true; fail after a deadline."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not (value := condition()):
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)
    return value


class MemoryRegistry:
    """The parts of a registry that a router uses; `down` makes every call fail."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.registered: dict[str, Service] = {}
        self.down = False

    def _check(self) -> None:
        if self.down:
            raise RegistryError("the registry is down")

    async def get(self, key: str) -> Entry | None:
        self._check()
        value = self.values.get(key)
        return None if value is None else Entry(key=key, value=value, version=1)

    async def register(self, service: Service, ttl_s: float) -> None:
        self._check()
        self.registered[service.service_id] = service

    async def keep_alive(self, service_id: str) -> bool:
        self._check()
        return service_id in self.registered

    async def deregister(self, service_id: str) -> None:
        self._check()
        self.registered.pop(service_id, None)


class Scheduler:
    """The leader's internal routes."""

    def __init__(self) -> None:
        self.table: RouteTable | None = None
        self.keys: KeyTable | None = None
        self.usage = Usage(time.strftime("%Y-%m-%d", time.gmtime()))
        self.reports: list[DemandReport] = []
        self.polls: list[int] = []
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, registry: MemoryRegistry, term: int = 1) -> None:
        app = web.Application()
        app.router.add_get("/internal/routes", self._routes)
        app.router.add_post("/internal/demand", self._demand)
        app.router.add_get("/internal/keys", self._keys)
        app.router.add_post("/internal/usage", self._usage)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        registry.values["stoker/leader"] = msgspec.json.encode({"url": self.url, "term": term})

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def publish(
        self,
        *models: ModelRoute,
        version: int | None = None,
        rules: tuple[RouteRule, ...] = (),
        lost: tuple[str, ...] = (),
    ) -> None:
        """A new table; returns once it is there to be polled."""
        version = version or (self.table.version + 1 if self.table else 1)
        self.table = RouteTable(version=version, models=models, rules=rules, lost=lost)
        async with self._changed:
            self._changed.notify_all()

    async def publish_keys(self, *keys: StoredKey, tenants: tuple[Tenant, ...] = ()) -> None:
        """New keys; returns once they are there to be polled."""
        version = self.keys.version + 1 if self.keys else 1
        self.keys = KeyTable(version=version, keys=keys, tenants=tenants)
        async with self._changed:
            self._changed.notify_all()

    def waiting(self) -> int:
        """Requests that the last report says wait."""
        return sum(d.waiting for d in self.reports[-1].models) if self.reports else 0

    async def in_force(self) -> None:
        """Until the router has acknowledged the table published last."""
        version = self.table.version
        await eventually(
            lambda: self.reports and self.reports[-1].routes_version == version, "no ack"
        )

    async def _routes(self, request: web.Request) -> web.Response:
        self.polls.append(int(request.query["since"]))
        return await self._newer(request, lambda: self.table)

    async def _keys(self, request: web.Request) -> web.Response:
        return await self._newer(request, lambda: self.keys)

    async def _newer(self, request: web.Request, table: Callable[[], Any]) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        since = int(request.query["since"])
        try:
            async with asyncio.timeout(float(request.query["wait_s"])), self._changed:
                while table() is None or table().version == since:
                    await self._changed.wait()
        except TimeoutError:
            return web.Response(status=204)
        return web.Response(body=msgspec.json.encode(table()))

    async def _usage(self, request: web.Request) -> web.Response:
        told = outside.decode(await request.read(), RouterUsage)
        now = asyncio.get_running_loop().time()
        return web.Response(body=msgspec.json.encode(self.usage.tell(told, now)))

    async def _demand(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        self.reports.append(outside.decode(await request.read(), DemandReport))
        return web.Response(status=204)


class Received:
    """One request as an engine got it."""

    def __init__(self, target: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.target = target
        self.headers = headers
        self.body = body

    def header(self, name: str) -> str | None:
        return next((v for n, v in self.headers if n.lower() == name.lower()), None)

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


class Engine:
    """An upstream in raw bytes: `answer` writes whatever it likes to the socket."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.received: list[Received] = []
        self.hung_up = 0  # connections the router closed while a request was being answered
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.endpoint: Endpoint | None = None

    async def start(self, name: str) -> Engine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = Endpoint(replica_id=name, base_url=f"http://127.0.0.1:{port}", key=KEY)
        return self

    def kill(self) -> None:
        """As a killed process: every socket is reset, none is accepted."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while not writer.is_closing() and (received := await _read_request(reader)) is not None:
                if _is_of_another_process(received):
                    break
                self.received.append(received)
                work = asyncio.ensure_future(self.answer(received, writer))
                gone = asyncio.ensure_future(reader.read(1))
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self.hung_up += 1
                    work.cancel()
                else:
                    gone.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


def _is_of_another_process(received: Received) -> bool:
    sent = received.header("Authorization") or ""
    return sent.startswith(f"Bearer {_KEYS}") and sent != f"Bearer {KEY}"


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    lines = head.decode(errors="surrogateescape").split("\r\n")
    headers = [(n, v) for n, v in (line.split(": ", 1) for line in lines[1:] if line)]
    length = next(int(v) for n, v in headers if n.lower() == "content-length")
    body = await reader.readexactly(length)
    return Received(lines[0].split(" ")[1], headers, body)


def unary(body: bytes = b'{"ok":true}', status: str = "200 OK", extra: str = "") -> Answer:
    """An engine's plain JSON answer."""

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{extra}"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return answer


SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(*events: bytes, hold: asyncio.Event | None = None) -> Answer:
    """A stream; with `hold`, all but the first event wait for it."""

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD)
        for index, event in enumerate(events):
            if hold is not None and index == 1:
                await hold.wait()
            writer.write(chunk(event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    return answer


async def never(received: Received, writer: asyncio.StreamWriter) -> None:
    """Takes the request and says nothing."""
    await asyncio.Event().wait()


async def json_by_default(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """What is posted as plain bytes is JSON, unless the test says otherwise."""
    if request.headers.get("Content-Type") == "application/octet-stream":
        request.headers["Content-Type"] = "application/json"
    return await handler(request)


class Stack:
    """A router with its scheduler, registry and engines."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.registry = MemoryRegistry()
        self.scheduler = Scheduler()
        self.engines: list[Engine] = []
        self.session = aiohttp.ClientSession(auto_decompress=False, middlewares=(json_by_default,))
        self.url = ""
        self._stop = asyncio.Event()
        self._router: asyncio.Task[None] | None = None

    def make_calls_odd(self) -> None:
        """Every call from now on is one that the front hands over to aiohttp."""
        self.session.headers["Content-Encoding"] = "identity"

    async def start_router(self, **settings: Any) -> None:
        config = Config(
            state_dir=str(self.state_dir),
            cluster_token=TOKEN,
            router=RouterConfig(
                port=0, **{"heartbeat_s": 0.05, "drain_s": 5.0, "connect_timeout_s": 1.0} | settings
            ),
        )
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        registry = cast(Registry, self.registry)
        self._router = asyncio.create_task(
            run_router(config, registry, stop=self._stop, on_ready=ready.set_result)
        )
        both: list[asyncio.Future[Any]] = [self._router, ready]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if self._router.done():
            await self._router
        self.url = ready.result()

    def ask_to_stop(self) -> asyncio.Task[None]:
        self._stop.set()
        return self._router

    async def engine(self, answer: Answer) -> Engine:
        engine = await Engine(answer).start(f"replica-{len(self.engines)}")
        self.engines.append(engine)
        return engine

    async def serve(self, name: str, *engines: Engine, **fields: Any) -> None:
        """Publish one model served by `engines`, and wait until the router routes by it."""
        await self.scheduler.publish(model(name, *engines, **fields))
        await self.scheduler.in_force()

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return self.session.post(self.url + path, data=data, **options)

    async def metrics(self) -> str:
        async with self.session.get(self.url + "/metrics") as response:
            return await response.text()

    async def close(self) -> None:
        await self.session.close()
        for engine in self.engines:
            engine.kill()
        if self._router is not None:
            self._stop.set()
            await self._router
        await self.scheduler.stop()


def model(name: str, *engines: Engine, **fields: Any) -> ModelRoute:
    endpoints = tuple(engine.endpoint for engine in engines)
    return ModelRoute(name=name, endpoints=endpoints, **fields)


@contextlib.asynccontextmanager
async def stack(state_dir: Path, **settings: Any) -> AsyncIterator[Stack]:
    """A running router tied to a running scheduler."""
    made = Stack(state_dir)
    try:
        await made.scheduler.start(made.registry)
        await made.start_router(**settings)
        yield made
    finally:
        await made.close()


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error a call was refused with, in OpenAI's shape; it holds no key and no address."""
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert KEY not in body["error"]["message"]
    assert "127.0.0.1" not in body["error"]["message"]
    told: dict[str, Any] = body["error"]
    return told


def main() -> None:
    registry = MemoryRegistry()
    registry.down = True
    config = Config(
        state_dir=sys.argv[1], cluster_token=TOKEN, router=RouterConfig(port=0, drain_s=10.0)
    )
    uvloop.run(
        run_router(config, cast(Registry, registry), on_ready=lambda url: print(url, flush=True))
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end it by SIGTERM
    main()
