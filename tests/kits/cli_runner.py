"""A fake scheduler and router behind one real socket, and the CLI run against them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web
from click.testing import CliRunner, Result

from runtime.wire.agent_messages import DeviceReport
from runtime.wire.model_spec import ModelSpec
from scheduler.admin import views

TOKEN = "the-right-token-0"
GIB = 2**30

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeServer:
    """Answers with what `replies` has for "METHOD /path"; notes what it was asked."""

    url: str = ""
    replies: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, bytes]] = field(default_factory=list)

    def bodies(self, call: str) -> list[bytes]:
        """What was sent with each `call`, e.g. "POST /admin/models"."""
        return [body for seen, body in self.asked if seen == call]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = f"{request.method} {request.rel_url.raw_path}"
        self.asked.append((f"{call}?{request.query_string}".rstrip("?"), await request.read()))
        admin = request.path.startswith("/admin")
        if admin and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return json_reply(error("who are you?"), 401)
        reply = self.replies.get(call)
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        if reply is None:
            return json_reply(error(f"nothing at {call}"), 404)
        if callable(reply):
            return await reply(request)
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        return json_reply(body, status)


def json_reply(body: Any, status: int = 200) -> web.Response:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return web.Response(body=data, status=status, content_type="application/json")


def error(message: str, **more: Any) -> views.Error:
    return views.Error(error=views.ErrorBody(message=message, **more))


def sse(*lines: str) -> Handler:
    """A stream of these lines."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in lines:
            await response.write(f"{line}\n\n".encode())
        return response

    return reply


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A FakeServer on a free port, in a thread of its own."""
    fake, loop, up = FakeServer(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", fake.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        up.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert up.wait(10)
        yield fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def stoker(fake: FakeServer | None, *args: str, env: dict[str, str | None] | None = None) -> Result:
    """Run `stoker ARGS` against the fake, as the user's shell would; nothing is inherited."""
    from cli.main import stoker as command

    where = ("--admin", fake.url, "--router", fake.url) if fake else ()
    clean = {
        "STOKER_CONFIG": None,
        "STOKER_STATE_DIR": "/nonexistent",
        "STOKER_CLUSTER_TOKEN": TOKEN if fake else None,
        "STOKER_TOKEN_FILE": None,
    }
    return CliRunner().invoke(command, [*where, *args], env=clean | (env or {}))


# ------------------------------------------------------------------------------ samples

SPEC = ModelSpec(name="m", source="/models/m", device_memory_bytes=12 * GIB, aliases=("org/m",))


def model(**more: Any) -> views.ModelView:
    facts: dict[str, Any] = {
        "name": "m",
        "spec": SPEC,
        "warmth": "cold",
        "device_memory_bytes": 12 * GIB,
        "memory_from": "declared",
    }
    return views.ModelView(**facts | more)


def replica(**more: Any) -> views.ReplicaView:
    facts: dict[str, Any] = {
        "replica_id": "m-1-1",
        "model": "m",
        "node_id": "gpu-1",
        "device_ids": ("GPU-aa", "GPU-bb"),
        "device_bytes": 6 * GIB,
        "state": "ready",
        "since_s": 190.0,
        "idle_for_s": 4.2,
        "engine": "vllm",
    }
    return views.ReplicaView(**facts | more)


def node(**more: Any) -> views.NodeView:
    facts: dict[str, Any] = {
        "node_id": "gpu-1",
        "address": "http://10.0.0.5:8082",
        "state": "ready",
        "last_heartbeat_s": 0.4,
        "devices": 2,
        "replicas": 1,
        "memory_total_bytes": 160 * GIB,
        "memory_booked_bytes": 12 * GIB,
        "host_memory_total_bytes": 512 * GIB,
        "host_memory_available_bytes": 500 * GIB,
        "host_budget_bytes": 256 * GIB,
        "host_booked_bytes": 3 * GIB,
        "engines": {"vllm": "0.32.0"},
        "labels": {},
        "version": "0.1.0",
    }
    return views.NodeView(**facts | more)


def device(**more: Any) -> views.DeviceView:
    report = DeviceReport(
        device_id="GPU-aa",
        index=0,
        kind="nvml",
        name="H200",
        memory_total_bytes=80 * GIB,
        memory_used_bytes=7 * GIB,
        utilization=0.25,
        temperature_c=41.0,
    )
    facts: dict[str, Any] = {
        "node_id": "gpu-1",
        "report": report,
        "booked_bytes": 6 * GIB,
        "free_bytes": 74 * GIB,
        "replicas": ("m-1-1",),
    }
    return views.DeviceView(**facts | more)
