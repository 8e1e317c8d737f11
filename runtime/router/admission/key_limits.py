"""How much an account may still use: requests and tokens a minute, a day, and at one time. Pure.

Rules this file keeps:
- a limit a minute is a bucket that holds one minute's worth and fills evenly, so an account that
  was quiet may spend a minute's worth at once;
- a request pays for the tokens it is expected to take when it comes and the difference when it
  ends; a bucket may go below zero by that, and is waited for;
- a request that is refused pays nothing;
- what other routers used counts as soon as they told. Each router tells once a second and hears
  the others' in the same exchange, so with N routers an account may get past a limit by at most
  what N - 1 routers let in within two seconds, and each never lets in more than one bucket at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.contract.access import NO_LIMITS, Limits, Used

DAY_S = 86400.0
_Names = tuple[bytes, bytes, bytes]
_HEADERS = (b"x-ratelimit-limit-%b", b"x-ratelimit-remaining-%b", b"x-ratelimit-reset-%b")
_REQUESTS: _Names = tuple(name % b"requests" for name in _HEADERS)  # type: ignore[assignment]
_TOKENS: _Names = tuple(name % b"tokens" for name in _HEADERS)  # type: ignore[assignment]


class Over(NamedTuple):
    """A limit that a request would go beyond; `retry_after_s`: when to come back."""

    code: str
    message: str
    retry_after_s: float


class Bucket:
    """`limit` a minute. Example: 60 a minute, 60 spent at 0 s: at 10 s there are 10 again."""

    __slots__ = ("_at", "level", "limit", "shown")

    def __init__(self, limit: int, now: float) -> None:
        self._at = now
        self.limit = limit
        self.level = float(limit)
        self.shown = b"%d" % limit  # as a header has it

    def change(self, limit: int) -> None:
        """Another limit; what was spent of the old one stays spent."""
        self.level += limit - self.limit
        self.limit = limit
        self.shown = b"%d" % limit

    def fill(self, now: float) -> None:
        """Time has passed."""
        if now > self._at:
            self.level = min(self.limit, self.level + (now - self._at) * self.limit / 60.0)
            self._at = now

    def wait_s(self, amount: float) -> float:
        """Seconds until so much is there; more than it ever holds counts as a full bucket."""
        lacks = min(amount, self.limit) - self.level
        return max(0.0, lacks * 60.0 / self.limit)

    @property
    def full_in_s(self) -> float:
        """Seconds until the bucket is full again."""
        return (self.limit - self.level) * 60.0 / self.limit


@dataclass(slots=True)
class Account:
    """One key, or one tenant: its limits, and what was used of them.

    Every method takes `now`, seconds of a steady clock. `used` is this router's own, of the day
    that `turn` was last called for; `peers` is what it heard.
    """

    name: str  # "key:<id>" or "tenant:<name>"
    limits: Limits
    requests: int = 0  # plain numbers, as each call changes them
    tokens: int = 0
    gpu_ms: int = 0
    in_flight: int = 0
    peers: Used = field(default_factory=Used)
    changed: bool = False  # since the last report
    _requests: Bucket | None = None
    _tokens: Bucket | None = None
    _heard: Used | None = None

    @property
    def used(self) -> Used:
        """What this router itself let through."""
        return Used(self.requests, self.tokens, self.gpu_ms, self.in_flight)

    def limit(self, limits: Limits, now: float) -> None:
        """Hold it to `limits` from now on; what was used of a limit that stays is not forgotten."""
        self.limits = NO_LIMITS if limits == NO_LIMITS else limits
        self._requests = _bucket(self._requests, limits.requests_per_min, now)
        self._tokens = _bucket(self._tokens, limits.tokens_per_min, now)

    def over(
        self, tokens: int, day_left_s: float, now: float, counted: bool = False
    ) -> Over | None:
        """The limit that one more request of about `tokens` would go beyond; `counted`: as a
        request it was counted before."""
        limits = self.limits
        if limits is NO_LIMITS:
            return None
        in_flight = self.in_flight + self.peers.in_flight
        if limits.concurrent is not None and in_flight >= limits.concurrent:
            text = f"{limits.concurrent} requests at one time (concurrent)"
            return self._over("concurrency_limit", text, 1.0)
        if self._requests is not None and not counted:
            self._requests.fill(now)
            if (wait_s := self._requests.wait_s(1)) > 0:
                text = f"{limits.requests_per_min} requests a minute (requests_per_min)"
                return self._over("rate_limit_exceeded", text, wait_s)
        if self._tokens is not None:
            self._tokens.fill(now)
            if (wait_s := self._tokens.wait_s(tokens)) > 0:
                text = f"{limits.tokens_per_min} tokens a minute (tokens_per_min)"
                return self._over("rate_limit_exceeded", text, wait_s)
        return self._over_day(day_left_s)

    def _over_day(self, day_left_s: float) -> Over | None:
        limits = self.limits
        tokens = self.tokens + self.peers.tokens
        if limits.tokens_per_day is not None and tokens >= limits.tokens_per_day:
            text = f"{limits.tokens_per_day} tokens a day (tokens_per_day)"
            return self._over("quota_exceeded", text, day_left_s)
        gpu_s = (self.gpu_ms + self.peers.gpu_ms) / 1000
        if limits.gpu_s_per_day is not None and gpu_s >= limits.gpu_s_per_day:
            text = f"{limits.gpu_s_per_day:g} GPU-seconds a day (gpu_s_per_day)"
            return self._over("quota_exceeded", text, day_left_s)
        return None

    def _over(self, code: str, limit: str, retry_after_s: float) -> Over:
        kind, _, name = self.name.partition(":")
        return Over(code, f"the limit of {kind} {name} is reached: {limit}", retry_after_s)

    def begin(self, tokens: int, again: bool = False) -> None:
        """A request that takes about `tokens` was let in; `again`: it was counted before."""
        new = 0 if again else 1
        self.requests += new
        self.in_flight += 1
        self._pay(new, tokens)

    def end(self, expected: int, tokens: int, gpu_ms: int) -> None:
        """End a request that took `tokens`, where `expected` were paid for."""
        self.tokens += tokens
        self.gpu_ms += gpu_ms
        self.in_flight -= 1
        self._pay(0, tokens - expected)

    def _pay(self, requests: int, tokens: int) -> None:
        self.changed = True
        if self._requests is not None:
            self._requests.level -= requests
        if self._tokens is not None:
            self._tokens.level = min(self._tokens.limit, self._tokens.level - tokens)

    def hear(self, peers: Used, now: float) -> None:
        """What all others used of this day. What is new of it is paid for here as well.

        A sum that is lower than one heard before is a new leader's that does not know all yet.
        """
        before = self._heard
        if before is not None:
            if self._requests is not None:
                self._requests.fill(now)
                self._requests.level -= max(0, peers.requests - before.requests)
            if self._tokens is not None:
                self._tokens.fill(now)
                self._tokens.level -= max(0, peers.tokens - before.tokens)
        known = before or Used()
        self._heard = Used(
            max(known.requests, peers.requests), max(known.tokens, peers.tokens),
            max(known.gpu_ms, peers.gpu_ms), peers.in_flight,
        )  # fmt: skip
        self.peers = self._heard

    def turn(self) -> None:
        """A new day has begun."""
        self.requests = self.tokens = self.gpu_ms = 0
        self.peers = Used(in_flight=self.peers.in_flight)
        self._heard = None

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """The usual `x-ratelimit-*`; nothing where there is no limit a minute."""
        out: list[tuple[bytes, bytes]] = []
        if self._requests is not None:
            _show(self._requests, _REQUESTS, now, out)
        if self._tokens is not None:
            _show(self._tokens, _TOKENS, now, out)
        return out


def _show(bucket: Bucket, names: _Names, now: float, out: list[tuple[bytes, bytes]]) -> None:
    bucket.fill(now)
    limit, remaining, reset = names
    level = bucket.level
    out.append((limit, bucket.shown))
    out.append((remaining, b"%d" % (level if level > 0 else 0)))
    out.append((reset, b"%ds" % -(-bucket.full_in_s // 1)))


def _bucket(old: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if limit is None:
        return None
    if old is None:
        return Bucket(limit, now)
    old.fill(now)
    old.change(limit)
    return old


class GpuShare:
    """A replica's time, shared among the requests in flight there.

    A clock a replica runs at `devices` / requests in flight, so what a request is charged is the
    difference of two readings (processor sharing). Example: two requests together for 4 s on one
    device are charged 2 s each; with 2 devices 4 s each.
    """

    def __init__(self) -> None:
        self._clocks: dict[str, list[float]] = {}  # replica -> [reading, as of, in flight]

    def begin(self, replica_id: str, now: float) -> float:
        """A request is sent there; the reading to give to `end`."""
        clock = self._clocks.setdefault(replica_id, [0.0, now, 0])
        _advance(clock, now)
        clock[2] += 1
        return clock[0]

    def end(self, replica_id: str, reading: float, devices: int, now: float) -> float:
        """End a request; the GPU-seconds that it took."""
        clock = self._clocks[replica_id]
        _advance(clock, now)
        charged = (clock[0] - reading) * devices
        clock[2] -= 1
        if not clock[2]:
            del self._clocks[replica_id]
        return charged


def _advance(clock: list[float], now: float) -> None:
    if clock[2]:
        clock[0] += (now - clock[1]) / clock[2]
    clock[1] = now
