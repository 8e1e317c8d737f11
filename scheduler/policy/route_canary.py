"""Whether a canary's share grows, stays or goes: by its errors and its TTFT. Pure.

Rules this file keeps:
- a step ends well only when it lasted `interval_s` and had `min_requests`; a breach that no number
  of good requests up to `min_requests` could bring back ends it at once;
- TTFT is counted from when a request was sent to the replica, so that a cold start is no fault of
  the new version; it is judged once both sides have `min_requests` answers in this step;
- every verdict says why in words; after `promote` or `rollback` there is nothing left to judge.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from runtime.wire.routes import Canary, DemandReport, TargetCounts

Key = tuple[str, str]  # route, model


class Counts(NamedTuple):
    """What happened to a target's requests within a step."""

    requests: int = 0
    errors: int = 0
    first_bytes: int = 0
    first_byte_s: float = 0.0  # the sum over these

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(
            self.requests + other.requests,
            self.errors + other.errors,
            self.first_bytes + other.first_bytes,
            self.first_byte_s + other.first_byte_s,
        )

    def mean_ttft_s(self) -> float:
        """Mean seconds to the first byte; 0 where there was none."""
        return self.first_byte_s / self.first_bytes if self.first_bytes else 0.0


class Verdict(NamedTuple):
    """`next` is the step after this one."""

    action: Literal["hold", "next", "promote", "rollback"]
    reason: str


def judge(canary: Canary, step: int, in_step_s: float, new: Counts, old: Counts) -> Verdict:
    """`new` and `old`: the canary and the other targets, both since this step began."""
    breach = _too_many_errors(canary, new) or _too_slow(canary, new, old)
    if breach is not None:
        return Verdict("rollback", breach)
    if new.requests < canary.min_requests:
        return Verdict("hold", f"{new.requests} of min_requests {canary.min_requests} requests")
    if in_step_s < canary.interval_s:
        return Verdict("hold", f"{in_step_s:.0f} s of interval_s {canary.interval_s:g} s")
    if canary.max_ttft_ratio is not None:
        if new.first_bytes < canary.min_requests:
            return Verdict("hold", f"only {new.first_bytes} answers of it to compare the TTFT of")
        if old.first_bytes < canary.min_requests:
            return Verdict("hold", f"only {old.first_bytes} answers of the others to compare with")
    good = f"{new.errors} errors in {new.requests} requests at {canary.steps[step]:g} %"
    if canary.max_ttft_ratio is not None:
        good += f", mean TTFT {new.mean_ttft_s():.3f} s against {old.mean_ttft_s():.3f} s"
    return Verdict("next" if step + 1 < len(canary.steps) else "promote", good)


def _too_many_errors(canary: Canary, new: Counts) -> str | None:
    """Why, if so. Example: max_error_rate 0.1 and min_requests 20: the third error, at once."""
    if new.errors <= canary.max_error_rate * max(new.requests, canary.min_requests):
        return None
    allowed = f"{canary.max_error_rate:.1%} is max_error_rate"
    return f"{new.errors} errors in {new.requests} requests: {allowed}"


def _too_slow(canary: Canary, new: Counts, old: Counts) -> str | None:
    limit = canary.max_ttft_ratio
    if limit is None or min(new.first_bytes, old.first_bytes) < canary.min_requests:
        return None
    mine, theirs = new.mean_ttft_s(), old.mean_ttft_s()
    if mine <= limit * theirs:
        return None
    return f"mean TTFT {mine:.3f} s against {theirs:.3f} s: max_ttft_ratio is {limit:g}"


class Observed:
    """What all routers together saw of each target since `restart` of its route.

    Routers tell what they counted since they started, so a lost or doubled report changes nothing.
    What a router had counted before this leader first heard of it is not looked at, nor what it had
    counted when it told that it routes by the table of the last `restart`.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[DemandReport, dict[Key, TargetCounts]]] = {}
        self._since: dict[str, int] = {}  # route -> the version of the table that began this step
        self._totals: dict[Key, Counts] = {}

    def heard(self, report: DemandReport) -> None:
        """Take one router's report; one that is older than the last changes nothing."""
        last, counted = self._last.get(report.router_id, (None, {}))
        now = {(part.route, part.model): part for part in report.targets}
        if last is not None:
            if (report.boot_id, report.seq) <= (last.boot_id, last.seq):
                return
            if report.boot_id != last.boot_id:
                counted = {}
            for key, part in now.items():
                if last.routes_version >= self._since.get(key[0], 0):
                    more = _since(counted.get(key), part)
                    self._totals[key] = self._totals.get(key, Counts()).plus(more)
        self._last[report.router_id] = (report, now)

    def of(self, route: str, model: str) -> Counts:
        """One target's."""
        return self._totals.get((route, model), Counts())

    def restart(self, route: str, version: int) -> None:
        """Begin to count the route's requests again, from when a router goes by that table."""
        self._since[route] = version
        for key in [key for key in self._totals if key[0] == route]:
            del self._totals[key]


def _since(before: TargetCounts | None, part: TargetCounts) -> Counts:
    """What came to it; all of it where it counts from nothing again, as the route was new to it."""
    if before is None or part.requests < before.requests or part.first_bytes < before.first_bytes:
        return Counts(part.requests, part.errors, part.first_bytes, part.first_byte_s)
    return Counts(
        part.requests - before.requests, part.errors - before.errors,
        part.first_bytes - before.first_bytes, part.first_byte_s - before.first_byte_s,
    )  # fmt: skip
