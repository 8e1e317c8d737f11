"""GET of a response that an engine keeps, and its cancel: asked of the replica that made it.

Rules this file keeps:
- whoever is not of the tenant that had it made hears that there is none of that id;
- it is no work for an engine: no tokens are charged and no start is begun for it;
- a worker that does not know an id asks the other workers of its port, and these ask nobody.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from runtime.answers import json_answer
from runtime.router.call.body import Head
from runtime.router.call.errors import CallError, no_response
from runtime.router.call.made_responses import Made, is_id
from runtime.router.call.paths import RESPONSES, engine_target
from runtime.router.call.request import Call
from runtime.router.control.other_workers import MADE, Siblings, is_sibling
from runtime.router.proxy.headers import is_closed, returned_headers, sent_headers
from runtime.router.proxy.responder import CALLER, REQUEST_ID, AiohttpClient
from runtime.router.proxy.serving import Proxy
from runtime.router.proxy.upstream import UpstreamError
from runtime.wire.routes import Endpoint

_ID = RESPONSES + "/{response_id}"
_OWN = "/models/{model:.+?}"


class StoredHandlers:
    """The routes, over one Proxy."""

    def __init__(self, proxy: Proxy, siblings: Siblings | None) -> None:
        self._proxy = proxy
        self._siblings = siblings

    def routes(self) -> list[web.RouteDef]:
        """What to add to the server."""
        own = [web.get(MADE, self._made, allow_head=False)] if self._siblings is not None else []
        return own + [
            route
            for base in ("", _OWN)
            for route in (
                web.get(base + _ID, self._get, allow_head=False),
                web.post(base + _ID + "/cancel", self._cancel),
            )
        ]

    async def _made(self, request: web.Request) -> web.Response:
        """For another worker of this port; 204: it is not known here."""
        if not is_sibling(request):
            raise web.HTTPNotFound
        made = self._proxy.stored.seen(request.query.get("id", ""))
        if made is None:
            return web.Response(status=204)
        return json_answer(made)

    async def _get(self, request: web.Request) -> web.StreamResponse:
        return await self._ask(request, "GET", "")

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        return await self._ask(request, "POST", "/cancel")

    async def _ask(self, request: web.Request, method: str, tail: str) -> web.StreamResponse:
        caller, response_id = request[CALLER], request.match_info["response_id"]
        made = self._proxy.stored.find(caller.tenant, response_id)
        if made is None or not self._is_of(made, request.match_info.get("model")):
            if made is None and self._siblings is not None and is_id(response_id):
                answer = await self._siblings.ask(request)
                if answer is not None:
                    return answer
            raise no_response(response_id)
        self._proxy.check_scope(caller, made.asked, RESPONSES)
        endpoint = self._endpoint(made)
        target = engine_target(f"{RESPONSES}/{response_id}{tail}", request.rel_url.raw_query_string)
        if endpoint is None or target is None:
            raise no_response(response_id, f": the replica of {made.model!r} that kept it is gone")
        head = Head(model=made.model, stream="stream" in request.query)
        call = Call(
            request[REQUEST_ID], made.model, target, request.raw_headers, b"", False, head, caller
        )
        keys = self._proxy.keys
        keys.begin(caller, 0, asyncio.get_running_loop().time())
        try:
            return await self._relay(request, call, endpoint, method)
        finally:
            keys.end(caller, 0, 0, 0.0)

    async def _relay(
        self, request: web.Request, call: Call, endpoint: Endpoint, method: str
    ) -> web.StreamResponse:
        client = AiohttpClient(request)
        try:
            reply = await self._proxy.upstream.post(
                endpoint.base_url, call.path, sent_headers(call, endpoint.key), b"", method
            )
            try:
                if reply.status == 401 or (reply.status == 503 and is_closed(reply.headers)):
                    raise UpstreamError("the replica does not answer now", delivered=False)
                first = await reply.read()
                await client.begin(reply.status, returned_headers(reply.headers, call))
                await client.relay(reply, first)
            finally:
                reply.close()
        except UpstreamError as error:
            if not client.begun:
                message = f"model {call.model!r}: {error.reason}"
                raise CallError(503, "replica_failed", message, retry_after_s=1.0) from None
            client.break_off()
        except ConnectionError:  # the caller hung up
            if not client.begun:
                raise
        assert client.response is not None
        return client.response

    def _is_of(self, made: Made, model: str | None) -> bool:
        """Whether it was made by that model, where the path names one."""
        if model is None or model == made.asked:
            return True
        route = self._proxy.gate.find(model)
        return route is not None and route == self._proxy.gate.find(made.model)

    def _endpoint(self, made: Made) -> Endpoint | None:
        route = self._proxy.gate.find(made.model)
        for endpoint in route.endpoints if route is not None else ():
            if endpoint.replica_id == made.replica_id:
                return endpoint
        return None
