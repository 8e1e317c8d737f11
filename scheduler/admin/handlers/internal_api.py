"""What agents and routers tell the scheduler, and ask it: /internal.

Rules this file keeps: handlers enqueue events and hand out tables; they decide nothing.
"""

from __future__ import annotations

from aiohttp import web

from runtime.contract.access import RouterUsage
from runtime.wire.agent_messages import Heartbeat, HeartbeatReply
from runtime.wire.routes import DemandReport
from scheduler.access import Access
from scheduler.admin.http import decode_body, not_leading, number, reply, whole_number
from scheduler.driver import Driver
from scheduler.leadership import Leadership
from scheduler.policy.model_routes import adapters_on
from scheduler.route_book import RuleBook
from scheduler.state import messages as m

MAX_WAIT_S = 60.0


class InternalApi:
    """The handlers; only the cluster's own token opens them."""

    def __init__(
        self, driver: Driver, rules: RuleBook, access: Access, leadership: Leadership
    ) -> None:
        self._driver = driver
        self._core = driver.core
        self._rules = rules
        self._access = access
        self._leadership = leadership

    def route_defs(self) -> list[web.RouteDef]:
        """What to add to the server."""
        return [
            web.post("/internal/heartbeat", self.heartbeat),
            web.post("/internal/demand", self.demand),
            web.get("/internal/routes", self.routes),
            web.get("/internal/keys", self.keys),
            web.post("/internal/usage", self.usage),
        ]

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Take an agent's heartbeat."""
        heartbeat = decode_body(await request.read(), Heartbeat)
        await self._leadership.hear_epoch(heartbeat.epoch)
        self._driver.apply(m.HeartbeatSeen(now=self._driver.now(), heartbeat=heartbeat))
        state = self._core.state
        return reply(
            HeartbeatReply(term=state.term, adapters=adapters_on(state, heartbeat.node_id))
        )

    async def demand(self, request: web.Request) -> web.Response:
        """Take a router's demand report."""
        report = decode_body(await request.read(), DemandReport)
        self._driver.apply(m.DemandSeen(now=self._driver.now(), report=report))
        self._rules.heard(report)
        return web.Response(status=204)

    async def routes(self, request: web.Request) -> web.Response:
        """Give a router the route table, as soon as it is newer than `since`."""
        since = whole_number(request, "since", 0)
        wait_s = min(number(request, "wait_s", 0.0), MAX_WAIT_S)
        table = await self._driver.routes_after(since, wait_s)
        if not self._driver.leads:
            await not_leading(self._leadership)
        return reply(table) if table is not None else web.Response(status=204)

    async def keys(self, request: web.Request) -> web.Response:
        """Give a router the key table, as soon as it is newer than `since`."""
        since = whole_number(request, "since", 0)
        wait_s = min(number(request, "wait_s", 0.0), MAX_WAIT_S)
        table = await self._access.table_after(since, wait_s)
        if not self._driver.leads:
            await not_leading(self._leadership)
        return reply(table) if table is not None else web.Response(status=204)

    async def usage(self, request: web.Request) -> web.Response:
        """Take a router's usage report; answers what the other routers used."""
        return reply(self._access.tell(decode_body(await request.read(), RouterUsage)))
