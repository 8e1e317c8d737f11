"""The admin API's handlers for nodes and their devices.

Rules this file keeps: handlers enqueue events and read snapshots; they decide nothing.
"""

from __future__ import annotations

from aiohttp import web

from scheduler.admin import view_builders
from scheduler.admin import views as v
from scheduler.admin.http import WHY, AdminError, read_body, reply
from scheduler.driver import Driver
from scheduler.errors import bad, unknown
from scheduler.state import messages as m
from scheduler.state.cluster import Node
from scheduler.stored_state import StoredState


class NodeApi:
    """The handlers; `route_table` names them `nodes.<method>`."""

    def __init__(self, driver: Driver, stored: StoredState) -> None:
        self._driver = driver
        self._stored = stored
        self._core = driver.core

    async def list_nodes(self, _: web.Request) -> web.Response:
        """List the nodes."""
        return reply(view_builders.nodes(self._core, self._driver.now()))

    async def cordon_node(self, request: web.Request) -> web.Response:
        """Place nothing new on a node."""
        return await self._set_cordon(request, cordoned=True)

    async def drain_node(self, request: web.Request) -> web.Response:
        """Cordon a node and move off what it runs, or stop it at the deadline."""
        body = await read_body(request, v.DrainBody)
        if not 0 <= body.deadline_s <= 86400:
            raise bad("deadline_s", body.deadline_s, "is out of range", "use 0 to 86400 seconds")
        request[WHY] = f"within {body.deadline_s:g} s"
        return await self._set_cordon(request, cordoned=True, drain_s=body.deadline_s)

    async def uncordon_node(self, request: web.Request) -> web.Response:
        """Use a node again."""
        return await self._set_cordon(request, cordoned=False)

    async def _set_cordon(
        self, request: web.Request, cordoned: bool, drain_s: float | None = None
    ) -> web.Response:
        node = self._node(request)
        await self._stored.cordon_node(node.node_id, cordoned, drain_s)
        return reply(view_builders.node(self._core, node, self._driver.now()))

    async def quarantine_device(self, request: web.Request) -> web.Response:
        """Use a device no more and move off what it runs."""
        node, device_id = self._device(request)
        body = await read_body(request, v.QuarantineBody)
        if not body.reason.strip():
            raise bad("reason", body.reason, "is empty", "say why, for whoever releases it")
        request[WHY] = body.reason
        return self._set_quarantine(node, device_id, body.reason)

    async def release_device(self, request: web.Request) -> web.Response:
        """Use a quarantined device again."""
        node, device_id = self._device(request)
        if device_id not in node.quarantine:
            raise AdminError(409, f"device {device_id!r} of node {node.node_id} is not quarantined")
        return self._set_quarantine(node, device_id, None)

    def _set_quarantine(self, node: Node, device_id: str, reason: str | None) -> web.Response:
        now = self._driver.now()
        event = m.QuarantineSet(now=now, node_id=node.node_id, device_id=device_id, reason=reason)
        self._driver.apply(event)
        return reply(view_builders.node(self._core, node, now))

    def _device(self, request: web.Request) -> tuple[Node, str]:
        node, device_id = self._node(request), request.match_info["device"]
        if device_id not in node.devices:
            raise unknown(f"device of node {node.node_id}", device_id, list(node.devices))
        return node, device_id

    def _node(self, request: web.Request) -> Node:
        node_id = request.match_info["id"]
        node = self._core.state.nodes.get(node_id)
        if node is None or node.heartbeat is None:
            raise unknown("node", node_id, list(self._core.state.nodes))
        return node

    async def list_devices(self, _: web.Request) -> web.Response:
        """List the devices."""
        return reply(view_builders.devices(self._core))
