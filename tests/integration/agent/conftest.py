"""What the agent's tests share: agents as processes, a registry, and a scheduler that listens."""

from __future__ import annotations

import aiohttp
import pytest

from runtime.registry.embedded import EmbeddedRegistry
from tests.kits.agent_process import AgentProcess, Client, FakeScheduler, kill_all, make_config


@pytest.fixture
async def client():
    async with aiohttp.ClientSession() as session:
        yield Client(session)


@pytest.fixture
async def registry(tmp_path):
    registry = EmbeddedRegistry(make_config(tmp_path).registry_file())
    (tmp_path / "state").mkdir()
    yield registry
    await registry.close()


@pytest.fixture
async def scheduler(registry):
    scheduler = FakeScheduler()
    await scheduler.open()
    await scheduler.lead(registry)
    yield scheduler
    await scheduler.close()


@pytest.fixture
def agent_env() -> dict[str, str]:
    """What a folder's or a file's agents have in their environment; override it there."""
    return {}


@pytest.fixture
async def launch(tmp_path, scheduler, agent_env):
    """Starts agents on one state_dir; in the end no process of theirs is left."""
    agents: list[AgentProcess] = []

    async def launch(env=None, **settings) -> AgentProcess:
        config, given = make_config(tmp_path, **settings), {**agent_env, **(env or {})}
        agents.append(AgentProcess(config, tmp_path, given))
        return await agents[-1].ready()

    yield launch
    for one in agents:
        one.close()
    kill_all(make_config(tmp_path))
    print((tmp_path / "agent.log").read_text())
