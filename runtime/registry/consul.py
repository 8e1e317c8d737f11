"""The registry for many hosts: Consul. The only file that knows of it.

Rules this file keeps:
- every call has a timeout; every failure is a RegistryError that names the URL and the question;
- only what cannot have changed anything is asked again: reads, and calls that never connected;
- a lock's holder counts its ttl from before the request that renewed it, so it gives up first.

How Consul differs from the embedded file:
- a session lives for at least 10 s, and Consul waits up to twice its ttl before it ends one. So the
  lock of a holder that died is free after max(10 s, ttl_s) at the earliest and about twice that at
  the latest. `held` still turns False after exactly `ttl_s` without a renewal, and `release` frees
  the lock at once (lock-delay 0);
- registrations belong to the Consul agent behind the URL: point it at one agent (best the one on
  this host), not at a load balancer. Consul drops one for good a minute after it expired, and until
  then `keep_alive` brings it back;
- a blocking read may return early without a change, and after `wait_s` plus a sixteenth;
- a token without the right to read a prefix or a service gets an empty answer, not a refusal;
- values are 512 KiB at most; a service's meta has up to 64 keys of letters, digits, `-` and `_`
  with values of up to 512 characters. More is a RegistryError.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from asyncio import timeout
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
import consul.aio
import consul.base
from consul.callback import CB
from consul.exceptions import (
    ACLDisabled,
    ACLPermissionDenied,
    ClientError,
    ConsulException,
    NotFound,
)
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from runtime import outside
from runtime.registry.protocol import Entry, RegistryError, Service
from runtime.sockets import tcp_connector

CALL_S = 5.0  # for one answer, on top of what a blocking read waits
ATTEMPTS = 3
MIN_SESSION_TTL_S = 10  # Consul's own limit
MAX_WAIT_S = 600.0  # Consul's own limit
FORGET_AFTER = "1m"  # Consul's shortest: an expired service is hidden at once, then removed

T = TypeVar("T")


class _Ask(Protocol):
    """Sends one request; failures are RegistryErrors."""

    async def __call__(
        self, what: str, request: Callable[[Any], Awaitable[T]], wait_s: float = 0.0
    ) -> T: ...


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]  # the library has no types
    """The library's client, over connections that notice when Consul's host is gone.

    Its own constructor would make others, so it is passed by.
    """

    def __init__(self, host: str, port: int, scheme: str, verify: bool | str) -> None:
        consul.base.HTTPClient.__init__(self, host, port, scheme, verify)
        self._session = aiohttp.ClientSession(
            connector=tcp_connector(ssl=bool(verify)),
            timeout=aiohttp.ClientTimeout(total=MAX_WAIT_S * 2),
        )


class _Client(consul.aio.Consul):  # type: ignore[misc]
    def http_connect(
        self, host: str, port: int, scheme: str, verify: bool | str = True, cert: object = None
    ) -> _Http:
        return _Http(host, port, scheme, verify)


class ConsulRegistry:
    """A Registry over the Consul agent at `url`, e.g. http://127.0.0.1:8500.

    Raises RegistryError for an invalid URL. Connects with the first call.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._scheme, self._host, self._port = _split(url)
        self._url = f"{self._scheme}://{self._host}:{self._port}"
        self._token = token
        self._made: Any = None

    async def register(self, service: Service, ttl_s: float) -> None:
        """Register with the Consul agent, with a TTL check that passes for `ttl_s`."""
        check = {
            "CheckID": _check_id(service.service_id),
            "TTL": f"{ttl_s:.3f}s",
            "Status": "passing",
            "DeregisterCriticalServiceAfter": FORGET_AFTER,
        }
        await self._ask(
            f"register {service.service_id}",
            lambda client: client.agent.service.register(
                service.name,
                service_id=service.service_id,
                address=service.address,
                port=service.port,
                meta=service.meta,
                check=check,
            ),
        )

    async def keep_alive(self, service_id: str) -> bool:
        """Pass the service's TTL check; False: the Consul agent does not know the service."""

        async def request(client: Any) -> bool:
            try:
                return bool(await client.agent.check.ttl_pass(_check_id(service_id)))
            except ConsulException as error:
                if _is_unknown(error):
                    return False
                raise

        return await self._ask(f"keep {service_id} alive", request)

    async def deregister(self, service_id: str) -> None:
        """Take the service off the Consul agent; one that it does not know is success."""

        async def request(client: Any) -> None:
            try:
                await client.agent.service.deregister(service_id)
            except ConsulException as error:
                if not _is_unknown(error):
                    raise

        await self._ask(f"deregister {service_id}", request)

    async def services(
        self, name: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Service, ...], int]:
        """The passing services of that name, and the index to wait from next."""
        found, current = await self._read(
            f"list the services {name}",
            lambda client, **waiting: client.health.service(name, passing=True, **waiting),
            index,
            wait_s,
        )
        return tuple(sorted(map(_service, found or ()), key=lambda s: s.service_id)), current

    async def get(self, key: str) -> Entry | None:
        """The value of a key; None: the key has none."""
        found, _ = await self._read(f"get {key}", lambda client: client.kv.get(key))
        return _entry(found) if found else None

    async def list(
        self, prefix: str, index: int = 0, wait_s: float = 0.0
    ) -> tuple[tuple[Entry, ...], int]:
        """The values below a prefix, by key, and the index to wait from next."""
        found, current = await self._read(
            f"list {prefix}",
            lambda client, **waiting: client.kv.get(prefix, recurse=True, **waiting),
            index,
            wait_s,
        )
        return tuple(sorted(map(_entry, found or ()), key=lambda e: e.key)), current

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        """Write a value, with `version` only where the key has that still; whether it did."""
        # Consul keeps the version when nothing changes, so that of two who write the same value
        # with the same version both would win. Flags nobody reads make every write a change.
        flags = secrets.randbits(63)
        written = await self._ask(
            f"put {key}", lambda client: client.kv.put(key, value, cas=version, flags=flags)
        )
        return bool(written)

    async def delete(self, key: str, version: int | None = None) -> bool:
        """Delete a key, with `version` only where the key still has that; whether it is gone."""
        if version == 0:
            return await self.get(key) is None
        if version is None:
            return bool(await self._ask(f"delete {key}", lambda client: client.kv.delete(key)))
        return await self._ask(
            f"delete {key}", lambda client: _delete_unchanged(client, key, version)
        )

    async def acquire(self, key: str, holder: bytes, ttl_s: float) -> ConsulLock | None:
        """Take the lock of `key` with a new session; None: somebody else has it."""
        what = f"lock {key}"
        found, _ = await self._read(what, lambda client: client.kv.get(key))
        if found and found.get("Session"):
            return None  # spares Consul the writes for a session that would wait in vain
        asked = time.monotonic()
        session = await self._ask(
            what,
            lambda client: client.session.create(
                name=what, lock_delay=0, ttl=max(MIN_SESSION_TTL_S, math.ceil(ttl_s))
            ),
        )
        lock = ConsulLock(self._ask, key, session, ttl_s, asked + ttl_s)
        taken = False
        try:
            taken = await self._ask(
                what, lambda client: client.kv.put(key, holder, acquire=session)
            )
        finally:
            if not taken:  # also when the answer was lost: then nobody knows, and it must be free
                with contextlib.suppress(RegistryError):
                    await lock.release()
        return lock if taken else None

    async def open_to(self, key: str) -> str | None:
        """Asks as nobody, without the token, and changes nothing."""
        asked = json.dumps([{"Resource": "key", "Access": "write", "Segment": key}])

        def read(response: Any) -> str | None:
            if response.code == 401:
                return f"whoever reaches Consul at {self._url}: its ACLs are off"
            allowed = outside.json_document(response.body.encode()) if response.code == 200 else []
            if any(answer.get("Allow") for answer in allowed or ()):
                return f"whoever reaches Consul at {self._url}: it lets them without a token"
            return None

        return await self._ask(
            f"learn who may write {key}",
            lambda client: client.http.post(
                read, "/v1/internal/acl/authorize", headers={}, data=asked
            ),
            safe=True,
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._made is not None:
            await self._made.close()
            self._made = None

    async def _read(
        self, what: str, request: Callable[..., Awaitable[Any]], index: int = 0, wait_s: float = 0.0
    ) -> tuple[Any, int]:
        """What a read found (None: nothing), and the index to wait on."""
        if index <= 0 or wait_s <= 0:
            current, found = await self._ask(what, request, safe=True)
            return found, max(1, int(current))
        wait_s = min(wait_s, MAX_WAIT_S)
        waiting = {"index": index, "wait": f"{math.ceil(wait_s * 1000)}ms"}
        current, found = await self._ask(what, lambda client: request(client, **waiting), wait_s)
        # An index that went back is of another history (a restored or new server): start over.
        return found, int(current) if int(current) >= index else 0

    async def _ask(
        self,
        what: str,
        request: Callable[[Any], Awaitable[T]],
        wait_s: float = 0.0,
        safe: bool = False,
    ) -> T:
        async def once() -> T:
            async with timeout(CALL_S + wait_s * 17 / 16):
                return await request(self._client())

        retrying = AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(0.1, max=0.5),
            retry=retry_if_exception(_passes if safe else _never_sent),
            reraise=True,
        )
        try:
            return await retrying(once)
        except TimeoutError as error:
            message = f"Consul at {self._url}: cannot {what}: no answer within {CALL_S:g} s"
            raise RegistryError(f"{message}; is it overloaded or cut off?") from error
        except (aiohttp.ClientError, ConsulException, OSError, ValueError) as error:
            message = f"Consul at {self._url}: cannot {what}: {str(error) or type(error).__name__}"
            raise RegistryError(f"{message}; {_fix(error)}") from error

    def _client(self) -> Any:
        if self._made is None:
            self._made = _Client(self._host, self._port, scheme=self._scheme)
            if self._token is not None:  # its own argument would yield to CONSUL_HTTP_TOKEN
                self._made.token = self._token
        return self._made


