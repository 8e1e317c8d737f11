"""What an agent answers about its model cache: to operators, and to the caches of other nodes.

Whoever adds these routes guards them with the cluster token: a blob is a model's weights.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from agent.cache.errors import CacheError
from agent.cache.model_cache import ModelCache
from agent.cache.send import send_file
from runtime import outside
from runtime.answers import json_answer
from runtime.checkpoints.model_files import ModelRef, PullBody

_MAX_WAIT_S = 30.0
_SENDERS = 32  # ranges that are sent at once
_STATUS = {
    "in_use": 409,
    "not_found": 404,
    "bad_source": 400,
    "too_big": 507,
    "disk_full": 507,
    "unauthorized": 502,
    "corrupt": 502,
    "unreachable": 502,
    "cancelled": 503,
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def cache_routes(
    cache: ModelCache, resident_bytes: Callable[[str], int] | None = None
) -> list[web.RouteDef]:
    """Below /agent/cache. Errors are {"error": {"message", "kind"}}.

    `resident_bytes`: as in ModelCache.view.
    """
    endpoints = _Endpoints(cache, resident_bytes)
    return [
        web.get("/agent/cache", _in_words(endpoints.view)),
        web.delete("/agent/cache", _in_words(endpoints.remove)),
        web.post("/agent/cache/pull", _in_words(endpoints.pull)),
        web.post("/agent/cache/verify", _in_words(endpoints.verify)),
        web.get("/agent/cache/offer", _in_words(endpoints.offer)),
        web.get("/agent/cache/blobs/{sha256}", endpoints.blob),
    ]


class _Endpoints:
    def __init__(
        self, cache: ModelCache, resident_bytes: Callable[[str], int] | None = None
    ) -> None:
        self._cache = cache
        self._resident_bytes = resident_bytes
        self._senders = ThreadPoolExecutor(_SENDERS, "cache-send")

    async def view(self, request: web.Request) -> web.Response:
        """CacheView"""
        return json_answer(self._cache.view(self._resident_bytes))

    async def remove(self, request: web.Request) -> web.Response:
        """?model= -> {"freed_bytes"}"""
        freed = await self._cache.remove(request.query.get("model", ""))
        return web.json_response({"freed_bytes": freed})

    async def pull(self, request: web.Request) -> web.Response:
        """PullBody -> PullView with 202, or 204 where there is nothing to pull."""
        body = outside.decode(await request.read(), PullBody)
        pull = await self._cache.pull(body.model, body.refresh)
        return json_answer(pull.view(), 202) if pull else web.Response(status=204)

    async def verify(self, request: web.Request) -> web.Response:
        """?model= -> VerifyReport"""
        return json_answer(await self._cache.verify(request.query.get("model", "")))

    async def offer(self, request: web.Request) -> web.Response:
        """?source=&asked=&seen=&wait_s= -> Offer, or 404"""
        query = request.query
        ref = ModelRef(source=query.get("source", ""), asked=query.get("asked", ""))
        wait_s = min(float(query.get("wait_s", 0)), _MAX_WAIT_S)
        offer = await self._cache.offer(ref, int(query.get("seen", 0)), wait_s)
        return (
            json_answer(offer)
            if offer
            else _refusal(404, "not_found", "this node does not have it")
        )

    async def blob(self, request: web.Request) -> web.StreamResponse:
        """A file by its sha256; ranges are served."""
        path = self._cache.store.blob(request.match_info["sha256"])
        if path is None:
            return _refusal(404, "not_found", "this node does not have that file")
        try:
            return await send_file(request, path, self._senders)
        except FileNotFoundError:  # evicted just now
            return _refusal(404, "not_found", "this node no longer has that file")


def _in_words(handler: Callable[[web.Request], Awaitable[web.Response]]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except CacheError as error:
            return _refusal(_STATUS[error.kind], error.kind, str(error))
        except ValueError as error:
            return _refusal(400, "bad_source", str(error))

    return answer


def _refusal(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "kind": kind}}, status=status)
