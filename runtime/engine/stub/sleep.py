"""The stub's sleep mode, modelled on vLLM's with its traps.

Rules this file keeps:
- mode=wait ends no request, mode=abort (vLLM's default) ends them all;
- level 2 drops the weights: only wake_up?tags=weights, then collective_rpc reload_weights, then
  wake_up?tags=kv_cache brings the model back; after any other order it answers nonsense, and no
  call says so;
- it sleeps until the last tag is awake;
- another model is loaded only where the memory for weights is awake, or the engine is lost;
- what was begun is done, though whoever asked for it left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from aiohttp import web

from runtime import outside
from runtime.answers import json_answer
from runtime.engine import guard
from runtime.engine.stub.api import Api, error_response
from runtime.engine.stub.engine import StubArgs
from runtime.outside import OutsideError

_TAGS = frozenset({"weights", "kv_cache"})
_ABORT = "aborted by sleep"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Rpc(msgspec.Struct):
    """Of a collective_rpc, what is read."""

    method: str


class StubSleep:
    """What is awake, and whether the weights are the model's."""

    def __init__(self, args: StubArgs, api: Api) -> None:
        self._args = args
        self._api = api
        self._asleep: frozenset[str] = frozenset()
        self._loaded = True
        self._paused = False
        self._requests: set[asyncio.Task[object]] = set()
        self.level = 0

    @property
    def is_sleeping(self) -> bool:
        """Also while it waits for requests before it sleeps, as vLLM has it."""
        return self._paused or bool(self._asleep)

    def routes(self) -> list[web.RouteDef]:
        """The paths of vLLM's sleep mode, each with its handler."""
        return [
            web.post("/sleep", whole(self._sleep)),
            web.post("/wake_up", whole(self._wake_up)),
            web.get("/is_sleeping", self._is_sleeping),
            web.post("/collective_rpc", whole(self._collective_rpc)),
        ]

    async def abortable(self, handler: Handler, request: web.Request) -> web.StreamResponse:
        """Answers `request`; a sleep waits for it, or ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            return await handler(request)
        except asyncio.CancelledError as error:
            if error.args != (_ABORT,):
                raise
            return error_response(503, _ABORT, "ServiceUnavailableError")
        finally:
            self._requests.discard(task)

    async def repoint(self, wanted: guard.Repoint) -> dict[str, float]:
        """Serve another model from now on. Raises RepointRefused; anything else: half-way."""
        fails = self._args.fail_repoint
        if fails == "refused":
            raise guard.RepointRefused("it can't (modelled by the stub: fail_repoint)")
        await asyncio.sleep(self._args.repoint_s)
        if fails or "weights" in self._asleep:
            raise RuntimeError("no weights" if not fails else "modelled by the stub: fail_repoint")
        self._loaded = True
        self._api.gibberish = self._args.repoint_gibberish
        self._api.rename(wanted.names)
        return {"reload": self._args.repoint_s, "renew": 0.0}

    async def _sleep(self, request: web.Request) -> web.Response:
        level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
        if level not in ("1", "2"):
            return error_response(400, f"level must be 1 or 2, not {level!r}")
        if mode not in ("abort", "wait"):
            return error_response(400, f"the stub models mode abort and wait, not {mode!r}")
        self._paused = True
        if mode == "abort":
            for task in self._requests:
                task.cancel(_ABORT)
        while self._requests:
            await asyncio.wait(set(self._requests))
        await asyncio.sleep(self._args.sleep_s)
        self._paused = False
        self.level, self._asleep = int(level), _TAGS
        self._loaded = self._loaded and self.level == 1
        return json_answer({"status": "sleeping", "level": self.level})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags", [])
        waking = self._asleep & set(tags or _TAGS)
        if self.level == 1:
            await asyncio.sleep(self._args.wake_1_s)
        self._asleep -= waking
        if "kv_cache" in waking and not self._loaded:
            self._api.gibberish = True
        if waking and not self._asleep:
            self.level = 0
            self._api.gibberish = self._api.gibberish or self._args.wake_gibberish
        status = "sleeping" if self._asleep else "awake"
        return json_answer({"status": status, "tags": tags or None})

    async def _is_sleeping(self, request: web.Request) -> web.Response:
        return json_answer({"is_sleeping": self.is_sleeping})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        try:
            method = outside.decode(await request.read(), _Rpc).method
        except OutsideError:
            return error_response(400, "Missing 'method' in request body")
        if method != "reload_weights" or "weights" in self._asleep:
            return error_response(500, f"{method!r} failed", "InternalServerError")
        await asyncio.sleep(self._args.wake_2_s)
        self._loaded = True
        return json_answer({"results": [None]})


def whole(handler: Callable[[web.Request], Coroutine[Any, Any, web.Response]]) -> Handler:
    """`handler`, which ends what it began though whoever asked for it left."""

    async def run(request: web.Request) -> web.Response:
        return await asyncio.shield(asyncio.create_task(handler(request)))

    return run
