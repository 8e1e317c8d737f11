"""The admin API's handlers for routes and the audit trail.

Rules this file keeps: handlers ask the rule book and show what it has; they decide nothing.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from runtime.rules import parse_rule
from runtime.schema import SchemaError, check
from runtime.wire import RouteTarget, SpecProblem
from scheduler import route_views as v
from scheduler.audit import DEFAULT_OPERATOR, OPERATOR
from scheduler.driver import Driver
from scheduler.rulebook import RuleRefused, StoredRoute
from scheduler.table import warmth

S = TypeVar("S", bound=msgspec.Struct)


class RouteApi:
    """One handler a route of `scheduler.routes`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._book = driver.rules

    async def list_routes(self, _: web.Request) -> web.Response:
        views = [self._view(stored) for _, stored in sorted(self._book.routes.items())]
        return _reply(v.Routes(routes=tuple(views)))

    async def show_route(self, request: web.Request) -> web.Response:
        return self._shown(request)

    async def put_route(self, request: web.Request) -> web.Response:
        name, raw = request.match_info["name"], await _json(request)
        try:
            rule = parse_rule(raw)
        except SchemaError as error:
            raise RuleRefused(422, str(error), error.problems) from None
        if rule.name != name:
            problem = SpecProblem(
                field="name", value=rule.name, message="is not the name in the address",
                fix=f"use {name!r}, or the other address",
            )  # fmt: skip
            raise RuleRefused(422, str(problem), [problem])
        created = await self._book.put(rule, _who(request))
        await self._driver.routers_follow()
        return self._shown(request, 201 if created else 200)

    async def delete_route(self, request: web.Request) -> web.Response:
        await self._book.remove(request.match_info["name"], _who(request))
        return web.Response(status=204)

    async def switch_route(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await _body(request, v.SwitchBody)
        await self._book.switch(name, body.to, body.deadline_s, _who(request))
        return self._shown(request, 202)

    async def promote_route(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await _body(request, v.ReasonBody)
        await self._book.promote(name, _who(request), body.reason)
        await self._driver.routers_follow()
        return self._shown(request)

    async def roll_back_route(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await _body(request, v.ReasonBody)
        await self._book.rollback(name, _who(request), body.reason)
        await self._driver.routers_follow()
        return self._shown(request)

    async def list_audit(self, request: web.Request) -> web.Response:
        limit, route = _limit(request), request.query.get("route")
        entries = reversed(self._book.audit.entries)
        found = [e for e in entries if route is None or e.subject == f"route {route}"]
        return _reply(v.Audit(audit=tuple(found[:limit])))

    # ------------------------------------------------------------------------- views

    def _shown(self, request: web.Request, status: int = 200) -> web.Response:
        return _reply(self._view(self._book.find(request.match_info["name"])), status)

    def _view(self, stored: StoredRoute) -> v.RouteView:
        rule, since = stored.rule, self._book.changed_at[stored.rule.name]
        return v.RouteView(
            name=rule.name,
            rule=rule,
            targets=tuple(self._target(stored, target) for target in rule.targets),
            since_s=self._driver.now() - since,
            canary=self._canary(stored),
            switch=self._switch(stored),
        )

    def _target(self, stored: StoredRoute, target: RouteTarget) -> v.TargetView:
        whole = sum(t.weight for t in stored.rule.targets)
        model = self._driver.core.state.models.get(target.model)
        counts = self._book.observed.of(stored.rule.name, target.model)
        return v.TargetView(
            model=target.model,
            version=target.version,
            share=100 * target.weight / whole,
            warmth=warmth(model, self._driver.now()) if model else "cold",
            ready=len(model.ready()) if model else 0,
            requests=counts.requests,
            errors=counts.errors,
            mean_ttft_s=counts.mean_ttft_s() if counts.first_bytes else None,
        )

    def _canary(self, stored: StoredRoute) -> v.CanaryView | None:
        name, canary = stored.rule.name, stored.rule.canary
        if canary is None:
            return None
        return v.CanaryView(
            model=canary.model,
            step=stored.step + 1,
            steps=len(canary.steps),
            share=canary.steps[stored.step],
            in_step_s=self._driver.now() - self._book.changed_at[name],
            waits_for=self._book.verdicts.get(name, "the first look at it"),
        )

    def _switch(self, stored: StoredRoute) -> v.SwitchView | None:
        switch = stored.switch
        if switch is None:
            return None
        model = self._driver.core.state.models.get(switch.to)
        return v.SwitchView(
            to=switch.to,
            ready=len(model.ready()) if model else 0,
            replicas=switch.replicas,
            deadline_s=max(0.0, switch.deadline_at - time.time()),
            problem=(model.unfit or model.problem or model.waiting_for) if model else None,
        )


def _who(request: web.Request) -> str:
    return str(request.get(OPERATOR, DEFAULT_OPERATOR))


def _reply(body: msgspec.Struct, status: int = 200) -> web.Response:
    data = msgspec.json.encode(body)
    return web.Response(body=data, status=status, content_type="application/json")


async def _json(request: web.Request) -> Any:
    try:
        return msgspec.json.decode(await request.read() or b"{}")
    except ValueError as error:
        raise RuleRefused(400, f"the body is not JSON: {error}") from None


async def _body(request: web.Request, kind: type[S]) -> S:
    try:
        return check(await _json(request), kind)
    except SchemaError as error:
        raise RuleRefused(422, str(error), error.problems) from None


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", "100")
    if not text.isdecimal():
        raise RuleRefused(400, f"limit: must be a whole number of at least 0 (got {text!r})")
    return int(text)
