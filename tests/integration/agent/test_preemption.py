"""A machine that is taken away says so: in a file, or by a metadata server that really answers."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from aiohttp import web

from agent.devices import preemption
from agent.devices.preemption import Preemption, read_notice
from runtime.contract.config import AgentConfig
from tests.kits.agent_process import until

NOW = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "left_s"),
    [
        ("", 30.0),
        ("TRUE\n", 30.0),
        ("FALSE", None),
        ("90", 90.0),
        ('{"action": "terminate", "time": "2026-11-25T02:02:00Z"}', 120.0),
        ('{"action": "stop", "time": "2026-11-25T01:00:00Z"}', 0.0),
        ('{"action": "hibernate"}', 30.0),
    ],
)
def test_what_a_notice_says(text, left_s):
    assert read_notice(text, 30.0, NOW) == left_s


class Metadata:
    """A cloud's metadata service: its state is (status, text)."""

    def __init__(self) -> None:
        self.answer = (404, "")
        self.hangs = False
        app = web.Application()
        app.add_routes([web.get("/spot", self._spot)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.url = ""

    async def _spot(self, request):
        if self.hangs:
            await asyncio.sleep(60)
        return web.Response(status=self.answer[0], text=self.answer[1])

    async def __aenter__(self):
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/spot"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()


@contextlib.asynccontextmanager
async def watching(monkeypatch, **settings):
    """(the notices of a machine that is looked at often, how often it told of a change)"""
    monkeypatch.setattr(preemption, "_POLL_S", 0.02)
    told: list[int] = []
    async with aiohttp.ClientSession() as session:
        one = Preemption(AgentConfig(**settings), session, lambda: told.append(1))
        running = asyncio.create_task(one.run())
        try:
            yield one, told
        finally:
            running.cancel()
            await asyncio.wait([running])


async def test_a_url_that_answers_is_a_notice_that_counts_down(monkeypatch):
    async with (
        Metadata() as cloud,
        watching(monkeypatch, preemption_url=cloud.url) as (one, told),
    ):
        assert one.preemptible
        assert one.left_s() is None
        end = datetime.now(UTC) + timedelta(seconds=60)
        cloud.answer = (200, f'{{"action": "terminate", "time": "{end.isoformat()}"}}')
        first = await until(one.left_s, "the notice to be heard")
        assert 50 < first <= 60
        await until(lambda: one.left_s() < first, "it to count down")
        assert told == [1]
        cloud.answer = (404, "")
        await until(lambda: one.left_s() is None, "the notice to be taken back")
        assert told == [1, 1]


async def test_a_notice_without_a_time_does_not_begin_again_when_it_is_heard_again(monkeypatch):
    async with (
        Metadata() as cloud,
        watching(monkeypatch, preemption_url=cloud.url, preemption_grace_s=0.2) as (one, _),
    ):
        cloud.answer = (200, "TRUE")
        await until(lambda: one.left_s() == 0.0, "the grace time to be over")


async def test_a_server_that_hangs_or_is_gone_is_no_notice(monkeypatch):
    monkeypatch.setattr(preemption, "_TIMEOUT", aiohttp.ClientTimeout(total=0.05))
    async with Metadata() as cloud, aiohttp.ClientSession() as session:
        cloud.answer, cloud.hangs = (200, "TRUE"), True
        one = Preemption(AgentConfig(preemption_url=cloud.url), session, lambda: None)
        assert await one._get(cloud.url) is None
        assert await one._get("http://127.0.0.1:1/") is None


async def test_a_file_that_appears_is_a_notice(monkeypatch, tmp_path):
    file = tmp_path / "going"
    async with watching(monkeypatch, preemption_file=str(file)) as (one, told):
        assert one.left_s() is None
        file.write_text("90\n")
        assert 80 < await until(one.left_s, "the notice to be heard") <= 90
        file.unlink()
        await until(lambda: one.left_s() is None, "the notice to be taken back")
        assert told == [1, 1]


async def test_an_invalid_address_is_refused():
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ValueError, match=r"agent\.preemption_url = 'ftp:x'"):
            Preemption(AgentConfig(preemption_url="ftp:x"), session, lambda: None)
        assert not Preemption(AgentConfig(), session, lambda: None).preemptible
