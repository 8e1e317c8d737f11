"""Runs a node agent: its loops, its signals, its end.

Rules this file keeps:
- SIGTERM and SIGINT drain: every replica ends its requests and stops, then the agent leaves the
  registry and exits; the same signal again kills them;
- SIGUSR1 detaches: the agent exits at once and leaves its engines to the next one (an upgrade);
- a loop that fails ends the agent with its error; the engines stay for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import aiohttp
from aiohttp import web

from agent.address import Address, advertised_host
from agent.cache.model_cache import open_cache
from agent.core.messages import ShutdownRequested, TermSeen, Tick
from agent.core.periods import TICK_S
from agent.devices.inventory import open_devices
from agent.link import SchedulerLink
from agent.node import Node
from agent.records import Records
from agent.server import make_app
from runtime import places
from runtime.contract.config import Config
from runtime.registry.protocol import Registry, Service
from runtime.registry.registration import keep_registered, withdraw
from runtime.sockets import tcp_connector
from runtime.wire.agent_messages import HeartbeatReply

log = logging.getLogger("stoker.agent")

_ROTATE_S = 5.0
_LAUNCHER_S = 2.0
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


async def run_agent(
    config: Config,
    registry: Registry,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Run until SIGTERM (or `stop`) has drained every replica, or SIGUSR1 detached them.

    `on_ready` gets the agent's own URL once it answers. Raises ValueError for a configuration that
    can't be, RuntimeError if another agent uses the state_dir, OSError if the port is taken.
    """
    if not config.cluster_token and config.agent.host not in _LOOPBACK:
        raise ValueError(
            f"agent.host {config.agent.host} is open to others, so a cluster_token is needed:"
            " set one, the same for every part, or listen on 127.0.0.1"
        )
    with contextlib.closing(Records(config.state_dir)) as records:
        async with aiohttp.ClientSession(connector=tcp_connector()) as session:
            agent = _Agent(config, registry, session, records, stop or asyncio.Event())
            await agent.run(on_ready)


class _Agent:
    def __init__(
        self,
        config: Config,
        registry: Registry,
        session: aiohttp.ClientSession,
        records: Records,
        stop: asyncio.Event,
    ) -> None:
        self._config = config
        self._registry = registry
        self._drain = stop
        self._hard = asyncio.Event()
        self._detach = asyncio.Event()
        self._session = session
        self._records = records

    async def run(self, on_ready: Callable[[str], None] | None) -> None:
        config = self._config
        address, due = Address(), asyncio.Event()
        devices = await asyncio.to_thread(open_devices, config.agent.devices, config.node_id())
        cache = await asyncio.to_thread(
            open_cache, config, self._registry, self._session, address.get
        )
        node = Node(config, self._session, devices, self._records, cache, address, due.set)
        link = SchedulerLink(
            self._session,
            self._registry,
            leader_key=places.key(config.registry.prefix, "leader"),
            token=config.cluster_token,
            interval_s=config.agent.heartbeat_s,
            due=due,
            build=node.heartbeats.build,
            on_reply=functools.partial(_see_term, node),
        )
        with self._signals():
            try:
                await node.host.devices.read()
                async with _serve(node, config) as port:
                    address.url = places.base_url(advertised_host(config), port)
                    await node.adoption.run()
                    service = _service(config, port)
                    loops = self._loops(node, link, service)
                    if on_ready:
                        on_ready(address.url)
                    await self._live(node, link, service, loops)
            finally:
                await cache.close()
                await node.close()
                devices.close()

    def _loops(
        self, node: Node, link: SchedulerLink, service: Service
    ) -> list[Coroutine[Any, Any, None]]:
        async def tick() -> None:
            node.apply(Tick(now=time.monotonic()))

        return [
            _every(TICK_S, tick),
            _every(self._config.agent.heartbeat_s, node.host.devices.read),
            _every(_ROTATE_S, node.rotate_logs),
            _every(_LAUNCHER_S, node.keep_launcher),
            node.stager.run(),
            node.adapters.run(),
            node.host.preemption.run(),
            link.run(),
            keep_registered(self._registry, service),
        ]

    async def _live(
        self,
        node: Node,
        link: SchedulerLink,
        service: Service,
        loops: list[Coroutine[Any, Any, None]],
    ) -> None:
        tasks = [asyncio.create_task(loop) for loop in loops]
        finding = asyncio.create_task(node.host.find_engines())
        ending = asyncio.create_task(self._until_over(node))
        try:
            failed = node.host.tasks.failed
            await asyncio.wait([*tasks, failed, ending], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            for task in (*tasks, ending):
                if task.done():
                    task.result()  # a loop ends with an error only, a drain with none
        finally:
            for task in (*tasks, finding, ending):
                task.cancel()
            await asyncio.gather(*tasks, finding, ending, return_exceptions=True)
        if not self._detach.is_set():
            await link.send()  # the last word: nothing runs here any more
            await withdraw(self._registry, service)

    async def _until_over(self, node: Node) -> None:
        await _first(self._drain, self._detach)
        if self._detach.is_set():
            log.info("detached: %d replicas are left to the next agent", len(node.core.replicas))
            return
        grace_s = self._config.scheduler.drain_grace_s
        log.info("draining %d replicas, at most %.0f s", len(node.core.replicas), grace_s)
        node.apply(ShutdownRequested(now=time.monotonic(), grace_s=grace_s))
        await _first(node.finished, self._hard, self._detach)
        if self._hard.is_set():
            log.warning("killing %d replicas", len(node.core.replicas))
            node.apply(ShutdownRequested(now=time.monotonic(), grace_s=0.0, hard=True))
            await _first(node.finished, self._detach)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def end() -> None:
            (self._hard if self._drain.is_set() else self._drain).set()

        handlers = {signal.SIGTERM: end, signal.SIGINT: end, signal.SIGUSR1: self._detach.set}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


def _see_term(node: Node, reply: HeartbeatReply) -> bool:
    """False where the scheduler that answered has been overtaken by another."""
    if reply.term < node.core.epoch:
        return False
    node.apply(TermSeen(now=time.monotonic(), term=reply.term))
    node.adapters.tell(reply.adapters)
    return True


@contextlib.asynccontextmanager
async def _serve(node: Node, config: Config) -> AsyncIterator[int]:
    """Answer HTTP; yields the port."""
    runner = web.AppRunner(
        make_app(node, config.cluster_token, config.metrics_token),
        access_log=None,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, config.agent.host, config.agent.port).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def _service(config: Config, port: int) -> Service:
    return Service(
        service_id=f"agent-{config.node_id()}",
        name="stoker-agent",
        address=advertised_host(config),
        port=port,
        meta={"node_id": config.node_id()},
    )


async def _every(pause_s: float, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        await action()
        await asyncio.sleep(pause_s)


async def _first(*events: asyncio.Event) -> None:
    """Returns once any of them is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
