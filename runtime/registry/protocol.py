"""Discovery, leader lock, and shared state: one protocol, kept by Consul and by a local file.

Rules this file keeps:
- a version of 0 means "does not exist"; versions only grow, so a compare-and-set never misfires;
- a blocking read returns early on change and returns *current* state at its deadline;
- losing a race is an answer (False or None), never an exception; RegistryError means the registry
  could not be asked, and callers keep what they have.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class RegistryError(Exception):
    """The registry could not be reached or refused the call; the message says which and why."""


class Service(Struct, frozen=True, kw_only=True):
    """One running part: a router, a scheduler, an agent, or an engine."""

    service_id: str
    name: str  # "stoker-agent", "stoker-scheduler", "stoker-router"
    address: str
    port: int
    meta: dict[str, str] = {}


class Entry(Struct, frozen=True, kw_only=True):
    """One value of the store. `version` changes with every write of this key."""

    key: str
    value: bytes
    version: int


class Lock(Protocol):
    """A held leader lock. `held` turns False when it is lost or released."""

    @property
    def held(self) -> bool:
        """Whether the lock is surely ours still."""

    async def renew(self) -> bool:
        """Extend it by its ttl; False (and `held` False) if it is lost. Call about every ttl/3."""
        ...

    async def release(self) -> None:
        """Give it up at once, so that another may take it. Idempotent."""
        ...


class Registry(Protocol):
    """Every method may raise RegistryError."""

    async def register(self, service: Service, ttl_s: float) -> None:
        """Make `service` findable until `ttl_s` passes without `keep_alive`. Idempotent."""
        ...

    async def keep_alive(self, service_id: str) -> bool:
        """Prolong a registration; False if the registry no longer knows it: register again."""
        ...

    async def deregister(self, service_id: str) -> None:
        """Remove a registration; an unknown one is success."""
        ...

    async def services(
        self, name: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Service, ...], int]:
        """The live services of that name, sorted by id, and the index to wait on.

        With `index` (from an earlier answer) and `wait_s`, returns when the set has changed or
        after `wait_s` seconds.
        """
        ...

    async def get(self, key: str) -> Entry | None:
        """One value, or None."""
        ...

    async def list(
        self, prefix: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Entry, ...], int]:
        """Every entry below `prefix`, sorted by key, and the index to wait on as in `services`."""
        ...

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        """Write. With `version`, only if the key's version is still that (0: it must not exist)."""
        ...

    async def delete(self, key: str, version: int | None = None) -> bool:
        """Remove. With `version`, only if unchanged; a missing key is success without one."""
        ...

    async def acquire(self, key: str, holder: bytes, ttl_s: float) -> Lock | None:
        """Take the lock `key` with `holder` as its readable value; None if another holds it.

        It is lost when not renewed for `ttl_s`. While held, `get(key)` returns `holder`; once
        lost or released, `get(key)` may still return it, so readers must treat it as a hint.
        """
        ...

    async def open_to(self, key: str) -> str | None:
        """Who may write `key` although no part of Stoker is it, in words; None: nobody is known."""
        ...

    async def close(self) -> None:
        """Release connections and files (not registrations or locks)."""
        ...
