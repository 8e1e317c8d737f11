"""What the cache's tests stand on: nodes that serve their cache over real HTTP, and files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from agent.cache.cluster import PeerCaches
from agent.cache.http import cache_routes
from agent.cache.model_cache import ModelCache
from agent.cache.store import CacheStore
from runtime.checkpoints.model_files import CacheConfig
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Service

TOKEN = "the-cluster-token"
DEADLINE_S = 30.0


async def until(condition, what: str):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        await asyncio.sleep(0.005)
    return value


class Node:
    """One node's cache as its agent would run it; `before_blob` may delay or spoil an answer."""

    def __init__(self, name: str, folder: Path, config: CacheConfig, token: str) -> None:
        self.name = name
        self.folder = folder
        self.config = config
        self.token = token
        self.url = ""
        self.blobs_served = 0
        self.before_blob: Any = None  # async (request) -> response or None
        self.cache: ModelCache = None

    @web.middleware
    async def _guard(self, request, handler):
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": {"message": "no token"}}, status=401)
        if "/blobs/" in request.path:
            self.blobs_served += 1
            if self.before_blob and (answer := await self.before_blob(request)):
                return answer
        return await handler(request)

    @contextlib.asynccontextmanager
    async def running(self, registry: EmbeddedRegistry) -> AsyncIterator[Node]:
        async with aiohttp.ClientSession() as session:
            cluster = PeerCaches(
                registry, session, token=self.token, prefix="stoker", own_url=lambda: self.url
            )
            self.cache = ModelCache(
                CacheStore(self.folder / "store"), self.config, self.folder / "models", cluster
            )
            app = web.Application(middlewares=[self._guard])
            app.add_routes(cache_routes(self.cache))
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{port}"
            service = Service(
                service_id=f"agent-{self.name}", name="stoker-agent", address="127.0.0.1", port=port
            )
            await registry.register(service, 60.0)
            try:
                yield self
            finally:
                await self.cache.close()
                await runner.cleanup()
                await registry.deregister(service.service_id)


class Nodes:
    """Starts nodes that share one registry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.AsyncExitStack()
        self.registry = EmbeddedRegistry(folder / "registry.db")

    async def __aenter__(self) -> Nodes:
        self._stack.push_async_callback(self.registry.close)
        return self

    async def __aexit__(self, *error) -> None:
        await self._stack.aclose()

    async def start(self, name="a", folder=None, token=TOKEN, **config) -> Node:
        node = Node(name, folder or self._folder / name, CacheConfig(**config), token)
        return await self._stack.enter_async_context(node.running(self.registry))


def write_model(folder: Path, **files: bytes | int) -> Path:
    """A folder of files, `__` in a name being `.`; a number is that many random bytes."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(content) if isinstance(content, int) else content)
    return folder


def read_model(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def leftovers(node: Node) -> list[str]:
    """Parts of files and of snapshots."""
    tmp = node.folder / "store" / "tmp"
    return sorted(path.name for path in tmp.iterdir() if path.suffix != ".json")


async def committed(node: Node) -> None:
    """Every cached model is on the disk, too."""
    models = node.folder / "store" / "models"
    await until(
        lambda: len(list(models.glob("*.json"))) == len(node.cache.store.models), "the commit"
    )
