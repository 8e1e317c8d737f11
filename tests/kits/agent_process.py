"""What the agent's tests stand on: an agent process, a scheduler that listens, and deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from agent.engines import process
from agent.engines.process import Cgroups, Owner
from runtime import outside
from runtime.contract.config import AgentConfig, Config, SchedulerConfig
from runtime.registry.protocol import Registry
from runtime.wire.agent_messages import (
    CommandReply,
    Heartbeat,
    HeartbeatReply,
    StartReplica,
    StopReplica,
)
from runtime.wire.model_spec import ModelSpec
from tests.kits.checkout import ROOT

DEADLINE_S = 60.0  # far more than a calm machine needs: a busy one shall not fail a test
TOKEN = "the-cluster-token"
SCRAPER = "a-scrapers-token"
NODE = "test-node"
DEVICE = f"simulated:{NODE}:0"
RUN_AGENT = "tests.kits.run_agent"


async def until(condition, what: str, deadline_s: float = DEADLINE_S):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s for {what}"
        await asyncio.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    return process.start_ticks(pid) is not None


def make_config(folder: Path, **agent) -> Config:
    known: dict[str, Any] = {
        "node_id": NODE,
        "port": 0,
        "devices": "simulated:2x24GiB",
        "heartbeat_s": 0.2,
    }
    return Config(
        state_dir=str(folder / "state"),
        cluster_token=TOKEN,
        metrics_token=SCRAPER,
        agent=AgentConfig(**(known | agent)),
        scheduler=SchedulerConfig(drain_grace_s=20.0),
    )


def processes(config: Config) -> dict[str, set[int]]:
    """Every live engine process of that agent, by replica."""
    return process.scan(Owner(config.node_id(), config.state_dir), {})


def cgroups(config: Config) -> Cgroups:
    try:
        return Cgroups.open(Owner(config.node_id(), config.state_dir))
    except OSError:
        return Cgroups(None)


def kill_all(config: Config) -> None:
    while found := processes(config):
        for pid in set().union(*found.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    left = cgroups(config)
    for replica_id in left.replica_ids():
        left.remove(replica_id)
    left.close()


def spec(engine="stub", source="anything", **engine_args) -> ModelSpec:
    return ModelSpec(
        name="m", source=source, engine=engine, engine_args=engine_args, device_memory_bytes=2**30
    )


def start(replica_id="m-1", epoch=1, devices=(DEVICE,), model=None) -> StartReplica:
    model = model or spec(start_s=0.0)
    return StartReplica(
        replica_id=replica_id,
        epoch=epoch,
        spec=model,
        device_ids=devices,
        device_bytes=model.booked_bytes(),
        reason="a test wants it",
    )


def stop(replica_id="m-1", epoch=1, grace_s=20.0) -> StopReplica:
    return StopReplica(replica_id=replica_id, epoch=epoch, grace_s=grace_s, reason="a test is done")


class FakeScheduler:
    """Takes heartbeats; answers as leader with `term`, or refuses while `refusing`."""

    def __init__(self) -> None:
        self.heartbeats: list[Heartbeat] = []
        self.term = 1
        self.refusing = False
        self.adapters: dict[str, dict[str, str]] = {}  # model -> adapter -> source
        self.url = ""
        app = web.Application()
        app.add_routes([web.post("/internal/heartbeat", self._heartbeat)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def _heartbeat(self, request):
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        heartbeat = outside.decode(await request.read(), Heartbeat)
        if self.refusing:
            return web.json_response({"error": {"message": "not the leader"}}, status=503)
        self.heartbeats.append(heartbeat)
        reply = HeartbeatReply(term=self.term, adapters=self.adapters)
        return web.Response(body=msgspec.json.encode(reply), content_type="application/json")

    async def open(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def lead(self, registry: Registry) -> None:
        value = msgspec.json.encode({"url": self.url, "term": self.term})
        assert await registry.put("stoker/leader", value)

    def report(self, replica_id="m-1"):
        """The replica in the latest heartbeat, or None."""
        if not self.heartbeats:
            return None
        return {r.replica_id: r for r in self.heartbeats[-1].replicas}.get(replica_id)

    def phases(self, replica_id="m-1") -> list[str]:
        """Every phase that was told, in order, without repeats."""
        told: list[str] = []
        for heartbeat in self.heartbeats:
            for replica in heartbeat.replicas:
                if replica.replica_id == replica_id and told[-1:] != [replica.phase]:
                    told.append(replica.phase)
        return told

    async def phase(self, phase: str | None, replica_id="m-1"):
        """Waits until the replica is told to be in that phase (None: is told no more)."""

        def reached():
            report = self.report(replica_id)
            return self.heartbeats and (report.phase if report else None) == phase

        what = f"{replica_id} to be {phase}, told were {self.phases(replica_id)}"
        await until(reached, what)
        return self.report(replica_id)


class AgentProcess:
    """One run of the agent as a process."""

    def __init__(self, config: Config, folder: Path, env: dict[str, str] | None = None) -> None:
        self.config = config
        file = folder / "config.json"
        file.write_bytes(msgspec.json.encode(config))
        self.log = (folder / "agent.log").open("ab")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", RUN_AGENT, str(file)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "STOKER_CLUSTER_TOKEN": TOKEN, **(env or {})},
            cwd=ROOT,
        )
        self.url = ""

    async def ready(self) -> AgentProcess:
        line = await asyncio.to_thread(self.popen.stdout.readline)
        assert line, "the agent died while starting"
        self.url = line.decode().strip()
        return self

    async def kill(self, number=signal.SIGKILL) -> int:
        self.popen.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        await until(lambda: self.popen.poll() is not None, "the agent to end")
        return self.popen.returncode

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()
        self.log.close()


class Client:
    """Talks to an agent as the scheduler does, and to engines as a router does."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def send(self, agent_url: str, command, token=TOKEN) -> tuple[int, Any]:
        """Status, and the reply; the bytes of an answer that is not one."""
        body = command if isinstance(command, bytes) else msgspec.json.encode(command)
        async with self.session.post(
            f"{agent_url}/agent/commands", data=body, headers=bearer(token)
        ) as reply:
            text = await reply.read()
        known = reply.status in (200, 409)
        return reply.status, outside.decode(text, CommandReply) if known else text

    async def ok(self, agent_url: str, command) -> CommandReply:
        status, reply = await self.send(agent_url, command)
        assert (status, reply.error) == (200, None)
        return reply

    async def complete(self, report, max_tokens=2) -> int:
        """The tokens of one completion by that replica."""
        body = {"model": "m", "prompt": "one two three", "max_tokens": max_tokens}
        async with self.session.post(
            f"{report.base_url}/v1/completions", json=body, headers=bearer(report.key)
        ) as reply:
            assert reply.status == 200, await reply.text()
            return (await reply.json())["usage"]["completion_tokens"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
