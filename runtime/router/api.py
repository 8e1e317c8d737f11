"""The router's HTTP surface: OpenAI's API, `/invoke`, one base URL per model, health, metrics.

Rules this file keeps:
- every error is OpenAI-shaped and every answer carries X-Request-ID;
- a path reaches an engine only below /v1, decoded, made of plain segments, and built anew here:
  no dots, no encoded slashes, never one of an engine's control routes;
- a JSON body is passed on as it came, unless the path names the model.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Any

import msgspec
from aiohttp import web

from runtime.router import body as bodies
from runtime.router.admission import unknown_model
from runtime.router.call import Call
from runtime.router.client import AiohttpClient
from runtime.router.errors import ApiError
from runtime.router.front import RequestIds
from runtime.router.openapi import document, page
from runtime.router.paths import ROOT_PATHS, STREAMS, v1_target
from runtime.router.proxy import Proxy
from runtime.router.siblings import OWN, Siblings
from runtime.wire import ModelRoute, RouteTable

log = logging.getLogger("stoker.router")

_REQUEST_ID = web.RequestKey("request_id", str)
_GOOD_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_CREATED = 1735689600  # OpenAI's clients want a time; a model here has none worth telling

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """Handlers over one Proxy. Set `draining` to make /readyz say no.

    `siblings`: the other workers on the same port, whose figures /metrics includes.
    """

    def __init__(
        self,
        proxy: Proxy,
        max_body_bytes: int,
        read_timeout_s: float,
        siblings: Siblings | None = None,
    ) -> None:
        self._siblings = siblings
        self._proxy = proxy
        self._max_body_bytes = max_body_bytes
        self._read_timeout_s = read_timeout_s
        self._request_id = RequestIds()
        self._document = document(installed_version("stoker-serve"))
        self.draining = False

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._shaped])
        app.add_routes(
            [
                web.post("/v1/{tail:.+}", self._openai),
                *(web.post(path, self._root) for path in ROOT_PATHS),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/invoke/{model:.+}", self._invoke),
                web.get("/models/{model:.+?}/v1/models", self._own_models),
                web.get("/models/{model:.+?}/v1/models/{name:.+}", self._own_model),
                web.post("/models/{model:.+?}/v1/{tail:.+}", self._own_openai),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
                web.get("/docs", self._docs),
            ]
        )
        return app

    # -------------------------------------------------------------------------------- inference

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        return await self._by_body(request, _engine_path(request))

    async def _root(self, request: web.Request) -> web.StreamResponse:
        return await self._by_body(request, request.path)

    async def _by_body(self, request: web.Request, path: str) -> web.StreamResponse:
        """A call whose body names the model."""
        body = await self._body(request)
        if request.content_type.startswith("multipart/"):
            head = await bodies.read_form(body, request.headers)
        else:
            head = bodies.read_head(body)
        return await self._serve(request, path, body, head)

    async def _own_openai(self, request: web.Request) -> web.StreamResponse:
        model, path = request.match_info["model"], _engine_path(request)
        self._route(model)
        body = await self._body(request)
        head = bodies.Head(model=model, stream=False)
        if not request.content_type.startswith("multipart/"):
            body, head = bodies.with_model(body, model)
        return await self._serve(request, path, body, head)

    async def _invoke(self, request: web.Request) -> web.StreamResponse:
        model = request.match_info["model"]
        self._route(model)
        stream = _stream_wish(request)
        call = bodies.invocation(await self._body(request), model, stream)
        return await self._serve(request, call.path, call.body, call.head)

    async def _serve(
        self, request: web.Request, path: str, body: bytes, head: bodies.Head
    ) -> web.StreamResponse:
        streams = head.stream and path.partition("?")[0] in STREAMS
        client = AiohttpClient(request)
        request_id, headers = request[_REQUEST_ID], request.raw_headers
        call = Call(request_id, head.model, path, headers, body, streams, head)
        await self._proxy.serve(call, client)
        if client.response is None:
            raise ConnectionResetError("the client hung up before its answer began")
        return client.response

    async def _body(self, request: web.Request) -> bytes:
        if request.content_length is not None and request.content_length > self._max_body_bytes:
            raise self._too_large(request.content_length)
        try:
            async with asyncio.timeout(self._read_timeout_s):
                return await request.read()
        except TimeoutError:
            message = f"the body did not arrive in {self._read_timeout_s:g}s"
            raise ApiError(408, "body_timeout", message) from None
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large(None) from None
        except web.RequestPayloadError as error:
            raise ApiError(400, "invalid_body", f"the body cannot be read: {error}") from None

    def _too_large(self, size: int | None) -> ApiError:
        got = "" if size is None else f", got {size}"
        message = f"the body may have at most {self._max_body_bytes} bytes (router.max_body_bytes)"
        return ApiError(413, "body_too_large", message + got)

    # -------------------------------------------------------------------------------- models

    async def _models(self, request: web.Request) -> web.Response:
        return _listing(self._table().models)

    async def _model(self, request: web.Request) -> web.Response:
        return _json(_card(self._route(request.match_info["model"]), request.match_info["model"]))

    async def _own_models(self, request: web.Request) -> web.Response:
        return _listing((self._route(request.match_info["model"]),))

    async def _own_model(self, request: web.Request) -> web.Response:
        own = self._route(request.match_info["model"])
        name = request.match_info["name"]
        if self._route(name).name != own.name:
            raise ApiError(404, "model_not_found", f"only model {own.name!r} is served here")
        return _json(_card(own, name))

    def _table(self) -> RouteTable:
        table = self._proxy.gate.table
        if table is None:
            message = "this router has not heard from the scheduler yet"
            raise ApiError(503, "no_routes", message, retry_after_s=1.0)
        return table

    def _route(self, model: str) -> ModelRoute:
        table, route = self._table(), self._proxy.gate.find(model)
        if route is not None:
            return route
        names = (n for r in table.models for n in (r.name, *r.aliases, *r.adapters))
        message = unknown_model(model, names)
        raise ApiError(404, "model_not_found", message, param="model")

    # -------------------------------------------------------------------------------- operations

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self.draining:
            return web.Response(status=503, text="draining\n")
        if self._proxy.gate.table is None:
            return web.Response(status=503, text="no route table yet\n")
        return web.Response(text="ready\n")

    async def _openapi(self, request: web.Request) -> web.Response:
        return _json(self._document)

    async def _docs(self, request: web.Request) -> web.Response:
        return web.Response(body=page(self._document), content_type="text/html", charset="utf-8")

    async def _metrics(self, request: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        body = self._proxy.metrics.render()
        if self._siblings is not None and request.query != OWN:
            body = await self._siblings.metrics(body)
        return web.Response(body=body, headers={"Content-Type": content_type})

    @web.middleware
    async def _shaped(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request ids in and out, and every failure as an OpenAI error."""
        wish = request.headers.get("X-Request-ID", "")
        request_id = wish if _GOOD_REQUEST_ID.fullmatch(wish) else self._request_id()
        request[_REQUEST_ID] = request_id
        try:
            response = await handler(request)
        except ApiError as error:
            response = _error_response(error)
        except web.HTTPException as error:
            response = _error_response(_of_http(request, error))
        except Exception:
            log.exception("request %s failed inside the router", request_id)
            message = "the router failed; its log has more under this request id"
            response = _error_response(ApiError(500, "internal_error", message))
        if not response.prepared:
            response.headers["X-Request-ID"] = request_id
        return response


