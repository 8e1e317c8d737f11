"""What the scheduler's tests stand on: a scheduler over HTTP, its client, and a fake agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from runtime import outside
from runtime.contract.config import Config, RegistryConfig, SchedulerConfig
from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.agent_messages import (
    AgentCommand,
    CommandReply,
    DeviceReport,
    Heartbeat,
    Inspection,
    ReplicaReport,
    SleepReplica,
    StartReplica,
    StopReplica,
    WakeReplica,
)
from runtime.wire.routes import DemandReport, ModelDemand, RouteTable
from scheduler.main import run_scheduler

TOKEN = "secret-token"
SCRAPER = "a-scrapers-token"
GIB = 2**30

read_command: Callable[[bytes], AgentCommand] = outside.reader(AgentCommand, "a command")


@dataclass
class Agent:
    """Obeys at once and reports when told to."""

    url: str = ""
    seq: int = 0
    replicas: dict[str, StartReplica] = field(default_factory=dict)
    refuse: str | None = None
    epoch: int = 0
    inspection: Inspection = field(default_factory=Inspection)
    asked: list[str] = field(default_factory=list)  # but for commands

    async def commands(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        command = read_command(await request.read())
        if isinstance(command, StartReplica) and self.refuse is None:
            self.replicas[command.replica_id] = command
        elif isinstance(command, StopReplica | SleepReplica | WakeReplica):
            self.replicas.pop(command.replica_id, None)
        reply = CommandReply(ok=self.refuse is None, boot_id=1, seq=self.seq + 1, error=self.refuse)
        return web.Response(body=msgspec.json.encode(reply))

    async def inspect(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(body=msgspec.json.encode(self.inspection))

    async def other(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(status=404)

    async def logs(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        if request.match_info["id"] == "gone-1-1":
            return web.Response(status=404)
        return web.Response(text=f"log of {request.match_info['id']} tail={request.query['tail']}")

    def heartbeat(self) -> Heartbeat:
        self.seq += 1
        device = DeviceReport(
            device_id="g0", index=0, kind="simulated", name="x",
            memory_total_bytes=24 * GIB, memory_used_bytes=0,
        )  # fmt: skip
        replicas = tuple(
            ReplicaReport(
                replica_id=c.replica_id, epoch=c.epoch, model=c.spec.name,
                launch_key=c.spec.launch_key(), device_ids=c.device_ids,
                device_bytes=c.device_bytes, phase="ready", phase_age_s=0.0,
                base_url="http://127.0.0.1:9", key="k",
            )
            for c in self.replicas.values()
        )  # fmt: skip
        return Heartbeat(
            node_id="n1", boot_id=1, seq=self.seq, address=self.url, devices=(device,),
            replicas=replicas, engines={"stub": "1"}, epoch=self.epoch,
        )  # fmt: skip


class Client:
    """The admin API with the token."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def __call__(
        self, method: str, path: str, body: object = None, token: str = TOKEN
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body) if body else None
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(
            method, self.url + path, data=data, headers=headers
        ) as response:
            raw = await response.read()
            is_json = raw[:1] in (b"{", b"[")
            return response.status, msgspec.json.decode(raw) if is_json else raw.decode()

    async def beat(self, agent: Agent) -> None:
        status, _ = await self(
            "POST", "/internal/heartbeat", msgspec.json.encode(agent.heartbeat())
        )
        assert status == 200

    async def demand(self, seq: int, **waiting: int) -> None:
        report = DemandReport(
            router_id="r", boot_id=1, seq=seq, routes_version=2**60,
            models=tuple(ModelDemand(model=n, waiting=c) for n, c in waiting.items()),
        )  # fmt: skip
        status, _ = await self("POST", "/internal/demand", msgspec.json.encode(report))
        assert status == 204

    async def table(self, since: int = 0, wait_s: float = 0) -> RouteTable | None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{self.url}/internal/routes?since={since}&wait_s={wait_s}"
        async with self.session.get(url, headers=headers) as response:
            raw = await response.read()
            return outside.decode(raw, RouteTable) if response.status == 200 else None


async def until(condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    deadline = asyncio.get_running_loop().time() + limit_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never: {what}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def scheduler(tmp_path, registry: EmbeddedRegistry) -> AsyncIterator[str]:
    config = Config(
        state_dir=str(tmp_path), cluster_token=TOKEN, metrics_token=SCRAPER,
        scheduler=SchedulerConfig(port=0, min_dwell_s=0.0),
        registry=RegistryConfig(file=str(tmp_path / "registry.db")),
    )  # fmt: skip
    stop, ready = asyncio.Event(), asyncio.Event()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    task = asyncio.create_task(run_scheduler(config, registry, stop=stop, on_ready=on_ready))
    await asyncio.wait_for(ready.wait(), 10)
    try:
        yield urls[0]
    finally:
        stop.set()
        await task


async def leading(client: Client, agent: Agent | None = None, limit_s: float = 60.0) -> None:
    """Until that scheduler leads and knows its nodes, of which `agent` is one."""
    deadline = asyncio.get_running_loop().time() + limit_s
    while (answer := await client("GET", "/readyz"))[0] != 200:
        assert asyncio.get_running_loop().time() < deadline, f"never ready: {answer[1]}"
        if agent is not None and answer[1]["leader"]:
            await client.beat(agent)
        await asyncio.sleep(0.05)


A = {"name": "a", "source": "/m", "engine": "stub", "device_memory_bytes": "10GiB"}
