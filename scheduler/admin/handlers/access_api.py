"""The admin API's keys, tenants, admin tokens and use.

Rules this file keeps: a secret is in the one answer that made it; digests are in none.
"""

from __future__ import annotations

import re
import time

import msgspec
from aiohttp import web
from msgspec import Struct

from runtime.contract.access import (
    KeySpec,
    Limits,
    Priority,
    Role,
    Scope,
    StoredKey,
    StoredToken,
    Tenant,
)
from scheduler.access import Access
from scheduler.admin.http import SUBJECT, AdminError, read_body, reply
from scheduler.errors import bad, unknown

DAY_S = 86400.0
NO_TENANT = "anonymous"
RESERVED = ("cluster", "canary", "switch")  # who did it, in the audit trail


class KeyView(Struct, frozen=True, kw_only=True):
    """One API key, without its secret. Times are seconds since 1970 UTC."""

    key_id: str
    tenant: str
    note: str
    scope: Scope
    limits: Limits
    priority: Priority | None
    created_at: float
    expires_at: float | None
    rotated_until: float | None  # the secret before the last rotation opens until then


class Keys(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/keys."""

    keys: tuple[KeyView, ...]


class NewKey(Struct, frozen=True, kw_only=True):
    """A key with its secret, which is shown this once.

    `first`: there was none before. Routers that let in callers without a key until there is one
    (`router.anonymous = "auto"`) refuse them from now on.
    """

    key: KeyView
    token: str
    first: bool = False


class RotateBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The secret of before opens for so long."""

    grace_s: float = DAY_S


class Tenants(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/tenants."""

    tenants: tuple[Tenant, ...]


class TokenBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token for the admin API: viewer reads, operator steers what runs, admin does all."""

    name: str
    role: Role = "viewer"
    expires_at: float | None = None  # seconds since 1970 UTC


class TokenView(Struct, frozen=True, kw_only=True):
    """One admin token, without its secret."""

    token_id: str
    name: str
    role: Role
    created_at: float
    expires_at: float | None


class Tokens(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/tokens."""

    tokens: tuple[TokenView, ...]


class NewToken(Struct, frozen=True, kw_only=True):
    """An admin token with its secret, which is shown this once."""

    info: TokenView
    token: str


class AccountUse(Struct, frozen=True, kw_only=True):
    """What one key or tenant used of a day."""

    account: str  # "key:<id>" or "tenant:<name>"
    requests: int
    tokens: int
    gpu_s: float
    in_flight: int


class Use(Struct, frozen=True, kw_only=True):
    """The answer to GET /admin/usage: one day, by account."""

    day: str
    accounts: tuple[AccountUse, ...]


class AccessApi:
    """The handlers; `route_table` names them `access.<method>`."""

    def __init__(self, access: Access) -> None:
        self._access = access

    # ------------------------------------------------------------------------------- keys

    async def list_keys(self, _: web.Request) -> web.Response:
        """List the API keys, by tenant."""
        keys = sorted(self._access.keys.values(), key=lambda k: (k.spec.tenant, k.created_at))
        return reply(Keys(keys=tuple(map(_key_view, keys))))

    async def create_key(self, request: web.Request) -> web.Response:
        """Make an API key; its secret is told this once."""
        spec = _checked(await read_body(request, KeySpec))
        first = not self._access.keys
        key, token = await self._access.create_key(spec)
        request[SUBJECT] = f"{request.path}/{key.key_id}"
        return reply(NewKey(key=_key_view(key), token=token, first=first), 201)

    async def show_key(self, request: web.Request) -> web.Response:
        """Show an API key."""
        return reply(_key_view(self._key(request)))

    async def put_key(self, request: web.Request) -> web.Response:
        """Change what an API key may."""
        key = self._key(request)
        spec = _checked(await read_body(request, KeySpec))
        changed = msgspec.structs.replace(key, spec=spec)
        await self._access.put_key(changed)
        return reply(_key_view(changed))

    async def rotate_key(self, request: web.Request) -> web.Response:
        """Give an API key a new secret; the old one counts for `grace_s` more."""
        key = self._key(request)
        body = await read_body(request, RotateBody)
        if not 0 <= body.grace_s <= 30 * DAY_S:
            raise bad("grace_s", body.grace_s, "is out of range", "use 0 to 2592000 seconds")
        rotated, token = await self._access.rotate_key(key, body.grace_s)
        return reply(NewKey(key=_key_view(rotated), token=token))

    async def delete_key(self, request: web.Request) -> web.Response:
        """Revoke an API key."""
        await self._access.delete_key(self._key(request).key_id)
        return web.Response(status=204)

    def _key(self, request: web.Request) -> StoredKey:
        key_id = request.match_info["id"]
        if key_id not in self._access.keys:
            raise unknown("key", key_id, list(self._access.keys))
        return self._access.keys[key_id]

    # ------------------------------------------------------------------------------- tenants

    async def list_tenants(self, _: web.Request) -> web.Response:
        """List the tenants, also those that only keys name."""
        described = self._access.tenants
        implied = {k.spec.tenant for k in self._access.keys.values()} - described.keys()
        found = [*described.values(), *(Tenant(name=name) for name in implied)]
        return reply(Tenants(tenants=tuple(sorted(found, key=lambda t: t.name))))

    async def put_tenant(self, request: web.Request) -> web.Response:
        """Describe a tenant."""
        tenant = await read_body(request, Tenant)
        if tenant.name != request.match_info["name"]:
            fix = f"use {request.match_info['name']!r}, or the other address"
            raise bad("name", tenant.name, "is not the name in the address", fix)
        _check_tenant("name", tenant.name)
        await self._access.put_tenant(tenant)
        return reply(tenant)

    async def delete_tenant(self, request: web.Request) -> web.Response:
        """Forget a tenant that has no keys."""
        name = request.match_info["name"]
        if name not in self._access.tenants:
            raise unknown("tenant", name, list(self._access.tenants))
        owned = sum(key.spec.tenant == name for key in self._access.keys.values())
        if owned:
            message = f"tenant {name!r} has {owned} keys, which would lose its limits: revoke them"
            raise AdminError(409, message)
        await self._access.delete_tenant(name)
        return web.Response(status=204)

    # ------------------------------------------------------------------------------- tokens

    async def list_tokens(self, _: web.Request) -> web.Response:
        """List the admin tokens."""
        tokens = sorted(self._access.tokens.values(), key=lambda t: (t.name, t.created_at))
        return reply(Tokens(tokens=tuple(map(_token_view, tokens))))

    async def create_token(self, request: web.Request) -> web.Response:
        """Make an admin token; its secret is told this once."""
        body = await read_body(request, TokenBody)
        if not body.name.strip() or len(body.name) > 96 or not body.name.isprintable():
            fix = "say whose it is, in at most 96 printable characters"
            raise bad("name", body.name, "is empty, too long or not printable", fix)
        if body.name.strip().casefold() in RESERVED:
            raise bad("name", body.name, "is what the audit trail calls another", "use another")
        if body.expires_at is not None and body.expires_at <= time.time():
            raise bad("expires_at", body.expires_at, "is in the past", "use a time to come")
        stored, token = await self._access.create_token(body.role, body.name, body.expires_at)
        request[SUBJECT] = f"{request.path}/{stored.token_id}"
        return reply(NewToken(info=_token_view(stored), token=token), 201)

    async def delete_token(self, request: web.Request) -> web.Response:
        """Revoke an admin token."""
        token_id = request.match_info["id"]
        if token_id not in self._access.tokens:
            raise unknown("token", token_id, list(self._access.tokens))
        await self._access.delete_token(token_id)
        return web.Response(status=204)

    # ------------------------------------------------------------------------------- use

    async def show_use(self, request: web.Request) -> web.Response:
        """Show what keys and tenants used of a day."""
        day = request.query.get("day", "") or time.strftime("%Y-%m-%d", time.gmtime())
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", day):
            raise AdminError(400, f"day: must be a date as in 2026-11-25, UTC's (got {day!r})")
        totals = await self._access.usage_on(day)
        accounts = tuple(
            AccountUse(
                account=name, requests=used.requests, tokens=used.tokens,
                gpu_s=used.gpu_ms / 1000, in_flight=used.in_flight,
            )
            for name, used in sorted(totals.items())
        )  # fmt: skip
        return reply(Use(day=day, accounts=accounts))


def _check_tenant(field: str, name: str) -> None:
    """Raises AdminError: callers without a key are that tenant's."""
    if name == NO_TENANT:
        fix = "choose another name: it stands for callers without a key"
        raise bad(field, name, "is not a tenant's name", fix)


def _checked(spec: KeySpec) -> KeySpec:
    _check_tenant("tenant", spec.tenant)
    if spec.expires_at is not None and spec.expires_at <= time.time():
        raise bad("expires_at", spec.expires_at, "is in the past", "use a time to come, or none")
    for pattern in spec.scope.endpoints:
        if not pattern.startswith(("/", "*")):
            raise bad(
                "scope.endpoints", pattern, "is not a path", "begin with '/', e.g. /v1/embeddings"
            )
    return spec


def _key_view(key: StoredKey) -> KeyView:
    spec = key.spec
    return KeyView(
        key_id=key.key_id, tenant=spec.tenant, note=spec.note, scope=spec.scope,
        limits=spec.limits, priority=spec.priority, created_at=key.created_at,
        expires_at=spec.expires_at,
        rotated_until=key.old_until if key.old_digest and key.old_until > time.time() else None,
    )  # fmt: skip


def _token_view(token: StoredToken) -> TokenView:
    return TokenView(
        token_id=token.token_id, name=token.name, role=token.role,
        created_at=token.created_at, expires_at=token.expires_at,
    )  # fmt: skip