def _of_http(request: web.Request, error: web.HTTPException) -> ApiError:
    where = f"{request.method} {request.path}"
    if error.status == 404:
        return ApiError(404, "not_found", f"there is no {where} here; the API is below /v1")
    if error.status == 405:
        return ApiError(405, "method_not_allowed", f"{where} is not offered")
    return ApiError(error.status, "http_error", error.reason)


def _error_response(error: ApiError) -> web.Response:
    return web.Response(
        status=error.status,
        body=error.body(),
        headers=error.headers(),
        content_type="application/json",
    )


def _engine_path(request: web.Request) -> str:
    """The request target for the engine, below /v1. Raises ApiError (404)."""
    target = v1_target(request.match_info["tail"], request.rel_url.raw_query_string)
    if target is None:
        raise ApiError(404, "not_found", f"there is no POST {request.path} here")
    return target


def _stream_wish(request: web.Request) -> bool | None:
    text = request.query.get("stream")
    if text is None:
        return None
    if text.lower() not in ("true", "false", "1", "0"):
        message = f"stream must be true or false, got {text!r}"
        raise ApiError(400, "invalid_field", message, param="stream")
    return text.lower() in ("true", "1")


def _shown(route: ModelRoute) -> dict[str, Any]:
    return {
        "id": route.name,
        "object": "model",
        "created": _CREATED,
        "owned_by": "stoker",
        "warmth": route.warmth,
        "aliases": route.aliases,
    }


def _card(route: ModelRoute, name: str) -> dict[str, Any]:
    """What is shown of `name`, which may be one of its adapters."""
    shown = _shown(route)
    if name in route.adapters:
        shown |= {"id": name, "aliases": (), "parent": route.name}
    return shown


def _listing(routes: tuple[ModelRoute, ...]) -> web.Response:
    cards = [_card(route, name) for route in routes for name in (route.name, *route.adapters)]
    return _json({"object": "list", "data": cards})


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
