"""Which replicas are left alone for a while, and how many requests may be tried twice. Pure.

Rules this file keeps:
- a replica that gave no answer rests for REST_S, doubled with each further such failure in a row,
  at most MAX_REST_S; from the second on it then gets one probe each PROBE_S until one is answered;
- those sent before a failure was known count as that one failure;
- an answer of 5xx is a reason to prefer another replica, from SERVER_ERRORS in a row on, but never
  to send nothing: callers of the last replica get the engine's own words;
- retries are at most RETRY_SHARE of the requests of the last WINDOW_S, or FREE_RETRIES.
"""

from __future__ import annotations

from dataclasses import dataclass

REST_S = 2.0
MAX_REST_S = 5.0
PROBE_S = 1.0
SERVER_ERRORS = 5
WINDOW_S = 10.0
RETRY_SHARE = 0.2
FREE_RETRIES = 100  # in a window: few requests make no storm


@dataclass(slots=True)
class _Replica:
    failures: int = 0  # in a row: no answer at all
    server_errors: int = 0  # in a row: answered with 5xx
    failed_at: float = 0.0
    rests_until: float = 0.0  # 0: it does not


class Breaker:
    """One router's word on each replica that is not known to be fine; the others cost nothing."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def __bool__(self) -> bool:
        """Whether any replica is in doubt."""
        return bool(self._replicas)

    def rests(self, replica_id: str, now: float) -> bool:
        """No request may go there now."""
        replica = self._replicas.get(replica_id)
        return replica is not None and replica.failures > 0 and replica.rests_until > now

    def avoided(self, replica_id: str, now: float) -> bool:
        """Another replica is to be preferred: it rests, or answers with errors only."""
        replica = self._replicas.get(replica_id)
        return replica is not None and replica.rests_until > now

    def chosen(self, replica_id: str, now: float) -> None:
        """A request goes there; if that is a probe, the others wait for what it brings."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.failures > 1:
            replica.rests_until = now + PROBE_S

    def failed(self, replica_id: str, sent_at: float, now: float) -> None:
        """A request sent there at `sent_at` got no answer."""
        replica = self._replicas.setdefault(replica_id, _Replica())
        if replica.failures and sent_at <= replica.failed_at:
            return
        replica.failures += 1
        replica.failed_at = now
        replica.rests_until = now + min(MAX_REST_S, REST_S * 2 ** (replica.failures - 1))

    def answered(self, replica_id: str, now: float, server_error: bool) -> bool:
        """The first byte of an answer came; whether requests may go there now that could not."""
        replica = self._replicas.get(replica_id)
        if not server_error:
            if replica is not None:
                del self._replicas[replica_id]
            return replica is not None
        if replica is None:
            replica = self._replicas[replica_id] = _Replica()
        replica.failures = 0
        replica.server_errors += 1
        more = replica.server_errors - SERVER_ERRORS
        if more >= 0:
            replica.rests_until = now + min(MAX_REST_S, REST_S * 2 ** min(more, 9))
        return True

    def keep_only(self, replica_ids: set[str]) -> None:
        """Forget the others: a replica that was away is trusted again."""
        self._replicas = {r: v for r, v in self._replicas.items() if r in replica_ids}

    def tick(self, now: float) -> None:
        """Time has passed: rests end."""
        for replica in self._replicas.values():
            if replica.rests_until <= now:
                replica.rests_until = 0.0

    def rests_end(self) -> list[float]:
        """When the rests end that no tick has ended."""
        return [r.rests_until for r in self._replicas.values() if r.rests_until]


class RetryBudget:
    """Requests and retries of the last WINDOW_S, in two halves so that a burst is forgotten.

    Example: 1,000 requests in the last 10 s allow 200 retries; 20 requests allow 100.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._requests = self._retries = 0
        self._requests_before = self._retries_before = 0

    def request(self, now: float) -> None:
        """One more request came in."""
        if now >= self._until:
            self._turn(now)
        self._requests += 1

    def take(self, now: float) -> bool:
        """Whether one may be sent again; if so, it is counted."""
        if now >= self._until:
            self._turn(now)
        requests = self._requests + self._requests_before
        if self._retries + self._retries_before >= max(FREE_RETRIES, RETRY_SHARE * requests):
            return False
        self._retries += 1
        return True

    def _turn(self, now: float) -> None:
        half = WINDOW_S / 2
        recent = now < self._until + half
        self._requests_before = self._requests if recent else 0
        self._retries_before = self._retries if recent else 0
        self._requests = self._retries = 0
        self._until = now + half
