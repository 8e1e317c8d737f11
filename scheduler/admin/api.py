"""The scheduler's HTTP face: the guard and the handlers put together, and what is of no subject.

Rules this file keeps: every failure is answered as `views.Error`. Each subject has its handlers in
`handlers/`.
"""

from __future__ import annotations

from importlib.metadata import version as installed_version
from operator import attrgetter
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from runtime.contract.config import Config
from runtime.contract.spec_file import json_schema
from runtime.leftovers import drop_packed
from runtime.registry.protocol import RegistryError
from scheduler.access import Access
from scheduler.admin import view_builders
from scheduler.admin import views as v
from scheduler.admin.cache_client import CacheClient
from scheduler.admin.guard import AdminGuard
from scheduler.admin.handlers.access_api import AccessApi
from scheduler.admin.handlers.cache_api import CacheApi
from scheduler.admin.handlers.internal_api import InternalApi
from scheduler.admin.handlers.model_api import ModelApi
from scheduler.admin.handlers.node_api import NodeApi
from scheduler.admin.handlers.replica_api import ReplicaApi
from scheduler.admin.handlers.route_api import RouteApi
from scheduler.admin.http import AdminError, refusal, reply, whole_number
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
    api = AdminApi(driver, stored, rules, access)
    guard = AdminGuard(
        ADMIN, config.cluster_token, config.metrics_token, driver, access, rules, leadership
    )
    app = web.Application(middlewares=[_errors, guard.around], client_max_size=8 * 2**20)
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


class AdminApi:
    """One handler a route; `guard.py` runs before and after each."""

    def __init__(
        self, driver: Driver, stored: StoredState, rules: RuleBook, access: Access
    ) -> None:
        self._driver = driver
        self._core = driver.core
        self.models = ModelApi(driver, stored, rules)
        self.replicas = ReplicaApi(driver)
        self.nodes = NodeApi(driver, stored)
        self.caches = CacheApi(CacheClient(driver.core, driver.agents))
        self.access = AccessApi(access)
        self.rules = RouteApi(driver, rules)
        self._metrics = CollectorRegistry()
        self._metrics.register(StateCollector(driver))
        driver.on_cold_start = ColdStartTimes(self._metrics).observe
        self._openapi = msgspec.json.encode(document(ADMIN, VERSION))

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
