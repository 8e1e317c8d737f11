"""What each key and tenant used of a day, all routers together. Pure.

Rules this file keeps:
- a boot of a router is one entry whose figures only grow: told twice or late it changes nothing;
- what routers of before used counts until the day ends, so a restart gives nobody a fresh quota;
- in flight counts only what a router told within LIVE_S.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from runtime.contract.access import PeerUsage, RouterUsage, Used

LIVE_S = 5.0
NOTHING = Used()


class BootUsage(Struct, frozen=True, kw_only=True):
    """One boot of one router on one day, as it is stored."""

    router_id: str
    boot_id: int
    accounts: dict[str, Used]


class Usage:
    """One day's use. `now` is seconds of a steady clock, `day` a date in UTC as in 2026-11-25."""

    def __init__(self, day: str, stored: Iterable[BootUsage] = ()) -> None:
        self.day = day
        self._boots = {(s.router_id, s.boot_id): dict(s.accounts) for s in stored}
        self._heard_at: dict[tuple[str, int], float] = {}
        self.unsaved: set[tuple[str, int]] = set()

    def tell(self, told: RouterUsage, now: float) -> PeerUsage:
        """Take one router's report; what all others used, of the accounts that it knows."""
        mine = (told.router_id, told.boot_id)
        if told.usage.day == self.day:
            self._heard_at[mine] = now
            known = self._boots.setdefault(mine, {})
            for name, used in told.usage.accounts.items():
                known[name] = _later(known.get(name, NOTHING), used)
                self.unsaved.add(mine)
        return PeerUsage(day=self.day, accounts=self._without(mine, now))

    def totals(self, now: float) -> dict[str, Used]:
        """Every account's use by all routers."""
        return self._without(None, now)

    def boot(self, boot: tuple[str, int]) -> BootUsage:
        """What is stored of one boot."""
        return BootUsage(router_id=boot[0], boot_id=boot[1], accounts=dict(self._boots[boot]))

    def _without(self, mine: tuple[str, int] | None, now: float) -> dict[str, Used]:
        sums: dict[str, Used] = {}
        for boot, accounts in self._boots.items():
            if boot == mine:
                continue
            live = now - self._heard_at.get(boot, -LIVE_S) < LIVE_S
            for name, used in accounts.items():
                total = sums.get(name, NOTHING)
                sums[name] = Used(
                    total.requests + used.requests, total.tokens + used.tokens,
                    total.gpu_ms + used.gpu_ms, total.in_flight + used.in_flight * live,
                )  # fmt: skip
        return sums


def _later(known: Used, told: Used) -> Used:
    return Used(
        max(known.requests, told.requests), max(known.tokens, told.tokens),
        max(known.gpu_ms, told.gpu_ms), told.in_flight,
    )  # fmt: skip
