"""Who may do what: API keys, tenants and admin tokens, and what is stored of them. Pure.

Rules this file keeps:
- a secret is shown once, when it is made, and stored nowhere: only its SHA-256 is. A secret has 256
  random bits, so a slow hash would add nothing;
- digests are compared in constant time;
- the id within a token is public: it finds the key, and names it in logs and metrics.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from runtime.wire.names import NAME_PATTERN

KEY_PREFIX = "sk-stoker-"
ADMIN_PREFIX = "stoker-admin-"
ID_CHARS = 10

Priority = Literal["high", "normal", "low"]
PRIORITIES: dict[Priority, int] = {"high": 100, "normal": 0, "low": -100}
Role = Literal["viewer", "operator", "admin"]
ROLES: dict[Role, int] = {"viewer": 0, "operator": 1, "admin": 2}

TenantName = Annotated[
    str,
    Meta(
        pattern=NAME_PATTERN,
        description="1 to 96 letters, digits, '.', '_' or '-', the first a letter or digit",
    ),
]
_Count = Annotated[int, Meta(gt=0)] | None
_Patterns = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...], Meta(max_length=100)
]


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be used; what is left out is not limited. Days are UTC's."""

    requests_per_min: Annotated[_Count, Meta(description="requests in a minute")] = None
    tokens_per_min: Annotated[
        _Count, Meta(description="tokens read and written in a minute, e.g. 100000")
    ] = None
    concurrent: Annotated[_Count, Meta(description="requests at one time, waiting ones too")] = None
    tokens_per_day: Annotated[_Count, Meta(description="tokens read and written in a day")] = None
    gpu_s_per_day: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="seconds of a GPU in a day, shared ones by their share"),
    ] = None


NO_LIMITS = Limits()


class Scope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be called, by patterns as in a shell; none: everything."""

    models: Annotated[_Patterns, Meta(description="models' names, e.g. ['llama-*']")] = ()
    endpoints: Annotated[_Patterns, Meta(description="paths, e.g. ['/v1/chat/*']")] = ()


ANY = Scope()


class Tenant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner of keys. A tenant that nobody described has no limits and weight 1."""

    name: TenantName
    weight: Annotated[
        float, Meta(gt=0, le=1000, description="its share of a busy model, against the others'")
    ] = 1.0
    priority: Annotated[Priority, Meta(description="high, normal or low: who waits for whom")] = (
        "normal"
    )
    scope: Scope = ANY
    limits: Limits = NO_LIMITS


class KeySpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator says of a key."""

    tenant: TenantName
    note: Annotated[str, Meta(max_length=200, description="what it is for, in words")] = ""
    scope: Scope = ANY
    limits: Limits = NO_LIMITS
    priority: Annotated[Priority | None, Meta(description="left out: the tenant's")] = None
    expires_at: Annotated[
        float | None, Meta(description="seconds since 1970 UTC; left out: never")
    ] = None


class StoredKey(Struct, frozen=True, kw_only=True):
    """A key as it is stored and told to routers."""

    key_id: str
    digest: str
    spec: KeySpec
    created_at: float  # seconds since 1970 UTC
    old_digest: str | None = None  # the secret before the last rotation
    old_until: float = 0.0  # which opens until then


class StoredToken(Struct, frozen=True, kw_only=True):
    """A token for the admin API as it is stored."""

    token_id: str
    digest: str
    role: Role
    name: str  # whose it is, for the audit trail
    created_at: float
    expires_at: float | None = None


class KeyTable(Struct, frozen=True, kw_only=True):
    """All keys and tenants. `version` grows with every change under one leader."""

    version: int
    keys: tuple[StoredKey, ...] = ()
    tenants: tuple[Tenant, ...] = ()


class Used(NamedTuple):
    """What one account used: totals of a day, and requests of this moment."""

    requests: int = 0
    tokens: int = 0
    gpu_ms: int = 0
    in_flight: int = 0


class UsageReport(Struct, frozen=True, kw_only=True):
    """One router's own use of `day` (UTC, 2026-11-25) since it started: only grows within it.

    An account that is not listed has not changed since the last report that arrived.
    """

    day: str
    accounts: dict[str, Used] = {}  # "key:<id>" and "tenant:<name>"


class RouterUsage(Struct, frozen=True, kw_only=True):
    """What one boot of one router used."""

    router_id: str
    boot_id: int
    usage: UsageReport


class PeerUsage(Struct, frozen=True, kw_only=True):
    """What every other router, and this one before it was started again, used of `day`."""

    day: str
    accounts: dict[str, Used] = {}


def digest(token: str) -> str:
    """What is stored of a token: 64 hexadecimal digits."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def token_id(token: str, prefix: str) -> str | None:
    """The public id within a token of that kind; None where it is not such a token."""
    if not token.startswith(prefix):
        return None
    found = token[len(prefix) : len(prefix) + ID_CHARS]
    plain = found.isascii() and found.isalnum()  # it names an entry of the registry
    return found if plain and token[len(prefix) + ID_CHARS :].startswith("-") else None


def opens(token: str, stored: StoredKey, wall_s: float) -> bool:
    """Whether `token` is the key's secret, or the one before it while that still counts."""
    given = digest(token)
    new = hmac.compare_digest(given, stored.digest)
    old = hmac.compare_digest(given, stored.old_digest or stored.digest)
    return new or (old and stored.old_digest is not None and wall_s < stored.old_until)
