"""The scheduler's HTTP face: the admin API, and what agents and routers talk to.

Rules this file keeps: handlers enqueue events and read snapshots; they decide nothing. A body that
is refused names every field that is wrong.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Collection
from datetime import datetime
from importlib.metadata import version as installed_version
from operator import attrgetter
from typing import Any, NoReturn

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from runtime import outside
from runtime.contract.access import ROLES, Role, RouterUsage
from runtime.contract.prewarm import Ask
from runtime.contract.schema import SchemaError, check
from runtime.contract.spec_file import json_schema, name_clashes, parse_spec, source_problems
from runtime.leftovers import drop_packed
from runtime.places import url
from runtime.registry.protocol import RegistryError
from runtime.wire.agent_messages import Heartbeat, HeartbeatReply, SpecProblem
from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import REPLICA_ID
from runtime.wire.routes import DemandReport
from scheduler.admin import view_builders
from scheduler.admin import views as v
from scheduler.admin.access_api import AccessApi
from scheduler.admin.cache_api import CacheClient, CachePullBody
from scheduler.admin.http import (
    SUBJECT,
    WHO,
    AdminError,
    decode_body,
    number,
    read_body,
    read_json,
    refusal,
    reply,
    whole_number,
)
from scheduler.admin.metrics import ColdStartTimes, StateCollector
from scheduler.admin.openapi import document
from scheduler.admin.route_api import RouteApi
from scheduler.admin.route_table import ADMIN
from scheduler.admin.spec_inspection import inspect_spec
from scheduler.admin.what_if import questions, what_if
from scheduler.driver import Driver
from scheduler.errors import ChangeRefused, bad, unknown
from scheduler.policy.model_routes import adapters_on
from scheduler.state import messages as m
from scheduler.state.cluster import Model, Node, Replica

log = logging.getLogger("stoker.scheduler")


class _Leader(msgspec.Struct):
    """Of the registry's leader key."""

    url: str | None = None


VERSION = installed_version("stoker-serve")
MAX_WAIT_S = 60.0


def make_app(driver: Driver) -> web.Application:
    """The application; its routes are `route_table.ADMIN` and /internal."""
    api = Api(driver)
    app = web.Application(middlewares=[_errors, api.guard], client_max_size=8 * 2**20)
    app.on_response_prepare.append(drop_packed)
    for route in ADMIN:
        app.router.add_route(route.method, route.path, attrgetter(route.handler)(api))
    app.router.add_post("/internal/heartbeat", api.heartbeat)
    app.router.add_post("/internal/demand", api.demand)
    app.router.add_get("/internal/routes", api.routes)
    app.router.add_get("/internal/keys", api.keys)
    app.router.add_post("/internal/usage", api.usage)
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
_MODEL_CHANGES = ("create_model", "put_model", "delete_model")


