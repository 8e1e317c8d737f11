"""The admin API's handlers for the nodes' model caches.

Rules this file keeps: it keeps nothing; `CacheClient` asks the nodes.
"""

from __future__ import annotations

from aiohttp import web

from runtime.contract.spec_file import source_problems
from runtime.wire.agent_messages import SpecProblem
from scheduler.admin.cache_client import CacheClient, CachePullBody
from scheduler.admin.http import AdminError, read_body, reply
from scheduler.errors import unknown


class CacheApi:
    """The handlers; `route_table` names them `caches.<method>`."""

    def __init__(self, caches: CacheClient) -> None:
        self._caches = caches

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


def _cached_model(request: web.Request) -> str:
    model = request.query.get("model", "")
    if not model:
        raise AdminError(400, "model: say which, as it was asked for, e.g. ?model=hf:org/name")
    _check_source(model)
    return model


def _check_source(source: str) -> None:
    if problems := tuple(source_problems(source, "model")):
        raise AdminError(422, "\n".join(map(str, problems)), problems=problems)
