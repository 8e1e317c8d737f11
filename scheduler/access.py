"""Keeps API keys, tenants and admin tokens in the registry, and tells routers of them.

Rules this file keeps: what is not in the registry does not count, so a change that could not be
stored changed nothing; a key's secret passes through here once, on its way to who made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import string
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from runtime.contract.access import (
    ADMIN_PREFIX,
    ID_CHARS,
    KEY_PREFIX,
    KeySpec,
    KeyTable,
    PeerUsage,
    Role,
    RouterUsage,
    StoredKey,
    StoredToken,
    Tenant,
    Used,
    digest,
    token_id,
)
from runtime.outside import decode
from runtime.registry.protocol import RegistryError
from scheduler.store import Store
from scheduler.usage import BootUsage, Usage

log = logging.getLogger("stoker.scheduler")

KEEP_DAYS = 31
SAVE_S = 5.0
_ID_ALPHABET = string.ascii_lowercase + string.digits
_Kind = TypeVar("_Kind", bound=msgspec.Struct)


def mint(prefix: str, public_id: str) -> str:
    """A new token: its public id and 256 random bits."""
    return f"{prefix}{public_id}-{secrets.token_urlsafe(32)}"


def _new_id() -> str:
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(ID_CHARS))


class Access:
    """The leader's keys; `load` first. `changed` is set when routers have to hear of a change."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self.keys: dict[str, StoredKey] = {}
        self.tenants: dict[str, Tenant] = {}
        self.tokens: dict[str, StoredToken] = {}
        self.usage = Usage("")
        self._version = 0
        self._changed = asyncio.Event()

    async def load(self) -> None:
        """Everything that is stored, for a new leader. Raises RegistryError."""
        keys = await self._read(StoredKey, "keys")
        tenants = await self._read(Tenant, "tenants")
        tokens = await self._read(StoredToken, "tokens")
        self.keys = {key.key_id: key for key in keys}
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.tokens = {token.token_id: token for token in tokens}
        self.usage = await self.usage_of(_today())
        self._tell_routers()

    async def _read(self, kind: type[_Kind], *folder: str) -> list[_Kind]:
        found = []
        for entry in await self._store.below(*folder):
            try:
                found.append(decode(entry.value, kind))
            except ValueError as error:
                log.error("stored %s cannot be read and opens nothing: %s", entry.key, error)
        return found

    # ------------------------------------------------------------------------------- changes

    async def create_key(self, spec: KeySpec) -> tuple[StoredKey, str]:
        """A new key, and its secret, which is stored nowhere."""
        token = mint(KEY_PREFIX, _new_id())
        key_id = token_id(token, KEY_PREFIX)
        assert key_id is not None
        key = StoredKey(key_id=key_id, digest=digest(token), spec=spec, created_at=time.time())
        await self.put_key(key)
        return key, token

    async def rotate_key(self, key: StoredKey, grace_s: float) -> tuple[StoredKey, str]:
        """A new secret for the key; the one before opens for `grace_s` more."""
        token = mint(KEY_PREFIX, key.key_id)
        rotated = msgspec.structs.replace(
            key, digest=digest(token), old_digest=key.digest, old_until=time.time() + grace_s
        )
        await self.put_key(rotated)
        return rotated, token

    async def put_key(self, key: StoredKey) -> None:
        """Store a key as it is now."""
        await self._store.put(key, "keys", key.key_id)
        self.keys[key.key_id] = key
        self._tell_routers()

    async def delete_key(self, key_id: str) -> None:
        """Delete a key and tell the routers."""
        await self._store.delete("keys", key_id)
        del self.keys[key_id]
        self._tell_routers()

    async def put_tenant(self, tenant: Tenant) -> None:
        """Store a tenant and tell the routers."""
        await self._store.put(tenant, "tenants", tenant.name)
        self.tenants[tenant.name] = tenant
        self._tell_routers()

    async def delete_tenant(self, name: str) -> None:
        """Delete a tenant and tell the routers."""
        await self._store.delete("tenants", name)
        del self.tenants[name]
        self._tell_routers()

    async def create_token(
        self, role: Role, name: str, expires_at: float | None
    ) -> tuple[StoredToken, str]:
        """A new token for the admin API, and its secret."""
        public_id = _new_id()
        token = mint(ADMIN_PREFIX, public_id)
        stored = StoredToken(
            token_id=public_id, digest=digest(token), role=role, name=name,
            created_at=time.time(), expires_at=expires_at,
        )  # fmt: skip
        await self._store.put(stored, "tokens", public_id)
        self.tokens[public_id] = stored
        return stored, token

    async def delete_token(self, public_id: str) -> None:
        """Delete an admin token."""
        await self._store.delete("tokens", public_id)
        del self.tokens[public_id]

    async def admin(self, token: str, leads: bool) -> StoredToken | None:
        """Whose `token` is. One that stands by asks the registry, so it may raise RegistryError."""
        public_id = token_id(token, ADMIN_PREFIX)
        if public_id is None:
            return None
        stored = self.tokens.get(public_id)
        if not leads:
            entry = await self._store.registry.get(self._store.key("tokens", public_id))
            stored = decode(entry.value, StoredToken) if entry else None
        if stored is None or not hmac.compare_digest(digest(token), stored.digest):
            return None
        expired = stored.expires_at is not None and time.time() >= stored.expires_at
        return None if expired else stored

    # ------------------------------------------------------------------------------- routers

    def _tell_routers(self) -> None:
        self._version += 1
        self.wake()

    def wake(self) -> None:
        """Answer the routers that wait: this scheduler leads no more."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def table(self) -> KeyTable:
        """What routers are told."""
        return KeyTable(
            version=self._version,
            keys=tuple(self.keys.values()),
            tenants=tuple(self.tenants.values()),
        )

    async def table_after(self, version: int, wait_s: float) -> KeyTable | None:
        """The table as soon as it is newer than `version`; None if it is not within `wait_s`."""
        if self._version <= version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        return self.table if self._version > version else None

    # ------------------------------------------------------------------------------- use

    def tell(self, told: RouterUsage) -> PeerUsage:
        """One router's report; what all others used."""
        return self.usage.tell(told, self._clock())

    async def usage_of(self, day: str) -> Usage:
        """What is stored of a day. Raises RegistryError."""
        return Usage(day, await self._read(BootUsage, "usage", day))

    async def keep_usage(self, leads: Callable[[], bool]) -> None:
        """Store what was used and forget what is older than KEEP_DAYS, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_S)
            if not leads():
                continue
            try:
                await self._save_usage()
                if self.usage.day != _today():
                    self.usage = await self.usage_of(_today())
                    await self._forget_old()
            except RegistryError as error:
                log.warning("what keys used was not saved: %s", error)

    async def _save_usage(self) -> None:
        usage = self.usage
        for boot in list(usage.unsaved):
            name = f"{boot[0]}@{boot[1]}"
            await self._store.put(usage.boot(boot), "usage", usage.day, name)
            usage.unsaved.discard(boot)

    async def _forget_old(self) -> None:
        oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - KEEP_DAYS * 86400))
        below = self._store.key("usage") + "/"
        for entry in await self._store.below("usage"):
            if entry.key.removeprefix(below)[:10] < oldest:
                await self._store.registry.delete(entry.key)

    async def usage_on(self, day: str) -> dict[str, Used]:
        """Every account's use of a day. Raises RegistryError."""
        usage = self.usage if day == self.usage.day else await self.usage_of(day)
        return usage.totals(self._clock())


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
