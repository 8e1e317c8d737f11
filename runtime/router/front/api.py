"""The router's HTTP surface: OpenAI's API, `/invoke`, one base URL per model, health, metrics.

Rules this file keeps:
- every error has the shape of its path's protocol and every answer carries X-Request-ID;
- a path reaches an engine only if `paths` lists it; any other is refused before its body is read;
- a JSON body is passed on as it came, unless the path names the model.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as installed_version

from aiohttp import web

from runtime import outside
from runtime.answers import json_answer
from runtime.bearer import token_of
from runtime.leftovers import drop_packed
from runtime.router.admission.refusals import NO_TABLE
from runtime.router.call import body as bodies
from runtime.router.call.errors import CallError, internal_error
from runtime.router.call.paths import ROOT_PATHS, STREAMS, V1_PATHS, engine_target
from runtime.router.call.request import ANONYMOUS, Call, Caller
from runtime.router.call.request_ids import RequestIds
from runtime.router.callers.keys import given_token, sees
from runtime.router.control.other_workers import MADE, OWN, Siblings, is_sibling
from runtime.router.front import cards
from runtime.router.front.cors import Cors
from runtime.router.front.openapi import document, page
from runtime.router.front.response_handlers import StoredHandlers
from runtime.router.jobs.service import Jobs
from runtime.router.observe.access_log import LogLine
from runtime.router.proxy.exchange import meant
from runtime.router.proxy.responder import CALLER, REQUEST_ID, AiohttpClient
from runtime.router.proxy.serving import Proxy
from runtime.wire.routes import ModelRoute, RouteTable

log = logging.getLogger("stoker.router")

_TAKEN = web.RequestKey("taken", int)  # bytes of the budget for its body
_SERVED = web.RequestKey("served", bool)  # by the proxy, which tells of it
_UNLOGGED = {"/healthz", "/readyz", "/metrics", "/health", "/ping", MADE}
_GOOD_REQUEST_ID = re.compile(r"[!-~]{1,128}")

_HEALTH = ("/health", "/ping")  # as vLLM has them, for probes and load generators
_OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/version", MADE, *_HEALTH}
_OWN_PATHS = f"/models/{{model:.+?}}{{path:{'|'.join(map(re.escape, V1_PATHS))}}}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RouterApi:
    """Handlers over one Proxy. Set `draining` to make /readyz say no.

    `siblings`: the other workers on the same port, whose figures /metrics includes; `scrapers`:
    the tokens that open /metrics where there are no anonymous callers.
    """

    def __init__(
        self,
        proxy: Proxy,
        max_body_bytes: int,
        read_timeout_s: float,
        jobs: Jobs,
        siblings: Siblings | None = None,
        scrapers: tuple[str, ...] = (),
        cors: Cors | None = None,
    ) -> None:
        self._cors = cors or Cors(())
        self._jobs = jobs
        self._siblings = siblings
        self._scrapers = scrapers
        self._stored = StoredHandlers(proxy, siblings)
        self._proxy = proxy
        self._max_body_bytes = max_body_bytes
        self._read_timeout_s = read_timeout_s
        self._request_id = RequestIds()
        self._document = document(installed_version("stoker-serve"))
        self.draining = False

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[self._shaped])
        app.on_response_prepare.append(self._cors.mark)
        app.on_response_prepare.append(drop_packed)
        app.add_routes(
            [
                *self._jobs.routes(),
                *self._stored.routes(),
                *(web.post(path, self._openai) for path in (*V1_PATHS, *ROOT_PATHS)),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/invoke/{model:.+}", self._invoke),
                web.get("/models/{model:.+?}/v1/models", self._own_models),
                web.get("/models/{model:.+?}/v1/models/{name:.+}", self._own_model),
                web.post(_OWN_PATHS, self._own_openai),
                web.get("/healthz", self._healthz),
                *(web.get(path, self._health) for path in _HEALTH),
                web.post("/ping", self._health),
                web.get("/version", self._version_of),
                web.get("/load", self._load),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
                web.get("/docs", self._docs),
            ]
        )
        return app

    # -------------------------------------------------------------------------------- inference

    async def _openai(self, request: web.Request) -> web.StreamResponse:
        return await self._by_body(request, _engine_path(request, request.path))

    async def _by_body(self, request: web.Request, path: str) -> web.StreamResponse:
        """A call whose body names the model."""
        if not bodies.takes_form(types := _types(request), path):
            body = await self._body(request)
            body, head = self._read_head(request, body)
            return await self._serve(request, path, body, head)
        form, head = bodies.read_form(await self._body(request), types[0])
        bodies.checked(head)
        return await self._serve(request, path, form.with_model(head.model), head)

    def _read_head(self, request: web.Request, body: bytes) -> tuple[bytes, bodies.Head]:
        """A JSON body and its head; as with vLLM it need not name the one model there is."""
        try:
            return body, bodies.read_head(body)
        except CallError as error:
            if error.code != "missing_field":
                raise
            table = self._table()
            caller = request[CALLER]
            models = [r.name for r in table.models if sees(caller, cards.names(r, r.name))]
            if len(models) != 1 or table.rules:
                raise
            return bodies.with_model(body, models[0])

    async def _own_openai(self, request: web.Request) -> web.StreamResponse:
        model, path = request.match_info["model"], _engine_path(request, request.match_info["path"])
        self._visible(request, model)
        if not bodies.takes_form(types := _types(request), path):
            body, head = bodies.with_model(await self._body(request), model)
            return await self._serve(request, path, body, head)
        form, head = bodies.read_form(await self._body(request), types[0])
        head.model = model
        return await self._serve(request, path, form.with_model(model), head)

    async def _invoke(self, request: web.Request) -> web.StreamResponse:
        model = request.match_info["model"]
        self._visible(request, model)
        later = self._jobs.handlers.wanted(request)
        stream = False if later else _stream_wish(request)
        bodies.check_json(_types(request))
        call = bodies.invocation(await self._body(request), model, stream)
        if later:
            self._proxy.check_scope(request[CALLER], call.head.model, call.path)
            return await self._jobs.handlers.accept(request, call)
        return await self._serve(request, call.path, call.body, call.head)

    async def _serve(
        self, request: web.Request, path: str, body: bytes, head: bodies.Head
    ) -> web.StreamResponse:
        streams = bool(head.stream) and path.partition("?")[0] in STREAMS
        client = AiohttpClient(request)
        request_id, headers = request[REQUEST_ID], request.raw_headers
        call = Call(
            request_id, head.model, path, headers, body, streams, head, request[CALLER],
            address=self._address(request), asked=request.path,
        )  # fmt: skip
        request[_SERVED] = True
        await self._proxy.serve(call, client)
        if client.response is None:
            raise ConnectionResetError("the client hung up before its answer began")
        return client.response

    async def _body(self, request: web.Request) -> bytes:
        if request.content_length is not None and request.content_length > self._max_body_bytes:
            raise self._too_large(request.content_length)
        try:
            async with asyncio.timeout(self._read_timeout_s):
                return await self._whole(request)
        except TimeoutError:
            message = f"the body did not arrive in {self._read_timeout_s:g}s"
            raise CallError(408, "body_timeout", message) from None
        except web.RequestPayloadError as error:
            raise CallError(400, "invalid_body", f"the body cannot be read: {error}") from None

    async def _whole(self, request: web.Request) -> bytes:
        """The body, taken from the budget before it is read, or as it comes."""
        size, pieces = 0, []
        self._take(request, request.content_length or 0)
        while data := await request.content.readany():
            size += len(data)
            if size > self._max_body_bytes:
                raise self._too_large(None)
            self._take(request, max(0, size - request[_TAKEN]))
            pieces.append(data)
        return b"".join(pieces)

    def _take(self, request: web.Request, size_bytes: int) -> None:
        """For as long as the request lasts. Raises CallError (503)."""
        self._proxy.memory.take(size_bytes)
        request[_TAKEN] = request.get(_TAKEN, 0) + size_bytes

    def _too_large(self, size: int | None) -> CallError:
        got = "" if size is None else f", got {size}"
        message = f"the body may have at most {self._max_body_bytes} bytes (router.max_body_bytes)"
        return CallError(413, "body_too_large", message + got)

    # -------------------------------------------------------------------------------- models

    async def _models(self, request: web.Request) -> web.Response:
        models = self._table().models
        routes = self._proxy.gate.versions.listed(models)
        return json_answer(cards.listing((*models, *routes), partial(sees, request[CALLER])))

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        return json_answer(cards.card(self._visible(request, name), name))

    async def _own_models(self, request: web.Request) -> web.Response:
        own = self._visible(request, request.match_info["model"])
        return json_answer(cards.listing((own,), partial(sees, request[CALLER])))

    async def _own_model(self, request: web.Request) -> web.Response:
        own = self._visible(request, request.match_info["model"])
        name = request.match_info["name"]
        if self._visible(request, name).name != own.name:
            raise CallError(404, "model_not_found", f"only model {own.name!r} is served here")
        return json_answer(cards.card(own, name))

    def _visible(self, request: web.Request, model: str) -> ModelRoute:
        """What `model` names. Raises CallError: 403 for any name outside of the key's scope, so
        that nobody can tell whether it is there; 404."""
        bodies.check_model(model)
        route = self._find(model)
        names = cards.names(route, model) if route is not None else (model,)
        if not sees(request[CALLER], names):
            raise CallError(403, "not_allowed", f"this API key may not use model {model!r}")
        if route is None:
            close = meant(self._proxy.gate, request[CALLER], model)
            message = f"there is no model {model!r}{close}"
            raise CallError(404, "model_not_found", message, param="model")
        return route

    def _identify(self, request: web.Request) -> Caller:
        """By the first header that has a token, any Authorization before any X-Api-Key."""
        given = (
            given_token(outside.header(value))
            for name in ("Authorization", "X-Api-Key")
            for value in request.headers.getall(name, ())
        )
        return self._proxy.keys.identify(next(filter(None, given), ""), time.time())

    def _table(self) -> RouteTable:
        table = self._proxy.gate.table
        if table is None:
            raise CallError(503, "no_routes", NO_TABLE, retry_after_s=1.0)
        return table

    def _find(self, model: str) -> ModelRoute | None:
        table, route = self._table(), self._proxy.gate.find(model)
        if route is not None:
            return route
        routes = self._proxy.gate.versions.listed(table.models)
        return next((r for r in routes if model in (r.name, *r.aliases)), None)

    # -------------------------------------------------------------------------------- operations

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self.draining:
            return web.Response(status=503, text="draining\n")
        if self._proxy.gate.table is None:
            return web.Response(status=503, text="no route table yet\n")
        return web.Response(text="ready\n")

    async def _health(self, request: web.Request) -> web.Response:
        """As vLLM answers probes: by the status alone."""
        served = not self.draining and self._proxy.gate.table is not None
        return web.Response(status=200 if served else 503)

    async def _version_of(self, request: web.Request) -> web.Response:
        return json_answer({"version": self._document["info"]["version"]})

    async def _load(self, request: web.Request) -> web.Response:
        """Requests that this worker holds or has sent, as vLLM counts its own."""
        models, _ = self._proxy.gate.demand()
        return json_answer(
            {"server_load": sum(model.waiting + model.in_flight for model in models)}
        )

    async def _openapi(self, request: web.Request) -> web.Response:
        return json_answer(self._document)

    async def _docs(self, request: web.Request) -> web.Response:
        return web.Response(body=page(self._document), content_type="text/html", charset="utf-8")

    async def _metrics(self, request: web.Request) -> web.Response:
        self._check_metrics_token(request)
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        body = self._proxy.metrics.render()
        if self._siblings is not None and request.query != OWN:
            body = await self._siblings.metrics(body)
        return web.Response(body=body, headers={"Content-Type": content_type})

    def _check_metrics_token(self, request: web.Request) -> None:
        """Where callers need keys, so do scrapers; a sibling, on its Unix socket, does not."""
        if is_sibling(request):
            return
        if self._proxy.keys.anonymous:
            self._proxy.keys.check_local(request.raw_headers)
            return
        token = token_of(outside.header(request.headers.get("Authorization", "")))
        if not any(t and hmac.compare_digest(token, t.encode()) for t in self._scrapers):
            message = "send metrics_token, or the cluster token, as a bearer token"
            raise CallError(401, "invalid_api_key", message)

    @web.middleware
    async def _shaped(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request ids in and out, and every failure in its protocol's shape."""
        wish = request.headers.get("X-Request-ID", "")
        request_id = wish if _GOOD_REQUEST_ID.fullmatch(wish) else self._request_id()
        request[REQUEST_ID] = request_id
        code = None
        if (preflight := self._cors.preflight(request)) is not None:
            return preflight
        try:
            if request.path not in _OPEN:
                request[CALLER] = caller = self._identify(request)
                if caller is ANONYMOUS and not self._cors.allows(request.headers.get("Origin", "")):
                    self._proxy.keys.check_local(request.raw_headers)
            response = await handler(request)
        except CallError as error:
            code, response = error.code, _error_response(error, request)
        except web.HTTPException as error:
            shown = _of_http(request, error)
            code, response = shown.code, _error_response(shown, request)
        except Exception:
            log.exception("request %s failed inside the router", request_id)
            failed = internal_error()
            code, response = failed.code, _error_response(failed, request)
        finally:
            self._proxy.memory.give(request.get(_TAKEN, 0))
        return self._told(request, response, code)

    def refuse(self, request: web.BaseRequest, error: CallError, origin: str) -> web.Response:
        """The answer to what never came to a handler, told to the access log; `origin`: the page
        that it came from, as a browser writes it, "": none."""
        request[REQUEST_ID] = self._request_id()
        response = _error_response(error, request)
        self._cors.mark_for(origin, response)
        self._told(request, response, error.code)
        return response

    def _address(self, request: web.BaseRequest) -> str:
        return self._proxy.forwarded.address(request.remote or "", request.raw_headers)

    def _told(
        self, request: web.BaseRequest, response: web.StreamResponse, code: str | None
    ) -> web.StreamResponse:
        """Marked with its id, and in the access log if nobody else writes it there."""
        request_id = request[REQUEST_ID]
        if not response.prepared:
            response.headers["X-Request-ID"] = request_id
        access_log = self._proxy.access_log
        unlogged = code is None and request.path in _UNLOGGED
        if access_log is not None and _SERVED not in request and not unlogged:
            access_log.add(
                LogLine(
                    datetime.now(UTC), request_id, self._address(request), request.method,
                    request.path, response.status, code, *_whose(request),
                )
            )  # fmt: skip
        return response


