"""Who calls, what they may call, and what they still may use. Pure.

Rules this file keeps:
- nothing secret is in an error; a wrong key and one that never was are told apart by nobody;
- a new table counts from the next request on: a key that was revoked opens nothing more;
- what an account has used outlives every table that lists it;
- without a table nobody is let in but anonymous callers, where these are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from runtime import bearer
from runtime.contract.access import (
    KEY_PREFIX,
    NO_LIMITS,
    PRIORITIES,
    KeyTable,
    PeerUsage,
    Scope,
    StoredKey,
    Tenant,
    UsageReport,
    Used,
    opens,
    token_id,
)
from runtime.router.admission.key_limits import DAY_S, Account
from runtime.router.call.errors import CallError
from runtime.router.call.request import ANONYMOUS, Caller
from runtime.router.callers.local import Local

TOKEN_BYTES = 512
NOTHING = Used()
_ANSWERS = 512  # of `may`, remembered a caller
_PATH_BYTES = 64  # of a path that is remembered: a model's name is bounded already


class Keys:
    """Every key of the table in force. `now` is a steady clock's, `wall_s` seconds since 1970.

    `anonymous`: callers without a key are let in, as tenant "anonymous"; with `local` only those
    from this host, and only until there is a key.
    """

    def __init__(self, anonymous: bool, local: Local | None = None) -> None:
        self.anonymous = anonymous
        self.local = local
        self.table: KeyTable | None = None
        self.any = False  # whether there is any key
        self._callers: dict[str, tuple[StoredKey, Caller]] = {}
        self._accounts: dict[str, Account] = {}
        self._day = ""
        self._day_ends_at = 0.0  # on the steady clock

    def load(self, table: KeyTable, now: float) -> None:
        """Go by `table` from now on."""
        self.table = table
        self.any = bool(table.keys)
        if self.local is not None:
            self.anonymous = not self.any
        tenants = {tenant.name: tenant for tenant in table.tenants}
        names = {f"key:{key.key_id}" for key in table.keys}
        names |= {f"tenant:{key.spec.tenant}" for key in table.keys}
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if name in names or account.used.in_flight
        }
        self._callers = {
            key.key_id: (key, self._caller(key, tenants.get(key.spec.tenant), now))
            for key in table.keys
        }

    def _caller(self, key: StoredKey, tenant: Tenant | None, now: float) -> Caller:
        spec = key.spec
        tenant = tenant or Tenant(name=spec.tenant)
        mine = self._account(f"key:{key.key_id}")
        mine.limit(spec.limits, now)
        shared = self._account(f"tenant:{spec.tenant}")
        shared.limit(tenant.limits, now)
        return Caller(
            tenant=spec.tenant,
            key_id=key.key_id,
            priority=PRIORITIES[spec.priority or tenant.priority],
            weight=tenant.weight,
            accounts=(mine, shared),
            scopes=(spec.scope, tenant.scope),
        )

    def _account(self, name: str) -> Account:
        if name not in self._accounts:
            self._accounts[name] = Account(name, NO_LIMITS)
        return self._accounts[name]

    # ------------------------------------------------------------------------------- callers

    def identify(self, token: str, wall_s: float) -> Caller:
        """The caller who sent `token` ("": none). Raises CallError (401; 503 without a table)."""
        ours = token_id(token, KEY_PREFIX)
        if ours is None and self.anonymous:
            return ANONYMOUS
        if self.table is None and (ours is not None or not self.anonymous):
            raise _no_keys()
        if ours is None:
            sent = "what was sent is not an API key; " if token else ""
            raise _unauthorized(f"{sent}send an API key: Authorization: Bearer sk-stoker-…")
        found = self._callers.get(ours)
        if found is None or not opens(token, found[0], wall_s):
            raise _unauthorized("the API key is not valid")
        expires_at = found[0].spec.expires_at
        if expires_at is not None and wall_s >= expires_at:
            raise _unauthorized("the API key has expired")
        return found[1]

    def check_local(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Of a call without a key. Raises CallError (403) where it does not come from this host."""
        problem = self.local.problem(headers) if self.local is not None else None
        if problem is not None:
            message = (
                f"without an API key only this host may call, and {problem}; "
                "`stoker key create` makes a key"
            )
            raise CallError(403, "not_local", message)

    def on_behalf(self, owner: Caller, wall_s: float) -> Caller:
        """Who a call that `owner` left here is made for, at the owner's priority, by what its key
        may now. Raises CallError (401; 503 without a table)."""
        if owner.key_id is None:
            return owner
        if self.table is None:
            raise _no_keys()
        found = self._callers.get(owner.key_id)
        if found is None:
            raise _unauthorized("the API key that this was sent with has been revoked")
        expires_at = found[0].spec.expires_at
        if expires_at is not None and wall_s >= expires_at:
            raise _unauthorized("the API key that this was sent with has expired")
        return replace(found[1], priority=owner.priority)

    # ------------------------------------------------------------------------------- use

    def begin(
        self, caller: Caller, tokens: int, now: float, again: bool = False, counted: bool = False
    ) -> None:
        """A call of about `tokens`. Raises CallError (429): then nothing was charged.

        `again`: it was let in before and is tried by another model: that is no second request.
        `counted`: it was left here, and counted as a request then: its other limits hold.
        """
        left_s = max(1.0, self._day_ends_at - now)
        for account in () if again else caller.accounts:
            over = account.over(tokens, left_s, now, counted)
            if over is not None:
                headers = rate_headers(caller, now)
                raise CallError(
                    429, over.code, over.message, retry_after_s=over.retry_after_s, headers=headers
                )
        for account in caller.accounts:
            account.begin(tokens, again or counted)

    def end(self, caller: Caller, expected: int, tokens: int, gpu_s: float) -> None:
        """End a call that took `tokens`, where `expected` were paid for."""
        for account in caller.accounts:
            account.end(expected, tokens, round(gpu_s * 1000))

    # ------------------------------------------------------------------------------- other routers

    def day(self, day: str, left_s: float, now: float) -> None:
        """Count for this day (UTC), which lasts `left_s` more seconds."""
        self._day_ends_at = now + min(left_s, DAY_S)
        if day != self._day:
            self._day = day
            for account in self._accounts.values():
                account.turn()

    def report(self, everything: bool) -> UsageReport:
        """What was used, of accounts that changed since the last report, or of all."""
        accounts = {}
        for name, account in self._accounts.items():
            if account.changed or everything:
                account.changed = False
                accounts[name] = account.used
        return UsageReport(day=self._day, accounts=accounts)

    def hear(self, peers: PeerUsage, now: float) -> None:
        """What all others used; of another day than ours it says nothing."""
        if peers.day == self._day:
            for name, account in self._accounts.items():
                account.hear(peers.accounts.get(name, NOTHING), now)


