"""Commands to agents: in order, each answered once, and none by who leads no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.agent_messages import CommandReply, Heartbeat, StopReplica
from scheduler.state import messages as m
from tests.kits.scheduler_http import read_command
from tests.kits.scheduler_parts import Scheduler

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@dataclass
class Agent:
    """Answers a command once it may."""

    url: str = ""
    heard: list[str] = field(default_factory=list)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 200

    async def command(self, request: web.Request) -> web.Response:
        command = read_command(await request.read())
        assert isinstance(command, StopReplica)
        self.heard.append(command.replica_id)
        await self.may_answer.wait()
        reply = CommandReply(ok=True, boot_id=3, seq=len(self.heard))
        return web.Response(body=msgspec.json.encode(reply), status=self.status)


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    fake = Agent()
    app = web.Application()
    app.router.add_post("/agent/commands", fake.command)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    fake.may_answer.set()
    await runner.cleanup()


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Scheduler]:
    registry = EmbeddedRegistry(tmp_path / "registry.db")
    made = Scheduler(registry, "http://a")
    yield made
    await made.close()
    await registry.close()


def reported(one: Scheduler, node_id: str, address: str) -> None:
    one.driver.leads = True
    heartbeat = Heartbeat(
        node_id=node_id, boot_id=1, seq=1, address=address, devices=(), replicas=()
    )
    one.driver.apply(m.HeartbeatSeen(now=one.driver.now(), heartbeat=heartbeat))


def stop(replica_id: str) -> StopReplica:
    return StopReplica(replica_id=replica_id, epoch=1, grace_s=0, reason="")


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_commands_to_one_node_go_one_after_the_other(one, agent) -> None:
    reported(one, "n1", agent.url)
    done: list[m.CommandDone] = []
    for replica_id in ("r-1", "r-2"):
        one.agents.send("n1", stop(replica_id), done.append)
    await until(lambda: agent.heard)
    await asyncio.sleep(0.1)
    assert (agent.heard, done) == (["r-1"], [])
    agent.may_answer.set()
    await until(lambda: len(done) == 2)
    assert agent.heard == ["r-1", "r-2"]
    assert [(d.replica_id, d.kind, d.delivered, d.ok, d.boot_id, d.seq) for d in done] == [
        ("r-1", "stop", True, True, 3, 1), ("r-2", "stop", True, True, 3, 2),
    ]  # fmt: skip


async def test_a_node_that_does_not_answer_keeps_no_other_waiting(one, agent) -> None:
    reported(one, "n1", agent.url)
    reported(one, "n2", NOBODY)
    done: list[m.CommandDone] = []
    one.agents.send("n1", stop("r-1"), done.append)
    one.agents.send("n2", stop("r-2"), done.append)
    one.agents.send("n3", stop("r-3"), done.append)
    await until(lambda: len(done) == 2)
    errors = {d.replica_id: d.error for d in done}
    assert {d.delivered for d in done} == {False}
    assert errors["r-3"] == "node n3 has not reported an address"
    assert "Cannot connect" in (errors["r-2"] or "")


async def test_an_answer_with_an_error_status_was_not_delivered(one, agent) -> None:
    reported(one, "n1", agent.url)
    agent.status = 409
    agent.may_answer.set()
    done: list[m.CommandDone] = []
    one.agents.send("n1", stop("r-1"), done.append)
    await until(lambda: done)
    assert not done[0].delivered
    assert (done[0].error or "").startswith("HTTP 409: ")


async def test_who_stands_by_sends_nothing_that_waited(one, agent, monkeypatch) -> None:
    reported(one, "n1", agent.url)
    applied: list[m.Event] = []

    def noted(event: m.Event) -> list[m.Command]:
        applied.append(event)
        return []

    monkeypatch.setattr(one.driver.core, "handle", noted)
    for replica_id in ("r-1", "r-2"):
        one.driver._execute(m.Send(node_id="n1", command=stop(replica_id)))
    await until(lambda: agent.heard)
    one.driver.stand_by()
    agent.may_answer.set()
    done: list[m.CommandDone] = []
    one.agents.send("n1", stop("r-3"), done.append)  # of a later term
    await until(lambda: done)
    assert agent.heard == ["r-1", "r-3"]
    assert applied == [], "what came of the first is the next leader's to find out"
