"""The admin API's handlers for routes and the audit trail.

Rules this file keeps: handlers ask the rule book and show what it has; they decide nothing.
"""

from __future__ import annotations

import time

from aiohttp import web

from runtime.contract.route_rules import parse_rule
from runtime.contract.schema import SchemaError
from runtime.wire.routes import RouteTarget
from scheduler.admin import route_views as v
from scheduler.admin.http import WHO, AdminError, read_body, read_json, reply, whole_number
from scheduler.driver import Driver
from scheduler.errors import bad
from scheduler.policy.model_routes import warmth
from scheduler.route_book import RuleBook, StoredRoute


class RouteApi:
    """The handlers; `route_table` names them `rules.<method>`."""

    def __init__(self, driver: Driver, book: RuleBook) -> None:
        self._driver = driver
        self._book = book

    async def list_routes(self, _: web.Request) -> web.Response:
        """List the routes."""
        views = [self._view(stored) for _, stored in sorted(self._book.routes.items())]
        return reply(v.Routes(routes=tuple(views)))

    async def show_route(self, request: web.Request) -> web.Response:
        """Show a route and where it stands."""
        return self._shown(request)

    async def put_route(self, request: web.Request) -> web.Response:
        """Add or change a route, which begins its canary, if it has one."""
        name, raw = request.match_info["name"], await read_json(request)
        try:
            rule = parse_rule(raw)
        except SchemaError as error:
            raise AdminError(422, str(error), problems=error.problems) from None
        if rule.name != name:
            fix = f"use {name!r}, or the other address"
            raise bad("name", rule.name, "is not the name in the address", fix)
        created = await self._book.put(rule, _who(request))
        await self._driver.routers_follow()
        return self._shown(request, 201 if created else 200)

    async def delete_route(self, request: web.Request) -> web.Response:
        """Remove a route; its models stay."""
        await self._book.remove(request.match_info["name"], _who(request))
        return web.Response(status=204)

    async def switch_route(self, request: web.Request) -> web.Response:
        """Warm a target, then send it everything."""
        name, body = request.match_info["name"], await read_body(request, v.SwitchBody)
        await self._book.switch(name, body.to, body.deadline_s, _who(request))
        return self._shown(request, 202)

    async def promote_route(self, request: web.Request) -> web.Response:
        """Send everything to the canary."""
        name, body = request.match_info["name"], await read_body(request, v.ReasonBody)
        await self._book.promote(name, _who(request), body.reason)
        await self._driver.routers_follow()
        return self._shown(request)

    async def roll_back_route(self, request: web.Request) -> web.Response:
        """Send nothing to the canary any more, or call a pending switch off."""
        name, body = request.match_info["name"], await read_body(request, v.ReasonBody)
        await self._book.rollback(name, _who(request), body.reason)
        await self._driver.routers_follow()
        return self._shown(request)

    async def list_audit(self, request: web.Request) -> web.Response:
        """List who changed what, the newest first."""
        limit, route = whole_number(request, "limit", 100), request.query.get("route")
        entries = reversed(self._book.audit.entries)
        found = [e for e in entries if route is None or e.subject == f"route {route}"]
        return reply(v.Audit(audit=tuple(found[:limit])))

    # ------------------------------------------------------------------------- views

    def _shown(self, request: web.Request, status: int = 200) -> web.Response:
        return reply(self._view(self._book.find(request.match_info["name"])), status)

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
    return str(request[WHO])