def given_token(value: bytes) -> str:
    """The token of an Authorization or X-Api-Key header, also without a scheme; "" where it can
    be none."""
    token = bearer.token_of(value)
    if not token:
        word = value.strip().partition(b" ")[0]
        token = b"" if word.lower() == b"bearer" else word
    return token.decode("ascii", "replace") if len(token) <= TOKEN_BYTES else ""


def rate_headers(caller: Caller, now: float) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-*` of the key, or of its tenant where the key has no limit a minute."""
    for account in caller.accounts:
        if headers := account.headers(now):
            return headers
    return []


def may(caller: Caller, names: tuple[str, ...], model: str, path: str) -> bool:
    """Whether the caller may call `path` (without query) for `model`, which goes by `names` too."""
    known = caller.known.get((*names, model, path))
    if known is None:
        known = all(_allows(scope, (model, *names), path) for scope in caller.scopes)
        if len(caller.known) < _ANSWERS and len(path) <= _PATH_BYTES:
            caller.known[*names, model, path] = known
    return known


def reaches(caller: Caller, path: str) -> bool:
    """Whether the caller may call `path` (without query), whatever the model."""
    return all(
        not scope.endpoints or any(fnmatchcase(path, p) for p in scope.endpoints)
        for scope in caller.scopes
    )


def _allows(scope: Scope, names: Iterable[str], path: str) -> bool:
    in_models = not scope.models or any(fnmatchcase(n, p) for p in scope.models for n in names)
    return in_models and (not scope.endpoints or any(fnmatchcase(path, p) for p in scope.endpoints))


def sees(caller: Caller, names: Iterable[str]) -> bool:
    """Whether a model that goes by `names` is one of those the caller may call at all."""
    names = tuple(names)
    return all(
        not s.models or any(fnmatchcase(n, p) for p in s.models for n in names)
        for s in caller.scopes
    )


def _no_keys() -> CallError:
    message = "this router has not heard of any keys yet"
    return CallError(503, "no_keys", message, retry_after_s=1.0)


def _unauthorized(message: str) -> CallError:
    return CallError(401, "invalid_api_key", message)