class ConsulLock:
    """A Lock over one Consul session that holds one key."""

    def __init__(self, ask: _Ask, key: str, session: str, ttl_s: float, expires: float) -> None:
        self._ask = ask
        self._key = key
        self._session = session
        self._ttl_s = ttl_s
        self._expires = expires  # monotonic
        self._over = False  # lost or released

    @property
    def held(self) -> bool:
        """Whether the lock is surely ours still, by this host's clock."""
        return not self._over and time.monotonic() < self._expires

    async def renew(self) -> bool:
        """Renew the session; where that fails, the lock is released. Whether it is held."""
        asked = time.monotonic()
        if self.held and await self._ask(f"renew the lock {self._key}", self._renew):
            self._expires = asked + self._ttl_s
        else:
            await self.release()  # what is lost here must not stay locked there
        return self.held

    async def release(self) -> None:
        """Destroy the session, and with it the lock."""
        self._over = True
        await self._ask(
            f"release the lock {self._key}", lambda client: client.session.destroy(self._session)
        )

    async def _renew(self, client: Any) -> bool:
        """True if the session lives and still holds the key (it may have been deleted)."""
        try:
            await client.session.renew(self._session)
        except NotFound:
            return False
        _, found = await client.kv.get(self._key, consistency="consistent")
        return found is not None and found.get("Session") == self._session


