"""A node's model cache in a process of its own, as its agent runs it.

python cache_node.py serve STATE_DIR MODEL_DIR   has the model; prints a line when it answers
python cache_node.py pull STATE_DIR              pulls it once a line on stdin; prints seconds
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

from agent.cache.cluster import PeerCaches
from agent.cache.http import cache_routes
from agent.cache.model_cache import ModelCache
from agent.cache.store import CacheStore
from runtime.checkpoints.model_files import CacheConfig
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import Service

MODEL = "hf:bench/model"


@contextlib.asynccontextmanager
async def node(name: str, state_dir: Path, config: CacheConfig) -> AsyncIterator[ModelCache]:
    registry = EmbeddedRegistry(state_dir / "registry.db")
    urls = [""]
    async with aiohttp.ClientSession() as session:
        cluster = PeerCaches(registry, session, token="t", prefix="bench", own_url=lambda: urls[0])
        store = await asyncio.to_thread(CacheStore, state_dir / name)
        cache = ModelCache(store, config, state_dir / "models", cluster)
        app = web.Application()
        app.add_routes(cache_routes(cache))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        urls[0] = f"http://127.0.0.1:{port}"
        service = Service(
            service_id=f"agent-{name}", name="stoker-agent", address="127.0.0.1", port=port
        )
        await registry.register(service, 3600.0)
        try:
            yield cache
        finally:
            await registry.deregister(service.service_id)
            await cache.close()
            await runner.cleanup()
            await registry.close()


def wait_for_record(folder: Path) -> None:
    """Until the model is on the disk: before, the disk is busy with it."""
    while not any(folder.glob("*.json")):
        time.sleep(0.01)


async def serve(state_dir: Path, shared_dir: Path) -> None:
    config = CacheConfig(shared_dir=str(shared_dir))
    async with node("server", state_dir, config) as cache:
        await cache.ensure(MODEL)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def pull(state_dir: Path) -> None:
    async with node("client", state_dir, CacheConfig()) as cache:
        while await asyncio.to_thread(sys.stdin.readline):
            began = time.perf_counter()
            await cache.ensure(MODEL)
            taken_s = time.perf_counter() - began
            await asyncio.to_thread(wait_for_record, state_dir / "client" / "models")
            await cache.remove(MODEL)
            print(taken_s, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        uvloop.run(serve(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        uvloop.run(pull(Path(sys.argv[2])))
