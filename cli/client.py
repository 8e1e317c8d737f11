"""The admin API as typed calls: answers are the structs of `scheduler.admin.views`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import aiohttp
import click
import msgspec
from msgspec import Struct

from runtime import outside
from runtime.contract.access import KeySpec, Tenant
from runtime.places import url
from runtime.sockets import tcp_connector
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import RouteRule
from scheduler.admin import cache_client, route_views, views
from scheduler.admin.handlers import access_api

T = TypeVar("T")

# For an answer. A host that vanishes is noticed by its connection, long before.
_READ_S = 60.0  # of what the scheduler has in memory
# Of a change: longer than what the scheduler waits for itself, which is a look at a spec on three
# nodes, each of which may have to import vLLM.
_CHANGE_S = 600.0
_MORE_S = 60.0  # than the scheduler, where it waits for more


class Reply(Struct, Generic[T], frozen=True):
    """An answer: its exact JSON, and what it means."""

    body: bytes
    value: T


class AdminError(click.ClickException):
    """The scheduler refused, or could not be asked. `status` is None in the second case."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@asynccontextmanager
async def open_admin(address: str, token: str) -> AsyncIterator[Admin]:
    """A client of the admin API at `address`, closed at the end."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers, connector=tcp_connector()) as session:
        yield Admin(session, address)


class Admin:
    """Every call raises AdminError, whose message is fit for an operator."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self._url = address.rstrip("/")

    async def health(self) -> Reply[views.Health]:
        """How the scheduler is."""
        return await self._call("GET", "/healthz", views.Health)

    async def models(self) -> Reply[views.Models]:
        """Every model."""
        return await self._call("GET", "/admin/models", views.Models)

    async def model(self, name: str) -> Reply[views.ModelView]:
        """One model."""
        return await self._call("GET", url("", "admin", "models", name), views.ModelView)

    async def add(self, spec: ModelSpec) -> Reply[views.Saved]:
        """Add a model; AdminError with status 409 if its name is taken."""
        return await self._call("POST", "/admin/models", views.Saved, body=spec)

    async def put(self, spec: ModelSpec) -> Reply[views.Saved]:
        """Add or change a model."""
        path = url("", "admin", "models", spec.name)
        return await self._call("PUT", path, views.Saved, body=spec)

    async def remove(self, name: str) -> None:
        """Remove a model."""
        await self._request("DELETE", url("", "admin", "models", name))

    async def load(self, name: str, replicas: int) -> Reply[views.ModelView]:
        """Start `replicas` of a model ahead of requests."""
        body = views.LoadBody(replicas=replicas)
        return await self._call(
            "POST", url("", "admin", "models", name, "load"), views.ModelView, body=body
        )

    async def unload(self, name: str) -> Reply[views.ModelView]:
        """Drain and stop a model's replicas."""
        return await self._call("POST", url("", "admin", "models", name, "unload"), views.ModelView)

    async def pin(self, name: str, pinned: bool) -> Reply[views.ModelView]:
        """Keep a model running, or stop to."""
        body = views.PinBody(pinned=pinned)
        return await self._call(
            "POST", url("", "admin", "models", name, "pin"), views.ModelView, body=body
        )

    async def replicas(self) -> Reply[views.Replicas]:
        """Every replica."""
        return await self._call("GET", "/admin/replicas", views.Replicas)

    async def nodes(self) -> Reply[views.Nodes]:
        """Every node."""
        return await self._call("GET", "/admin/nodes", views.Nodes)

    async def devices(self) -> Reply[views.Devices]:
        """Every device, and what is booked on it."""
        return await self._call("GET", "/admin/devices", views.Devices)

    async def queue(self) -> Reply[views.Queue]:
        """The requests that wait or are in flight, by model."""
        return await self._call("GET", "/admin/queue", views.Queue)

    async def decisions(self, limit: int, model: str | None) -> Reply[views.Decisions]:
        """The last decisions, of one model or of all."""
        query = {"limit": str(limit)} | ({"model": model} if model else {})
        return await self._call("GET", "/admin/decisions", views.Decisions, query=query)

    async def cold_starts(self, limit: int, model: str | None) -> Reply[views.ColdStarts]:
        """The last cold starts and wakes, of one model or of all."""
        query = {"limit": str(limit)} | ({"model": model} if model else {})
        return await self._call("GET", "/admin/coldstarts", views.ColdStarts, query=query)

    async def footprint(self, name: str) -> Reply[views.Footprints]:
        """What a model was declared, estimated and measured to take."""
        return await self._call(
            "GET", url("", "admin", "models", name, "footprint"), views.Footprints
        )

    async def caches(self, node: str | None) -> Reply[cache_client.Caches]:
        """The model cache of one node, or of all."""
        query = {"node": node} if node else {}
        return await self._call("GET", "/admin/cache", cache_client.Caches, query=query)

    async def cache_pull(self, body: cache_client.CachePullBody) -> Reply[cache_client.Pulls]:
        """Begin to fetch a model to nodes."""
        return await self._call("POST", "/admin/cache/pull", cache_client.Pulls, body=body)

    async def cache_remove(self, model: str, node: str | None) -> Reply[cache_client.Removals]:
        """Remove a model from the cache of one node, or of all."""
        query = {"model": model} | ({"node": node} if node else {})
        return await self._call("DELETE", "/admin/cache", cache_client.Removals, query=query)

    async def cache_verify(self, model: str, node: str | None) -> Reply[cache_client.Verdicts]:
        """Read a cached model again on one node, or on all, and check it."""
        query = {"model": model} | ({"node": node} if node else {})
        return await self._call(
            "POST", "/admin/cache/verify", cache_client.Verdicts, query=query,
            limit_s=cache_client.VERIFY_S + _MORE_S,
        )  # fmt: skip

    async def prewarm(self, name: str, body: views.PrewarmBody) -> Reply[views.ModelView]:
        """Ask for a model to be warm by a time, for a while."""
        path = url("", "admin", "models", name, "prewarm")
        return await self._call("POST", path, views.ModelView, body=body)

    async def set_node(self, node_id: str, action: str) -> Reply[views.NodeView]:
        """`action`: cordon or uncordon."""
        return await self._call("POST", url("", "admin", "nodes", node_id, action), views.NodeView)

    async def drain(self, node_id: str, deadline_s: float) -> Reply[views.NodeView]:
        """Cordon a node and move off what it runs, or stop it at the deadline."""
        body = views.DrainBody(deadline_s=deadline_s)
        path = url("", "admin", "nodes", node_id, "drain")
        return await self._call("POST", path, views.NodeView, body=body)

    async def quarantine(self, node_id: str, device_id: str, reason: str) -> Reply[views.NodeView]:
        """Use a device no more."""
        body = views.QuarantineBody(reason=reason)
        path = url("", "admin", "nodes", node_id, "devices", device_id, "quarantine")
        return await self._call("POST", path, views.NodeView, body=body)

    async def release(self, node_id: str, device_id: str) -> Reply[views.NodeView]:
        """Use a quarantined device again."""
        path = url("", "admin", "nodes", node_id, "devices", device_id, "release")
        return await self._call("POST", path, views.NodeView)

    async def plan(self, body: views.PlanBody) -> Reply[views.Plan]:
        """What would be decided, without doing it."""
        return await self._call("POST", "/admin/plan", views.Plan, body=body)

    async def routes(self) -> Reply[route_views.Routes]:
        """Every route."""
        return await self._call("GET", "/admin/routes", route_views.Routes)

    async def route(self, name: str) -> Reply[route_views.RouteView]:
        """One route and where it stands."""
        return await self._call("GET", url("", "admin", "routes", name), route_views.RouteView)

    async def put_route(self, rule: RouteRule) -> Reply[route_views.RouteView]:
        """Add or change a route."""
        path = url("", "admin", "routes", rule.name)
        return await self._call("PUT", path, route_views.RouteView, body=rule)

    async def remove_route(self, name: str) -> None:
        """Remove a route; its models stay."""
        await self._request("DELETE", url("", "admin", "routes", name))

    async def change_route(
        self, name: str, action: str, body: Struct
    ) -> Reply[route_views.RouteView]:
        """`action`: switch, promote or rollback; the route as it is then."""
        path = url("", "admin", "routes", name, action)
        return await self._call("POST", path, route_views.RouteView, body=body)

    async def audit(self, limit: int, route: str | None) -> Reply[route_views.Audit]:
        """The last changes by operators, of one route or of all."""
        query = {"limit": str(limit)} | ({"route": route} if route else {})
        return await self._call("GET", "/admin/audit", route_views.Audit, query=query)

    async def keys(self) -> Reply[access_api.Keys]:
        """Every API key, without its secret."""
        return await self._call("GET", "/admin/keys", access_api.Keys)

    async def key(self, key_id: str) -> Reply[access_api.KeyView]:
        """One API key, without its secret."""
        return await self._call("GET", url("", "admin", "keys", key_id), access_api.KeyView)

    async def create_key(self, spec: KeySpec) -> Reply[access_api.NewKey]:
        """Make an API key; its secret is told this once."""
        return await self._call("POST", "/admin/keys", access_api.NewKey, body=spec)

    async def put_key(self, key_id: str, spec: KeySpec) -> Reply[access_api.KeyView]:
        """Change what an API key may."""
        path = url("", "admin", "keys", key_id)
        return await self._call("PUT", path, access_api.KeyView, body=spec)

    async def rotate_key(self, key_id: str, grace_s: float) -> Reply[access_api.NewKey]:
        """Give an API key a new secret; the old one counts for `grace_s` more."""
        body = access_api.RotateBody(grace_s=grace_s)
        path = url("", "admin", "keys", key_id, "rotate")
        return await self._call("POST", path, access_api.NewKey, body=body)

    async def revoke_key(self, key_id: str) -> None:
        """Revoke an API key."""
        await self._request("DELETE", url("", "admin", "keys", key_id))

    async def tenants(self) -> Reply[access_api.Tenants]:
        """Every tenant."""
        return await self._call("GET", "/admin/tenants", access_api.Tenants)

    async def put_tenant(self, tenant: Tenant) -> Reply[Tenant]:
        """Describe a tenant."""
        path = url("", "admin", "tenants", tenant.name)
        return await self._call("PUT", path, Tenant, body=tenant)

    async def remove_tenant(self, name: str) -> None:
        """Forget a tenant that has no keys."""
        await self._request("DELETE", url("", "admin", "tenants", name))

    async def tokens(self) -> Reply[access_api.Tokens]:
        """Every admin token, without its secret."""
        return await self._call("GET", "/admin/tokens", access_api.Tokens)

    async def create_token(self, body: access_api.TokenBody) -> Reply[access_api.NewToken]:
        """Make an admin token; its secret is told this once."""
        return await self._call("POST", "/admin/tokens", access_api.NewToken, body=body)

    async def revoke_token(self, token_id: str) -> None:
        """Revoke an admin token."""
        await self._request("DELETE", url("", "admin", "tokens", token_id))

    async def use(self, day: str | None) -> Reply[access_api.Use]:
        """What keys and tenants used of a day (UTC's); None: today."""
        query = {"day": day} if day else {}
        return await self._call("GET", "/admin/usage", access_api.Use, query=query)

    async def spec_schema(self) -> bytes:
        """The JSON Schema of a model spec."""
        return await self._request("GET", "/admin/spec-schema")

    async def logs(self, replica_id: str, tail: int, follow: bool) -> AsyncIterator[bytes]:
        """The engine's output, line by line; with `follow` until the replica is gone."""
        where = url(self._url, "admin", "replicas", replica_id, "logs")
        query = {"tail": str(tail), "follow": str(int(follow))}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        try:
            async with self._session.get(where, params=query, timeout=timeout) as response:
                if response.status >= 400:
                    raise _refused(response.status, await response.read())
                async for line in response.content:
                    yield line
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(self._url, error) from None

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        body: Struct | None = None,
        query: dict[str, str] | None = None,
        limit_s: float | None = None,
    ) -> Reply[T]:
        answer = await self._request(method, path, body, query, limit_s)
        try:
            return Reply(answer, outside.decode(answer, kind))
        except ValueError as error:
            raise AdminError(
                f"{self._url}{path} answered something else than the admin API does: {error}"
            ) from None

    async def _request(
        self,
        method: str,
        path: str,
        body: Struct | None = None,
        query: dict[str, str] | None = None,
        limit_s: float | None = None,
    ) -> bytes:
        """The answer's body.

        A scheduler that does not lead names the one that does. It is asked this once only: what
        is named may be a leader of the past.
        """
        status, answer = await self._send(self._url, method, path, body, query, limit_s)
        leader = _leader(answer) if status == 503 else None
        if leader:
            status, answer = await self._send(
                leader.rstrip("/"), method, path, body, query, limit_s
            )
        if status >= 400:
            raise _refused(status, answer)
        return answer

    async def _send(
        self,
        address: str,
        method: str,
        path: str,
        body: Struct | None,
        query: dict[str, str] | None,
        limit_s: float | None,
    ) -> tuple[int, bytes]:
        limit_s = limit_s or (_READ_S if method == "GET" else _CHANGE_S)
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=5)
        try:
            async with self._session.request(
                method,
                f"{address}{path}",
                data=data,
                headers=headers,
                params=query,
                timeout=timeout,
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, ValueError) as error:  # of a connection, timeouts too
            raise _unreachable(address, error) from None
        except TimeoutError:
            late = f"the scheduler at {address} took the call, but gave no answer in {limit_s:g} s"
            if method != "GET":
                late += ": what was asked for may still be done; look before you ask again"
            raise AdminError(late) from None


def _unreachable(address: str, error: Exception) -> AdminError:
    reason = str(error) or type(error).__name__
    return AdminError(f"can't reach the scheduler at {address}: {reason}. Is it running?")


def _error(answer: bytes) -> views.ErrorBody | None:
    try:
        return outside.decode(answer, views.Error).error
    except ValueError:
        return None


def _leader(answer: bytes) -> str | None:
    error = _error(answer)
    return error.leader if error else None


def _refused(status: int, answer: bytes) -> AdminError:
    error = _error(answer)
    if status == 401:
        return AdminError(
            "the token is missing or wrong: name a file that holds the scheduler's by --token-file",
            status,
        )
    if error is None:
        text: Any = answer[:300].decode(errors="replace").strip()
        return AdminError(f"the scheduler answered status {status}: {text or 'nothing'}", status)
    lines = [error.message]
    # A message may say all of it already.
    lines += [f"  {p}" for p in error.problems if str(p) not in error.message]
    if error.close and "did you mean" not in error.message:
        lines.append(f"  did you mean {' or '.join(error.close)}?")
    return AdminError("\n".join(lines), status)
