"""The stub engine as a process."""

import asyncio
import contextlib
import functools
import json
import socket
import subprocess
import time

import aiohttp

from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

ROUTE, CONTROL = "route-secret", "control-secret"
DEADLINE_S = 20.0


def spec(**engine_args):
    return ModelSpec(
        name="m", aliases=("org/m",), source="none", engine="stub", engine_args=engine_args
    )


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def context(port):
    """Where and with what a stub runs."""
    return LaunchContext(
        replica_id="r", host="127.0.0.1", port=port, route_key=ROUTE, control_key=CONTROL,
        device_kind="simulated", device_ids=("sim-0",), device_indexes=(0,), device_bytes=1,
        device_total_bytes=1, model_path="none", revision=None, python="/nonexistent",
        cache_dir="/nonexistent",
    )  # fmt: skip


class Engine:
    """A running stub."""

    def __init__(self, port=None, **engine_args):
        self.port = port or free_port()
        self.launch = get_engine("stub").launch(spec(**engine_args), context(self.port))
        assert not any("-secret" in word for word in self.launch.argv)
        self.process = subprocess.Popen(
            self.launch.argv, env=self.launch.env, cwd="/", stderr=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{self.port}"

    @functools.cached_property
    def http(self):
        """A session of the event loop that first asks for it."""
        headers = {"Authorization": f"Bearer {CONTROL}"}
        return aiohttp.ClientSession(self.url, headers=headers)

    async def health(self):
        """The status of /health, or None while nothing listens."""
        try:
            async with self.http.get(self.launch.health_path, headers={"Authorization": ""}) as got:
                return got.status
        except aiohttp.ClientError:
            return None

    async def ready(self):
        await until(lambda: self._is(200))
        return self

    async def _is(self, status):
        assert self.process.poll() is None, self.process.communicate()
        return await self.health() == status

    async def status(self):
        async with self.http.get("/stoker/status") as got:
            return await got.json()

    async def post(self, path, body=None, key=CONTROL):
        headers = {"Authorization": f"Bearer {key}"}
        async with self.http.post(path, json=body, headers=headers) as got:
            text = await got.text()
            return got.status, json.loads(text) if text else None

    async def ended(self):
        """(exit status, what it logged)."""
        _, log = await asyncio.to_thread(self.process.communicate, timeout=DEADLINE_S)
        return self.process.returncode, log

    async def leave(self):
        """End the session; another event loop may have one of its own."""
        await self.http.close()
        del self.http

    async def close(self):
        await self.leave()
        self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


async def until(condition):
    """Waits for an async condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(**engine_args):
    engine = Engine(**{"start_s": 0, "ttft_s": 0, "token_s": 0, **engine_args})
    try:
        yield await engine.ready()
    finally:
        await engine.close()
