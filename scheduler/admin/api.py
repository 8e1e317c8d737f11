"""The scheduler's HTTP face: who may ask what, and the handlers put together.

Rules this file keeps: a caller is known, and the scheduler leads, before a handler runs; who
changed what is in the audit trail after it. Each subject has its handlers in `handlers/`.
"""

from __future__ import annotations

import hmac
from importlib.metadata import version as installed_version
from operator import attrgetter
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from runtime import outside
from runtime.contract.access import ROLES, Role
from runtime.contract.config import Config
from runtime.contract.spec_file import json_schema
from runtime.leftovers import drop_packed
from runtime.registry.protocol import RegistryError
from scheduler.access import Access
from scheduler.admin import view_builders
from scheduler.admin import views as v
from scheduler.admin.cache_client import CacheClient
from scheduler.admin.handlers.access_api import AccessApi
from scheduler.admin.handlers.cache_api import CacheApi
from scheduler.admin.handlers.internal_api import InternalApi
from scheduler.admin.handlers.model_api import ModelApi
from scheduler.admin.handlers.node_api import NodeApi
from scheduler.admin.handlers.replica_api import ReplicaApi
from scheduler.admin.handlers.route_api import RouteApi
from scheduler.admin.http import (
    SUBJECT,
    WHO,
    AdminError,
    not_leading,
    refusal,
    reply,
    whole_number,
)
from scheduler.admin.metrics import ColdStartTimes, StateCollector
from scheduler.admin.openapi import document
from scheduler.admin.route_table import ADMIN
from scheduler.driver import Driver
from scheduler.errors import ChangeRefused
from scheduler.leadership import Leadership
from scheduler.route_book import RuleBook
from scheduler.stored_state import StoredState

VERSION = installed_version("stoker-serve")


def make_app(
    config: Config,
    driver: Driver,
    stored: StoredState,
    rules: RuleBook,
    access: Access,
    leadership: Leadership,
) -> web.Application:
    """The application; its routes are `route_table.ADMIN` and /internal."""
    api = Api(config, driver, stored, rules, access, leadership)
    app = web.Application(middlewares=[_errors, api.guard], client_max_size=8 * 2**20)
    app.on_response_prepare.append(drop_packed)
    for route in ADMIN:
        app.router.add_route(route.method, route.path, attrgetter(route.handler)(api))
    app.router.add_routes(InternalApi(driver, rules, access, leadership).route_defs())
    return app


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except ChangeRefused as refused:
        error = refusal(refused)
        return reply(error.body, error.status)
    except AdminError as error:
        return reply(error.body, error.status)
    except RegistryError as error:
        message = f"nothing was changed: the registry does not answer ({error})"
        return reply(v.Error(error=v.ErrorBody(message=message)), 503)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = f"{request.method} {request.path}: {error.reason}"
        return reply(v.Error(error=v.ErrorBody(message=message)), error.status)


# Handlers whose callers the audit trail names, beside those of `access`.
_MODEL_CHANGES = ("models.create_model", "models.put_model", "models.delete_model")


