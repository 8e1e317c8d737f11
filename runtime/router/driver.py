"""Runs one router: server, link to the scheduler, registration, graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

from aiohttp import web

from runtime import places
from runtime.contract.config import Config, RouterConfig
from runtime.registry.protocol import Registry, Service
from runtime.registry.registration import keep_registered, withdraw
from runtime.router.admission.gate import Gate
from runtime.router.callers.forwarded import Forwarded
from runtime.router.callers.keys import Keys
from runtime.router.callers.local import Local
from runtime.router.callers.memory import Memory
from runtime.router.control.listener import BACKLOG, listen
from runtime.router.control.other_workers import Siblings
from runtime.router.control.scheduler_link import Link
from runtime.router.control.workers import worker_index
from runtime.router.front.aiohttp_server import OddConnection, prepare
from runtime.router.front.api import RouterApi
from runtime.router.front.connections import Front
from runtime.router.front.cors import Cors
from runtime.router.front.fast_path import KEEP_ALIVE_S
from runtime.router.jobs.service import Jobs
from runtime.router.observability import observed
from runtime.router.observe.metrics import RouterMetrics
from runtime.router.proxy.response_cache import ResponseCache
from runtime.router.proxy.serving import Proxy
from runtime.router.proxy.upstream import EngineTimeouts, Upstream
from runtime.wire.routes import RouteTable

log = logging.getLogger("stoker.router")

TTL_S = 15.0
FIRST_REQUEST_S = 1.0  # at the end, of a caller that has connected already


async def run_router(
    config: Config,
    registry: Registry,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set (without one: until SIGTERM or SIGINT), then drain and return.

    `on_ready` gets the router's URL once it accepts connections. Streams under way at the end
    have `router.drain_s` to finish. Raises OSError where host and port cannot be bound.
    """
    stop = stop or _stop_on_signals()
    settings, worker = config.router, worker_index()
    proxy = _proxy(settings)
    siblings = _siblings(config, worker, proxy) if worker is not None else None
    jobs = Jobs(config, proxy)
    api = RouterApi(
        proxy, settings.max_body_bytes, settings.read_timeout_s, jobs, siblings,
        (config.metrics_token, config.cluster_token), Cors(settings.cors_origins),
    )  # fmt: skip
    runner, front = await _servers(settings, api, proxy)
    observing = contextlib.AsyncExitStack()
    try:
        await observing.enter_async_context(observed(proxy, settings))
        listener = listen(settings.host, settings.port, shared=worker is not None)
        port = listener.getsockname()[1]
        router_id = f"{socket.gethostname()}:{port}" + (f":{worker}" if worker else "")
        link = _link(config, proxy, registry, router_id)
        service = _service(settings, router_id, port)
        if siblings is not None:
            await _listen_to_siblings(runner, siblings)
        async with _background(link.run()), _background(keep_registered(registry, service, TTL_S)):
            server = await asyncio.get_running_loop().create_server(
                front, sock=listener, backlog=BACKLOG
            )
            if on_ready is not None:
                on_ready(places.base_url(settings.host, port))
            async with _background(jobs.run()):
                await stop.wait()
            api.draining = True
            server.close()
            await _drain(front, runner, settings.drain_s)
        await withdraw(registry, service)
    finally:
        await front.drain(0.0)
        await runner.cleanup()
        await jobs.close()
        _close(proxy)
        await observing.aclose()


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _proxy(settings: RouterConfig) -> Proxy:
    """What carries calls; connections to engines that a new table has no more are closed."""
    gate, upstream = Gate(settings.max_in_flight), Upstream(_limits(settings))

    def on_routes(table: RouteTable) -> None:
        upstream.keep_only(
            {endpoint.base_url for route in table.models for endpoint in route.endpoints}
        )
        upstream.lost(table.lost)

    gate.on_routes = on_routes
    anonymous = settings.lets_anonymous_in()
    local = Local(settings.allowed_hosts) if anonymous and settings.anonymous == "auto" else None
    cache = ResponseCache(settings.cache_bytes)
    metrics, keys = RouterMetrics(gate, cache), Keys(anonymous, local)
    return Proxy(
        gate, upstream, metrics, keys, cache, settings.heartbeat_s, Memory(settings.held_bytes),
        Forwarded(settings.trusted_proxies),
    )  # fmt: skip


async def _drain(front: Front, runner: web.AppRunner, drain_s: float) -> None:
    """Answer who has connected already, and let what is under way end."""
    log.info("draining for up to %g s", drain_s)
    await front.hear_new(min(FIRST_REQUEST_S, drain_s))
    await asyncio.gather(front.drain(drain_s), runner.cleanup())


def _close(proxy: Proxy) -> None:
    proxy.routed.close()
    proxy.batcher.close()
    proxy.gate.close()
    proxy.upstream.close()


def _siblings(config: Config, worker: int, proxy: Proxy) -> Siblings:
    """The other workers on the same port, which the proxy asks for responses it doesn't know."""
    siblings = Siblings(Path(config.state_dir), worker, config.router.workers)
    proxy.others_made = siblings.made
    return siblings


async def _listen_to_siblings(runner: web.AppRunner, siblings: Siblings) -> None:
    siblings.socket.parent.mkdir(parents=True, exist_ok=True)
    siblings.socket.unlink(missing_ok=True)
    await web.UnixSite(runner, str(siblings.socket)).start()


def _service(settings: RouterConfig, router_id: str, port: int) -> Service:
    return Service(
        service_id=f"stoker-router-{router_id}",
        name="stoker-router",
        address=settings.advertise_host or settings.host,
        port=port,
    )


async def _servers(
    settings: RouterConfig, api: RouterApi, proxy: Proxy
) -> tuple[web.AppRunner, Front]:
    """aiohttp's server, and the one in front of it that answers plain calls itself."""
    runner = web.AppRunner(
        api.app(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=settings.drain_s,
    )
    await runner.setup()
    assert runner.server is not None
    server = runner.server
    prepare(server, api.refuse)
    front = Front(
        proxy,
        server,
        lambda: OddConnection(server, api.refuse, min(KEEP_ALIVE_S, settings.read_timeout_s)),
        read_s=settings.read_timeout_s,
        max_connections=settings.max_connections,
        max_body_bytes=settings.max_body_bytes,
    )
    return runner, front


def _link(config: Config, proxy: Proxy, registry: Registry, router_id: str) -> Link:
    """The link to the scheduler, with the tables that the last router here had."""
    link = Link(
        proxy.gate,
        proxy.keys,
        registry,
        prefix=config.registry.prefix,
        token=config.cluster_token,
        router_id=router_id,
        folder=Path(config.state_dir),
    )
    link.restore()
    return link


def _limits(settings: RouterConfig) -> EngineTimeouts:
    return EngineTimeouts(
        connect_s=settings.connect_timeout_s,
        first_byte_s=settings.first_byte_timeout_s,
        idle_s=settings.idle_timeout_s,
        total_s=settings.total_timeout_s,
    )


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