def _of_http(request: web.Request, error: web.HTTPException) -> CallError:
    where = f"{request.method} {request.path}"
    if error.status == 404:
        return CallError(404, "not_found", f"there is no {where} here; the API is below /v1")
    if error.status == 405:
        allow = error.headers["Allow"].encode()
        message = f"{where} is not offered; {request.path} takes {allow.decode()}"
        return CallError(405, "method_not_allowed", message, headers=((b"Allow", allow),))
    return CallError(error.status, "http_error", error.reason)


def _whose(request: web.BaseRequest) -> tuple[str | None, str | None]:
    """Tenant and key of the caller, where it is known."""
    caller = request.get(CALLER)
    return (None, None) if caller is None else (caller.tenant, caller.key_id)


def _error_response(error: CallError, request: web.BaseRequest) -> web.Response:
    return web.Response(
        status=error.status,
        body=error.body(request.path, request[REQUEST_ID]),
        headers=error.headers(),
        content_type="application/json",
    )


def _engine_path(request: web.Request, path: str) -> str:
    """The request target for the engine. Raises CallError (400)."""
    target = engine_target(path, request.rel_url.raw_query_string)
    if target is None:
        raise CallError(
            400, "invalid_query", "the query has other characters than ASCII; quote them"
        )
    return target


def _types(request: web.Request) -> list[str]:
    return request.headers.getall("Content-Type", [])


def _stream_wish(request: web.Request) -> bool | None:
    text = request.query.get("stream")
    if text is None:
        return None
    if text.lower() not in ("true", "false", "1", "0"):
        message = f"stream must be true or false, got {text!r}"
        raise CallError(400, "invalid_field", message, param="stream")
    return text.lower() in ("true", "1")