class Api:
    """One handler a route; `guard` runs before each."""

    def __init__(
        self,
        config: Config,
        driver: Driver,
        stored: StoredState,
        rules: RuleBook,
        access: Access,
        leadership: Leadership,
    ) -> None:
        self._config = config
        self._driver = driver
        self._core = driver.core
        self._access = access
        self._leadership = leadership
        self._book = rules
        self.models = ModelApi(driver, stored, rules)
        self.replicas = ReplicaApi(driver)
        self.nodes = NodeApi(driver, stored)
        self.caches = CacheApi(CacheClient(driver.core, driver.agents))
        self.access = AccessApi(access)
        self.rules = RouteApi(driver, rules)
        self._open = {(r.method, r.path) for r in ADMIN if r.open}
        self._standby = {(r.method, r.path) for r in ADMIN if r.standby}
        self._needs = {(r.method, r.path): r.needs for r in ADMIN}
        self._audited = {
            (r.method, r.path): r.handler.rpartition(".")[2]
            for r in ADMIN
            if r.method != "GET"
            and (r.handler.startswith("access.") or r.handler in _MODEL_CHANGES)
        }
        self._metrics = CollectorRegistry()
        self._metrics.register(StateCollector(driver))
        driver.on_cold_start = ColdStartTimes(self._metrics).observe
        self._openapi = msgspec.json.encode(document(ADMIN, VERSION))

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Check the token and the lead before a handler, and write the audit trail after it."""
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        if (request.method, path) not in self._open and resource is not None:
            if not (path == "/metrics" and self._is_scraper(request)):
                await self._check_token(request, self._needs.get((request.method, path)))
            if not self._driver.leads and (request.method, path) not in self._standby:
                await not_leading(self._leadership)
        response: web.StreamResponse = await handler(request)
        if response.status < 400 and (request.method, path) in self._audited:
            await self._audit(request, self._audited[request.method, path])
        return response

    async def _audit(self, request: web.Request, action: str) -> None:
        """Note who changed a model or whose access; secrets and bodies are left out."""
        async with self._book.lock:
            subject = request.get(SUBJECT, request.path)
            await self._book.audit.note(request[WHO], action, subject, "by the admin API")

    def _is_scraper(self, request: web.Request) -> bool:
        token = self._config.metrics_token
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return bool(token) and hmac.compare_digest(outside.header(given), token.encode())

    async def _check_token(self, request: web.Request, needs: Role | None) -> None:
        """`needs`: the least role; None where only the cluster's own token counts."""
        token = self._config.cluster_token
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token or hmac.compare_digest(outside.header(given), token.encode()):
            request[WHO] = "cluster"
            return
        known = await self._access.admin(given, self._driver.leads) if needs else None
        if known is None or needs is None:
            raise AdminError(
                401, "the token is missing or wrong: send Authorization: Bearer <token>"
            )
        if ROLES[known.role] < ROLES[needs]:
            message = f"this takes the role {needs}; token {known.name!r} is {known.role}"
            raise AdminError(403, message)
        request[WHO] = known.name

    # ------------------------------------------------------------------------------- the whole

    async def show_queue(self, _: web.Request) -> web.Response:
        """Show the requests that wait and are in flight, by model."""
        return reply(view_builders.queue(self._core))

    async def list_cold_starts(self, request: web.Request) -> web.Response:
        """List the post-mortems of cold starts and wakes."""
        limit = whole_number(request, "limit", 50)
        model = request.query.get("model")
        return reply(view_builders.cold_starts(self._core, self._driver.now(), limit, model))

    async def list_decisions(self, request: web.Request) -> web.Response:
        """List what was decided, and why."""
        limit = whole_number(request, "limit", 100)
        model = request.query.get("model")
        return reply(view_builders.decisions(self._core, self._driver.now(), limit, model))

    # ------------------------------------------------------------------------------- open

    async def spec_schema(self, _: web.Request) -> web.Response:
        """Give the JSON Schema of a model spec."""
        return web.json_response(json_schema())

    async def healthz(self, _: web.Request) -> web.Response:
        """Say how this process is; 200 while it is alive."""
        return reply(self._health())

    async def readyz(self, _: web.Request) -> web.Response:
        """Say whether this scheduler leads and knows its nodes; 503 where it does not."""
        health = self._health()
        return reply(health, 200 if health.status == "ok" else 503)

    def _health(self) -> v.Health:
        state, leads = self._core.state, self._driver.leads
        status = "standby" if not leads else "recovering" if state.recovering else "ok"
        return v.Health(
            status=status,  # type: ignore[arg-type]  # mypy widens the three literals to str
            leader=leads,
            term=state.term,
            nodes=sum(1 for node in state.nodes.values() if node.live),
            models=len(state.models),
            version=VERSION,
        )

    async def metrics(self, _: web.Request) -> web.Response:
        """Give the metrics in Prometheus' format."""
        text = generate_latest(self._metrics)
        return web.Response(body=text, content_type="text/plain", charset="utf-8")

    async def openapi(self, _: web.Request) -> web.Response:
        """Give the OpenAPI document."""
        return web.Response(body=self._openapi, content_type="application/json")