def _split(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or 8500
    except ValueError:
        parts, port = urlsplit(""), 0
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/"):
        raise RegistryError(
            f"registry.consul_url: {url!r} is not the address of a Consul agent;"
            " write it as http://127.0.0.1:8500"
        )
    return parts.scheme, f"[{host}]" if ":" in host else host, port


def _check_id(service_id: str) -> str:
    return f"service:{service_id}"


def _service(found: dict[str, Any]) -> Service:
    service = found["Service"]
    return Service(
        service_id=service["ID"],
        name=service["Service"],
        address=service["Address"],
        port=service["Port"],
        meta=service["Meta"] or {},
    )


def _entry(found: dict[str, Any]) -> Entry:
    return Entry(key=found["Key"], value=found["Value"] or b"", version=found["ModifyIndex"])


async def _delete_unchanged(client: Any, key: str, version: int) -> bool:
    """Delete only if the version is still that; Consul's own delete-cas accepts a missing key."""
    steps = [
        {"KV": {"Verb": "check-index", "Key": key, "Index": version}},
        {"KV": {"Verb": "delete", "Key": key}},
    ]
    try:  # not client.txn.put, which forgets the token
        headers = client.prepare_headers()
        await client.http.put(CB.json(), "/v1/txn", headers=headers, data=json.dumps(steps))
    except ClientError as error:
        if not str(error).startswith("409") or "Permission denied" in str(error):
            raise
        return False
    return True


def _is_unknown(error: ConsulException) -> bool:
    """Consul's ways to say "no such thing": a 500 in old versions; a 404 (no error here) in new."""
    return any(s in str(error) for s in ("does not have associated TTL", "Unknown service"))


def _never_sent(error: BaseException) -> bool:
    return isinstance(error, aiohttp.ClientConnectorError)


def _passes(error: BaseException) -> bool:
    """Worth asking again: the connection broke, or Consul elects its leader (a plain 500)."""
    return isinstance(error, aiohttp.ClientConnectionError) or type(error) is ConsulException


def _fix(error: Exception) -> str:
    if isinstance(error, ACLDisabled | ACLPermissionDenied):
        return "check registry.consul_token and its policy"
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return "is it running there? check registry.consul_url"
    return "see Consul's own log"
