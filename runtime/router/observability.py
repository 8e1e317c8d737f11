"""What a router tells the world beside its metrics, where the configuration asks for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from runtime.contract.config import RouterConfig
from runtime.router.admission.gate import Gate
from runtime.router.observe.access_log import AccessLog
from runtime.router.proxy.serving import Proxy
from runtime.wire.routes import RouteTable


@contextlib.asynccontextmanager
async def observed(proxy: Proxy, settings: RouterConfig) -> AsyncIterator[None]:
    """The proxy's calls logged and traced. At the end all is written out.

    Raises OSError where the log cannot be opened, RuntimeError where a package is missing.
    """
    async with contextlib.AsyncExitStack() as stack:
        if settings.access_log:
            access_log = proxy.access_log = AccessLog(settings.access_log)
            access_log.start()
            stack.push_async_callback(asyncio.to_thread, access_log.close)
            proxy.observers.append(access_log)
        if settings.otlp_endpoint:
            from runtime.router.observe.tracing import Tracer

            tracer = proxy.means.tracer = Tracer(settings.otlp_endpoint, settings.trace_sample)
            stack.push_async_callback(asyncio.to_thread, tracer.close)
            _tell_routes(proxy.gate, tracer.routes)
        yield


def _tell_routes(gate: Gate, told: Callable[[RouteTable], None]) -> None:
    """Have `told` called with each table too."""
    first = gate.on_routes

    def both(table: RouteTable) -> None:
        first(table)
        told(table)

    gate.on_routes = both
