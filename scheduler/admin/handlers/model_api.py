"""The admin API's handlers for models, and what would be decided about them.

Rules this file keeps: handlers enqueue events and read snapshots; they decide nothing. A body that
is refused names every field that is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import datetime

import msgspec
from aiohttp import web

from runtime.contract.prewarm import Ask
from runtime.contract.schema import SchemaError, check
from runtime.contract.spec_file import name_clashes, parse_spec
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import ModelSpec
from scheduler.admin import view_builders
from scheduler.admin import views as v
from scheduler.admin.http import SUBJECT, WHY, AdminError, read_body, read_json, reply
from scheduler.admin.spec_inspection import inspect_spec
from scheduler.admin.what_if import questions, what_if
from scheduler.driver import Driver
from scheduler.errors import bad, unknown
from scheduler.route_book import RuleBook
from scheduler.state import messages as m
from scheduler.state.cluster import Model
from scheduler.stored_state import StoredState


class ModelApi:
    """The handlers; `route_table` names them `models.<method>`."""

    def __init__(self, driver: Driver, stored: StoredState, rules: RuleBook) -> None:
        self._driver = driver
        self._stored = stored
        self._rules = rules
        self._core = driver.core

    async def list_models(self, _: web.Request) -> web.Response:
        """List the models."""
        return reply(view_builders.models(self._core, self._driver.now()))

    async def show_model(self, request: web.Request) -> web.Response:
        """Show a model."""
        return self._model_reply(self._model(request))

    async def create_model(self, request: web.Request) -> web.Response:
        """Add a model."""
        spec = await _spec(request)
        if spec.name in self._core.state.models:
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
        others = [e.stored.spec for n, e in self._core.state.models.items() if n != spec.name]
        if clashes := name_clashes([*others, spec]):
            raise AdminError(409, "\n".join(map(str, clashes)), problems=tuple(clashes))
        self._rules.refuse_model(spec)
        found = await inspect_spec(self._core, self._driver.agents, spec, fetch=True)
        if found.problems:
            raise AdminError(422, "\n".join(map(str, found.problems)), problems=found.problems)
        before = self._core.state.models.get(spec.name)
        created, changed = before is None, before is None or before.stored.spec != spec
        stored = m.StoredModel(spec=spec, estimate=found.estimate, lora_rank=found.lora_rank)
        await self._stored.put_model(stored.after(before.stored if before else None))
        await self._driver.routers_follow()
        view = view_builders.model(
            self._core, self._core.state.models[spec.name], self._driver.now()
        )
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
        async with self._rules.lock:
            self._rules.refuse_removal(name)
            await self._stored.remove_model(name)
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
        event = m.LoadAsked(now=self._driver.now(), model=model.spec.name, replicas=body.replicas)
        self._driver.apply(event)
        return self._model_reply(model, 202)

    async def unload_model(self, request: web.Request) -> web.Response:
        """Drain and stop a model's replicas."""
        model = self._model(request)
        refuse_unload(model, model.replicas)
        self._driver.apply(m.UnloadAsked(now=self._driver.now(), model=model.spec.name))
        return self._model_reply(model, 202)

    async def pin_model(self, request: web.Request) -> web.Response:
        """Keep a model running, or stop to."""
        model = self._model(request)
        body = await read_body(request, v.PinBody)
        request[WHY] = "pinned" if body.pinned else "unpinned"
        await self._stored.pin_model(model.spec.name, body.pinned)
        return self._model_reply(model)

    async def prewarm_model(self, request: web.Request) -> web.Response:
        """Have a model warm by a time, for a while."""
        model = self._model(request)
        body = await read_body(request, v.PrewarmBody)
        ask = _ask(body, time.time())
        await self._stored.ask_prewarm(model.spec.name, ask)
        return self._model_reply(model, 202)

    def _model(self, request: web.Request) -> Model:
        name = request.match_info["name"]
        models = self._core.state.models
        if name in models:
            return models[name]
        for model in models.values():
            if name in model.spec.aliases:
                return model
        names = [n for model in models.values() for n in model.spec.names()]
        raise unknown("model", name, names)

    def _model_reply(self, model: Model, status: int = 200) -> web.Response:
        return reply(view_builders.model(self._core, model, self._driver.now()), status)

    async def show_footprint(self, request: web.Request) -> web.Response:
        """Show what a model was declared, estimated and measured to take."""
        return reply(view_builders.footprints(self._model(request)))

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
            events = questions(self._core, body, self._driver.now())
        except LookupError as error:
            kind, _, name = str(error.args[0]).partition(" ")
            known = self._core.state.models if kind == "model" else self._core.state.nodes
            raise unknown(kind, name, list(known)) from None
        return reply(what_if(self._core, events))

    async def _sized(self, spec: ModelSpec) -> ModelSpec:
        """With its estimated size where none is declared."""
        found = await inspect_spec(self._core, self._driver.agents, spec, fetch=False)
        if found.problems:
            raise AdminError(422, "\n".join(map(str, found.problems)), problems=found.problems)
        stored = m.StoredModel(spec=spec, estimate=found.estimate, lora_rank=found.lora_rank)
        return stored.effective()


def refuse_unload(model: Model, stopped: Collection[str]) -> None:
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