class Api:
    """One handler a route; `guard` runs before each."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.core = driver.core
        self.access = AccessApi(driver.access)
        self.rules = RouteApi(driver)
        self._open = {(r.method, r.path) for r in ADMIN if r.open}
        self._standby = {(r.method, r.path) for r in ADMIN if r.standby}
        self._needs = {(r.method, r.path): r.needs for r in ADMIN}
        self._audited = {
            (r.method, r.path): r.handler.removeprefix("access.")
            for r in ADMIN
            if r.method != "GET"
            and (r.handler.startswith("access.") or r.handler in _MODEL_CHANGES)
        }
        self._metrics = CollectorRegistry()
        self._metrics.register(StateCollector(driver))
        driver.on_cold_start = ColdStartTimes(self._metrics).observe
        self._caches = CacheClient(driver)
        self._openapi = msgspec.json.encode(document(ADMIN, VERSION))

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Check the token and the lead before a handler, and write the audit trail after it."""
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        if (request.method, path) not in self._open and resource is not None:
            if not (path == "/metrics" and self._is_scraper(request)):
                await self._check_token(request, self._needs.get((request.method, path)))
            if not self.driver.leads and (request.method, path) not in self._standby:
                await self._not_leading()
        response: web.StreamResponse = await handler(request)
        if response.status < 400 and (request.method, path) in self._audited:
            await self._audit(request, self._audited[request.method, path])
        return response

    async def _audit(self, request: web.Request, action: str) -> None:
        """Note who changed a model or whose access; secrets and bodies are left out."""
        book = self.driver.rules
        async with book.lock:
            subject = request.get(SUBJECT, request.path)
            await book.audit.note(request[WHO], action, subject, "by the admin API")

    def _is_scraper(self, request: web.Request) -> bool:
        token = self.driver.config.metrics_token
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return bool(token) and hmac.compare_digest(outside.header(given), token.encode())

    async def _check_token(self, request: web.Request, needs: Role | None) -> None:
        """`needs`: the least role; None where only the cluster's own token counts."""
        token = self.driver.config.cluster_token
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token or hmac.compare_digest(outside.header(given), token.encode()):
            request[WHO] = "cluster"
            return
        known = await self.driver.access.admin(given, self.driver.leads) if needs else None
        if known is None or needs is None:
            raise AdminError(
                401, "the token is missing or wrong: send Authorization: Bearer <token>"
            )
        if ROLES[known.role] < ROLES[needs]:
            message = f"this takes the role {needs}; token {known.name!r} is {known.role}"
            raise AdminError(403, message)
        request[WHO] = known.name

    async def _not_leading(self) -> NoReturn:
        try:
            entry = await self.driver.store.registry.get(self.driver.store.key("leader"))
        except RegistryError:
            entry = None
        leader = outside.decode(entry.value, _Leader).url if entry else None
        leader = None if leader == self.driver.url else leader
        why = f": {self.driver.why_not_leading}" if self.driver.why_not_leading else ""
        raise AdminError(503, f"this scheduler is not the leader{why}", leader=leader)

    # ------------------------------------------------------------------------------- internal

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Take an agent's heartbeat."""
        heartbeat = decode_body(await request.read(), Heartbeat)
        await self.driver.hear_epoch(heartbeat.epoch)
        self.driver.apply(m.HeartbeatSeen(now=self.driver.now(), heartbeat=heartbeat))
        state = self.core.state
        return reply(
            HeartbeatReply(term=state.term, adapters=adapters_on(state, heartbeat.node_id))
        )

    async def demand(self, request: web.Request) -> web.Response:
        """Take a router's demand report."""
        report = decode_body(await request.read(), DemandReport)
        self.driver.apply(m.DemandSeen(now=self.driver.now(), report=report))
        self.driver.rules.heard(report)
        return web.Response(status=204)

    async def routes(self, request: web.Request) -> web.Response:
        """Give a router the route table, as soon as it is newer than `since`."""
        since = whole_number(request, "since", 0)
        wait_s = min(number(request, "wait_s", 0.0), MAX_WAIT_S)
        table = await self.driver.routes_after(since, wait_s)
        if not self.driver.leads:
            await self._not_leading()
        return reply(table) if table is not None else web.Response(status=204)

    async def keys(self, request: web.Request) -> web.Response:
        """Give a router the key table, as soon as it is newer than `since`."""
        since = whole_number(request, "since", 0)
        wait_s = min(number(request, "wait_s", 0.0), MAX_WAIT_S)
        table = await self.driver.access.table_after(since, wait_s)
        if not self.driver.leads:
            await self._not_leading()
        return reply(table) if table is not None else web.Response(status=204)

    async def usage(self, request: web.Request) -> web.Response:
        """Take a router's usage report; answers what the other routers used."""
        return reply(self.driver.access.tell(decode_body(await request.read(), RouterUsage)))

    # ------------------------------------------------------------------------------- models

    async def list_models(self, _: web.Request) -> web.Response:
        """List the models."""
        return reply(view_builders.models(self.core, self.driver.now()))

    async def show_model(self, request: web.Request) -> web.Response:
        """Show a model."""
        return self._model_reply(self._model(request))

    async def create_model(self, request: web.Request) -> web.Response:
        """Add a model."""
        spec = await _spec(request)
        if spec.name in self.core.state.models:
            how = "PUT to its address, or `stoker model add` without --new, changes it"
            raise AdminError(409, f"it exists already: {how}")
        request[SUBJECT] = f"{request.path}/{spec.name}"
        return await self._save(spec)

    async def put_model(self, request: web.Request) -> web.Response:
        """Add or change a model."""
        spec = await _spec(request)
        if spec.name != request.match_info["name"]:
            problem = SpecProblem(
                field="name", value=spec.name, message="is not the name in the address",
                fix=f"use {request.match_info['name']!r}, or the other address; to rename, add"
                " the model under its new name and remove the old one",
            )  # fmt: skip
            raise AdminError(422, str(problem), problems=(problem,))
        return await self._save(spec)

    async def _save(self, spec: ModelSpec) -> web.Response:
        others = [e.stored.spec for n, e in self.core.state.models.items() if n != spec.name]
        if clashes := name_clashes([*others, spec]):
            raise AdminError(409, "\n".join(map(str, clashes)), problems=tuple(clashes))
        self.driver.rules.refuse_model(spec)
        found = await inspect_spec(self.driver, spec, fetch=True)
        if found.problems:
            raise AdminError(422, "\n".join(map(str, found.problems)), problems=found.problems)
        before = self.core.state.models.get(spec.name)
        created, changed = before is None, before is None or before.stored.spec != spec
        stored = m.StoredModel(spec=spec, estimate=found.estimate, lora_rank=found.lora_rank)
        await self.driver.store_model(stored.after(before.stored if before else None))
        await self.driver.routers_follow()
        view = view_builders.model(self.core, self.core.state.models[spec.name], self.driver.now())
        saved = v.Saved(
            created=created,
            model=view,
            changed=changed,
            checked_against=found.checked_against,
            notes=found.notes,
        )
        return reply(saved, 201 if created else 200)

    async def delete_model(self, request: web.Request) -> web.Response:
        """Remove a model, draining its replicas."""
        name = self._model(request).spec.name
        async with self.driver.rules.lock:
            self.driver.rules.refuse_removal(name)
            await self.driver.remove_model(name)
        return web.Response(status=204)

    async def load_model(self, request: web.Request) -> web.Response:
        """Start replicas ahead of requests."""
        model = self._model(request)
        body = await read_body(request, v.LoadBody)
        if not 1 <= body.replicas <= model.spec.max_replicas:
            problem = SpecProblem(
                field="replicas", value=body.replicas, message="is out of range",
                fix=f"ask for 1 to {model.spec.max_replicas} (the model's max_replicas)",
            )  # fmt: skip
            raise AdminError(422, str(problem), problems=(problem,))
        event = m.LoadAsked(now=self.driver.now(), model=model.spec.name, replicas=body.replicas)
        self.driver.apply(event)
        return self._model_reply(model, 202)

    async def unload_model(self, request: web.Request) -> web.Response:
        """Drain and stop a model's replicas."""
        model = self._model(request)
        self._refuse_unload(model, model.replicas)
        self.driver.apply(m.UnloadAsked(now=self.driver.now(), model=model.spec.name))
        return self._model_reply(model, 202)

    async def pin_model(self, request: web.Request) -> web.Response:
        """Keep a model running, or stop to."""
        model = self._model(request)
        body = await read_body(request, v.PinBody)
        await self.driver.pin_model(model.spec.name, body.pinned)
        return self._model_reply(model)

    async def prewarm_model(self, request: web.Request) -> web.Response:
        """Have a model warm by a time, for a while."""
        model = self._model(request)
        body = await read_body(request, v.PrewarmBody)
        ask = _ask(body, time.time())
        await self.driver.ask_prewarm(model.spec.name, ask)
        return self._model_reply(model, 202)

    def _refuse_unload(self, model: Model, stopped: Collection[str]) -> None:
        """Refuse to stop what would be started again at once; says what to change instead."""
        left = sum(r.replica_id not in stopped for r in model.coming())
        if model.pinned and left < 1:
            raise AdminError(409, f"model {model.spec.name!r} is pinned: unpin it first")
        if left < model.spec.min_replicas:
            raise AdminError(
                409,
                f"model {model.spec.name!r} has min_replicas {model.spec.min_replicas}:"
                " lower that first",
            )

    def _model(self, request: web.Request) -> Model:
        name = request.match_info["name"]
        models = self.core.state.models
        if name in models:
            return models[name]
        for model in models.values():
            if name in model.spec.aliases:
                return model
        names = [n for model in models.values() for n in model.spec.names()]
        raise unknown("model", name, names)

    def _model_reply(self, model: Model, status: int = 200) -> web.Response:
        return reply(view_builders.model(self.core, model, self.driver.now()), status)

    # ------------------------------------------------------------------------------- replicas

    async def list_replicas(self, _: web.Request) -> web.Response:
        """List the replicas."""
        return reply(view_builders.replicas(self.core, self.driver.now()))

    async def show_replica(self, request: web.Request) -> web.Response:
        """Show a replica."""
        replica = self._replica(request)
        return reply(view_builders.replica(self.core, replica, self.driver.now()))

    async def unload_replica(self, request: web.Request) -> web.Response:
        """Drain and stop one replica."""
        replica = self._replica(request)
        model = self.core.state.models.get(replica.model)
        if model is not None:
            self._refuse_unload(model, {replica.replica_id})
        event = m.UnloadAsked(
            now=self.driver.now(), model=replica.model, replica_id=replica.replica_id
        )
        self.driver.apply(event)
        return reply(view_builders.replica(self.core, replica, self.driver.now()), 202)

    async def replica_logs(self, request: web.Request) -> web.StreamResponse:
        """Passed through from the agent that has them; a stopped replica's stay readable."""
        replica_id = request.match_info["id"]
        if not REPLICA_ID.fullmatch(replica_id):
            raise unknown("replica", replica_id, list(self.core.state.replicas))
        query = {
            "tail": str(whole_number(request, "tail", 200)),
            "follow": "1" if request.query.get("follow") == "1" else "0",
        }
        replica = self.core.state.replicas.get(replica_id)
        nodes = [replica.node_id] if replica else list(self.core.state.nodes)
        error = ""
        for node_id in nodes:
            address = self.driver.agent_address(node_id)
            if address is None:
                continue
            where = url(address, "agent", "replicas", replica_id, "logs")
            timeout = aiohttp.ClientTimeout(total=None, connect=5)
            try:
                async with self.driver.http.get(where, params=query, timeout=timeout) as upstream:
                    if upstream.status == 200:
                        return await _pass_on(request, upstream)
                    error = f"node {node_id}: HTTP {upstream.status}"
                    if upstream.status == 404:
                        error = ""
            except aiohttp.ClientError as problem:
                error = f"node {node_id}: {problem}"
        if error:
            raise AdminError(502, f"the log of {replica_id!r} cannot be read: {error}")
        raise unknown("replica", replica_id, list(self.core.state.replicas))

    def _replica(self, request: web.Request) -> Replica:
        replica_id = request.match_info["id"]
        if replica_id not in self.core.state.replicas:
            raise unknown("replica", replica_id, list(self.core.state.replicas))
        return self.core.state.replicas[replica_id]

    # ------------------------------------------------------------------------------- nodes

    async def list_nodes(self, _: web.Request) -> web.Response:
        """List the nodes."""
        return reply(view_builders.nodes(self.core, self.driver.now()))

    async def cordon_node(self, request: web.Request) -> web.Response:
        """Place nothing new on a node."""
        return await self._set_cordon(request, cordoned=True)

    async def drain_node(self, request: web.Request) -> web.Response:
        """Cordon a node and move off what it runs, or stop it at the deadline."""
        body = await read_body(request, v.DrainBody)
        if not 0 <= body.deadline_s <= 86400:
            raise bad("deadline_s", body.deadline_s, "is out of range", "use 0 to 86400 seconds")
        return await self._set_cordon(request, cordoned=True, drain_s=body.deadline_s)

    async def uncordon_node(self, request: web.Request) -> web.Response:
        """Use a node again."""
        return await self._set_cordon(request, cordoned=False)

    async def _set_cordon(
        self, request: web.Request, cordoned: bool, drain_s: float | None = None
    ) -> web.Response:
        node = self._node(request)
        await self.driver.cordon_node(node.node_id, cordoned, drain_s)
        return reply(view_builders.node(node, self.driver.now()))

    async def quarantine_device(self, request: web.Request) -> web.Response:
        """Use a device no more and move off what it runs."""
        node, device_id = self._device(request)
        body = await read_body(request, v.QuarantineBody)
        if not body.reason.strip():
            raise bad("reason", body.reason, "is empty", "say why, for whoever releases it")
        return self._set_quarantine(node, device_id, body.reason)

    async def release_device(self, request: web.Request) -> web.Response:
        """Use a quarantined device again."""
        node, device_id = self._device(request)
        if device_id not in node.quarantine:
            raise AdminError(409, f"device {device_id!r} of node {node.node_id} is not quarantined")
        return self._set_quarantine(node, device_id, None)

    def _set_quarantine(self, node: Node, device_id: str, reason: str | None) -> web.Response:
        now = self.driver.now()
        event = m.QuarantineSet(now=now, node_id=node.node_id, device_id=device_id, reason=reason)
        self.driver.apply(event)
        return reply(view_builders.node(node, now))

    def _device(self, request: web.Request) -> tuple[Node, str]:
        node, device_id = self._node(request), request.match_info["device"]
        if device_id not in node.devices:
            raise unknown(f"device of node {node.node_id}", device_id, list(node.devices))
        return node, device_id

    async def plan(self, request: web.Request) -> web.Response:
        """Say what would be decided, without doing it."""
        body = await _plan_body(request)
        if body.add is None and body.load is None and body.remove_node is None:
            raise bad("body", None, "asks nothing", "give one of add, load, remove_node")
        if not 1 <= body.replicas <= 1024:
            raise bad("replicas", body.replicas, "is out of range", "ask for 1 to 1024")
        if body.add is not None:
            body = msgspec.structs.replace(body, add=await self._sized(body.add))
        try:
            events = questions(self.core, body, self.driver.now())
        except LookupError as error:
            kind, _, name = str(error.args[0]).partition(" ")
            known = self.core.state.models if kind == "model" else self.core.state.nodes
            raise unknown(kind, name, list(known)) from None
        return reply(what_if(self.core, events))

    async def _sized(self, spec: ModelSpec) -> ModelSpec:
        """With its estimated size where none is declared."""
        found = await inspect_spec(self.driver, spec, fetch=False)
        if found.problems:
            raise AdminError(422, "\n".join(map(str, found.problems)), problems=found.problems)
        stored = m.StoredModel(spec=spec, estimate=found.estimate, lora_rank=found.lora_rank)
        return stored.effective()

    def _node(self, request: web.Request) -> Node:
        node_id = request.match_info["id"]
        node = self.core.state.nodes.get(node_id)
        if node is None or node.heartbeat is None:
            raise unknown("node", node_id, list(self.core.state.nodes))
        return node

    async def list_devices(self, _: web.Request) -> web.Response:
        """List the devices."""
        return reply(view_builders.devices(self.core))

    async def show_queue(self, _: web.Request) -> web.Response:
        """Show the requests that wait and are in flight, by model."""
        return reply(view_builders.queue(self.core))

    # ------------------------------------------------------------------------------- caches

    async def show_caches(self, request: web.Request) -> web.Response:
        """Show the model caches of the nodes."""
        return reply(await self._caches.view(self._cache_nodes(request)))

    async def pull_model(self, request: web.Request) -> web.Response:
        """Have nodes fetch a model before it is needed."""
        body = await read_body(request, CachePullBody)
        _check_source(body.model)
        nodes = [self._known_node(node_id) for node_id in body.nodes] or self._caches.live_nodes()
        if body.count is not None:
            if not 1 <= body.count <= len(nodes):
                problem = SpecProblem(
                    field="count", value=body.count, message="is out of range",
                    fix=f"ask for 1 to {len(nodes)} nodes",
                )  # fmt: skip
                raise AdminError(422, str(problem), problems=(problem,))
            nodes = nodes[: body.count]
        return reply(await self._caches.pull(body, nodes), 202)

    async def remove_cached(self, request: web.Request) -> web.Response:
        """Remove a model from caches."""
        nodes = self._cache_nodes(request)
        return reply(await self._caches.remove(_cached_model(request), nodes))

    async def verify_cached(self, request: web.Request) -> web.Response:
        """Have a cached model read again and checked."""
        nodes = self._cache_nodes(request)
        return reply(await self._caches.verify(_cached_model(request), nodes))

    def _cache_nodes(self, request: web.Request) -> list[str]:
        node_id = request.query.get("node")
        return [self._known_node(node_id)] if node_id else self._caches.live_nodes()

    def _known_node(self, node_id: str) -> str:
        if node_id not in self._caches.live_nodes():
            raise unknown("live node", node_id, self._caches.live_nodes())
        return node_id

    async def list_cold_starts(self, request: web.Request) -> web.Response:
        """List the post-mortems of cold starts and wakes."""
        limit = whole_number(request, "limit", 50)
        model = request.query.get("model")
        return reply(view_builders.cold_starts(self.core, self.driver.now(), limit, model))

    async def show_footprint(self, request: web.Request) -> web.Response:
        """Show what a model was declared, estimated and measured to take."""
        return reply(view_builders.footprints(self._model(request)))

    async def list_decisions(self, request: web.Request) -> web.Response:
        """List what was decided, and why."""
        limit = whole_number(request, "limit", 100)
        model = request.query.get("model")
        return reply(view_builders.decisions(self.core, self.driver.now(), limit, model))

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
        state, leads = self.core.state, self.driver.leads
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


