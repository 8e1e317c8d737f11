"""A stand-in for vLLM with modelled timings: `python -m runtime.engine.stub.server`.

It loads no model and computes nothing: an answer is the prompt's own words over again. Every
response says so (`x-stoker-engine: stub`). What is real is the process: its socket, its guard, its
streams, its signals and its exit status.

Rules this file keeps:
- the guard's rule is `guard.refuse`, the same as inside vLLM;
- its sleep mode is vLLM's, the traps too: see stub_sleep;
- SIGTERM lets in-flight requests end and exits 0; a client that leaves stops its own request;
- it imports little: a start takes about a quarter of a second.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import uvloop
from aiohttp import web

from runtime.answers import json_answer
from runtime.engine import guard
from runtime.engine.adapter_index import Index, from_environment
from runtime.engine.stub.adapters import StubAdapters
from runtime.engine.stub.api import MEDIA_DOMAINS, Api, error_response
from runtime.engine.stub.engine import StubArgs
from runtime.engine.stub.protocols import Protocols
from runtime.engine.stub.sleep import StubSleep, whole

DRAIN_S = 3600.0  # the agent's grace time is what ends a drain; this only has to be longer

# What vLLM logs when that happens, so that an agent's explanation is exercised too.
_LAST_WORDS = {
    "oom": "torch.OutOfMemoryError: CUDA out of memory. (modelled by the stub: fail_start)",
    "bad_model": "RuntimeError: Cannot find any model weights (modelled by the stub: fail_start)",
    "crash": "RuntimeError: it failed to start (modelled by the stub: fail_start)",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Stub:
    """One stub server's state."""

    def __init__(
        self,
        names: tuple[str, ...],
        args: StubArgs,
        keys: guard.Keys,
        index: Index | None = None,
        media_domains: tuple[str, ...] = (),
    ) -> None:
        """`index`: of the adapters, where it takes any."""
        self._media_domains = media_domains
        self._args = args
        self._keys = keys
        self._activity = guard.Activity()
        adapters = StubAdapters(index if args.enable_lora else None)
        self._api = Api(names, args, adapters)
        self._sleep = StubSleep(args, self._api)
        self._ready = False
        self._begun = 0

    def app(self) -> web.Application:
        """The server."""
        app = web.Application(middlewares=[self._middleware], client_max_size=64 * 2**20)
        app[MEDIA_DOMAINS] = self._media_domains
        app.on_startup.append(self._begin_start)
        app.on_response_prepare.append(_label)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.post(guard.REPOINT_PATH, whole(self._repoint)),
                *self._sleep.routes(),
                *self._api.routes(),
                *Protocols(self._api).routes(),
            ]
        )
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        given = None if authorization is None else authorization.encode("utf-8", "surrogateescape")
        if refusal := guard.refuse(request.path, given, self._keys):
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
            return web.Response(
                status=refusal.status,
                body=refusal.body(),
                content_type="application/json",
                headers=headers,
            )
        if (steered := self._activity.steer(request.path)) is not None:
            return json_answer(steered[1], status=steered[0])
        ours = guard.holds_control(given, self._keys)
        guard.let_in_for(request.headers.get(guard.MODEL_HEADER.decode(), "").encode())
        try:
            return await self._let_in(request, handler, ours)
        except web.HTTPException as error:  # aiohttp's own: no such route, body too large
            return error_response(error.status, error.reason, type(error).__name__)

    async def _let_in(
        self, request: web.Request, handler: Handler, ours: bool
    ) -> web.StreamResponse:
        if not guard.counts(request.path):
            return await handler(request)
        if why := self._why_not(ours):
            response = error_response(503, why, "ServiceUnavailableError")
            if self._activity.closed and not ours:
                response.headers[guard.CLOSED_HEADER.decode()] = "1"
            return response
        if ours:
            return await handler(request)
        self._crash_if_due()
        if self._args.fail_every and self._begun % self._args.fail_every == 0:
            why = "it failed (modelled by the stub: fail_every)"
            return error_response(500, why, "InternalServerError")
        self._activity.begin()
        try:
            return await self._sleep.abortable(handler, request)
        finally:
            self._activity.end()

    def _why_not(self, ours: bool) -> str | None:
        """Why no request is answered now."""
        if not self._ready:
            return "the engine is still starting"
        if self._activity.changing:
            return self._activity.changing
        if self._sleep.is_sleeping:  # vLLM would hold the request until it is woken
            return "the engine is asleep"
        return guard.CLOSED if self._activity.closed and not ours else None

    def _crash_if_due(self) -> None:
        self._begun += 1
        limit = self._args.crash_after_requests
        if limit is not None and self._begun > limit:
            _die("RuntimeError: it died (modelled by the stub: crash_after_requests)")

    async def _begin_start(self, app: web.Application) -> None:
        app["start"] = asyncio.create_task(self._start())

    async def _start(self) -> None:
        await asyncio.sleep(self._args.start_s)
        if self._args.fail_start:
            _die(_LAST_WORDS[self._args.fail_start])
        self._ready = True

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._ready else 503)

    async def _repoint(self, request: web.Request) -> web.Response:
        body = await request.read()
        wanted, status, answer = await self._activity.repoint(body, self._sleep.repoint)
        if wanted:
            self._keys = self._keys._replace(route=wanted.route_key.encode())
        return json_answer(answer, status=status)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self._api.metrics(self._activity, self._sleep.level))


async def _label(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-stoker-engine"] = "stub"


def _die(last_words: str) -> None:
    print(last_words, file=sys.stderr, flush=True)
    os._exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; serves until a signal ends it."""
    parser = argparse.ArgumentParser(prog="runtime.engine.stub.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--names", nargs="+", required=True, help="the model's name and aliases")
    parser.add_argument("--args", default="{}", help="the spec's engine_args as JSON")
    parser.add_argument("--media-domains", nargs="*", default=[], help="as in a spec")
    options = parser.parse_args(argv)
    try:
        args = msgspec.json.decode(options.args, type=StubArgs)
    except msgspec.DecodeError as error:
        parser.error(f"argument --args: {error}")
    index = from_environment(os.environ)
    keys, domains = guard.keys_from(os.environ), tuple(options.media_domains)
    stub = Stub(tuple(options.names), args, keys, index, domains)
    web.run_app(
        stub.app(),
        host=options.host,
        port=options.port,
        access_log=None,
        print=None,
        handler_cancellation=True,
        shutdown_timeout=DRAIN_S,
        loop=uvloop.new_event_loop(),
    )


if __name__ == "__main__":
    main()
