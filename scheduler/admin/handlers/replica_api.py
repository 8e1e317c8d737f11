"""The admin API's handlers for replicas and their logs.

Rules this file keeps: handlers enqueue events and read snapshots; they decide nothing.
"""

from __future__ import annotations

import aiohttp
from aiohttp import web

from runtime.places import url
from runtime.wire.names import REPLICA_ID
from scheduler.admin import view_builders
from scheduler.admin.handlers.model_api import refuse_unload
from scheduler.admin.http import AdminError, reply, whole_number
from scheduler.driver import Driver
from scheduler.errors import unknown
from scheduler.state import messages as m
from scheduler.state.cluster import Replica


class ReplicaApi:
    """The handlers; `route_table` names them `replicas.<method>`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._core = driver.core

    async def list_replicas(self, _: web.Request) -> web.Response:
        """List the replicas."""
        return reply(view_builders.replicas(self._core, self._driver.now()))

    async def show_replica(self, request: web.Request) -> web.Response:
        """Show a replica."""
        replica = self._replica(request)
        return reply(view_builders.replica(self._core, replica, self._driver.now()))

    async def unload_replica(self, request: web.Request) -> web.Response:
        """Drain and stop one replica."""
        replica = self._replica(request)
        model = self._core.state.models.get(replica.model)
        if model is not None:
            refuse_unload(model, {replica.replica_id})
        event = m.UnloadAsked(
            now=self._driver.now(), model=replica.model, replica_id=replica.replica_id
        )
        self._driver.apply(event)
        return reply(view_builders.replica(self._core, replica, self._driver.now()), 202)

    async def replica_logs(self, request: web.Request) -> web.StreamResponse:
        """Passed through from the agent that has them; a stopped replica's stay readable."""
        replica_id = request.match_info["id"]
        if not REPLICA_ID.fullmatch(replica_id):
            raise unknown("replica", replica_id, list(self._core.state.replicas))
        query = {
            "tail": str(whole_number(request, "tail", 200)),
            "follow": "1" if request.query.get("follow") == "1" else "0",
        }
        replica = self._core.state.replicas.get(replica_id)
        nodes = [replica.node_id] if replica else list(self._core.state.nodes)
        agents, error = self._driver.agents, ""
        for node_id in nodes:
            address = agents.address(node_id)
            if address is None:
                continue
            where = url(address, "agent", "replicas", replica_id, "logs")
            timeout = aiohttp.ClientTimeout(total=None, connect=5)
            try:
                async with agents.http.get(where, params=query, timeout=timeout) as upstream:
                    if upstream.status == 200:
                        return await _pass_on(request, upstream)
                    error = f"node {node_id}: HTTP {upstream.status}"
                    if upstream.status == 404:
                        error = ""
            except aiohttp.ClientError as problem:
                error = f"node {node_id}: {problem}"
        if error:
            raise AdminError(502, f"the log of {replica_id!r} cannot be read: {error}")
        raise unknown("replica", replica_id, list(self._core.state.replicas))

    def _replica(self, request: web.Request) -> Replica:
        replica_id = request.match_info["id"]
        if replica_id not in self._core.state.replicas:
            raise unknown("replica", replica_id, list(self._core.state.replicas))
        return self._core.state.replicas[replica_id]


async def _pass_on(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    async for chunk in upstream.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response