# ------------------------------------------------------------------------------- small helpers


def _ask(body: v.PrewarmBody, wall_s: float) -> Ask:
    """An operator's wish; a time in words that can't be read is named."""
    by = wall_s
    if body.by is not None:
        try:
            moment = datetime.fromisoformat(body.by)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            problem = SpecProblem(
                field="by", value=body.by, message="is not a time with a time zone",
                fix="write ISO 8601, e.g. 2026-11-24T08:00:00+01:00",
            )  # fmt: skip
            raise AdminError(422, str(problem), problems=(problem,))
        by = moment.timestamp()
    if body.for_s <= 0 or by + body.for_s <= wall_s:
        problem = SpecProblem(
            field="for_s", value=body.for_s, message="ends in the past",
            fix="ask for a time that is still to come",
        )  # fmt: skip
        raise AdminError(422, str(problem), problems=(problem,))
    return Ask(rung=body.rung, by=by, for_s=body.for_s)


def _cached_model(request: web.Request) -> str:
    model = request.query.get("model", "")
    if not model:
        raise AdminError(400, "model: say which, as it was asked for, e.g. ?model=hf:org/name")
    _check_source(model)
    return model


def _check_source(source: str) -> None:
    if problems := tuple(source_problems(source, "model")):
        raise AdminError(422, "\n".join(map(str, problems)), problems=problems)


async def _plan_body(request: web.Request) -> v.PlanBody:
    raw = await read_json(request)
    try:
        added = parse_spec(raw.pop("add")) if isinstance(raw, dict) and raw.get("add") else None
        return msgspec.structs.replace(check(raw, v.PlanBody), add=added)
    except SchemaError as error:
        raise AdminError(422, str(error), problems=error.problems) from None


async def _spec(request: web.Request) -> ModelSpec:
    raw = await read_json(request)
    try:
        return parse_spec(raw)
    except SchemaError as error:
        raise AdminError(422, str(error), problems=error.problems) from None


async def _pass_on(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    async for chunk in upstream.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response
