"""Who of those that wait for one model goes first, and who leaves a full queue. Pure.

Order: the highest priority; within it the tenant that was given the least, by a *virtual token
counter* (Sheng et al., "Fairness in Serving Large Language Models", 2024); of a tenant, whoever
arrived first. A counter grows by tokens / weight of what is sent while others wait. One that begins
to wait is lifted to the least counter of those who wait already: nobody saves up by being idle.
Example: a and b wait, b of weight 2, each request of 100 tokens. After one of a's (100) go two of
b's (50, 100), then one of each in turn of their counters: b gets twice what a gets.

Rules this file keeps:
- what waits is in one lane of one tenant, in order of arrival; one that comes back after its
  replica failed takes its old place there;
- of a full queue the newest of whoever takes most of its lowest priority leaves, if the newcomer
  is of a higher priority or of a tenant with less; so one tenant cannot keep the others out.
"""

from __future__ import annotations

import bisect
import heapq
import operator
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar


class RequestProfile(NamedTuple):
    """Whose request it is and what it would like."""

    tenant: str = ""
    priority: int = 0  # higher goes first
    tokens: int = 1  # about how many it makes the engine read and write
    affinity: tuple[int, ...] = ()  # keys of longer and longer beginnings of its prompt
    wait_s: float | None = None  # its caller waits no longer than this for a replica
    weight: float = 1.0  # the tenant's share of a busy model, against the others'
    limit: str = ""  # what `wait_s` comes from, in words


BACKGROUND = -1000  # this priority and below: only what nobody else wants


class Waiter(Protocol):
    """A request that waits."""

    @property
    def seq(self) -> int:
        """Number by arrival."""

    @property
    def profile(self) -> RequestProfile:
        """What it asks for, and for whom."""


W = TypeVar("W", bound=Waiter)
_by_seq = operator.attrgetter("seq")


class FairQueue(Generic[W]):
    """Requests that wait for one model. Iterating gives them by arrival."""

    def __init__(self) -> None:
        self._all: list[W] = []  # by arrival
        self._lanes: dict[int, dict[str, list[W]]] = {}  # by priority and tenant
        self._given: dict[str, float] = {}  # virtual token counters, since the queue was empty
        self._deadlines: list[tuple[float, int]] = []  # a heap; those that left are still in it
        self._seqs: dict[int, W] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[W]:
        return iter(self._all)

    @property
    def oldest(self) -> W:
        """Of all that wait. There must be one."""
        return self._all[0]

    @property
    def background(self) -> int:
        """How many wait in the background."""
        return sum(
            len(lane)
            for priority, lanes in self._lanes.items()
            if priority <= BACKGROUND
            for lane in lanes.values()
        )

    def add(self, waiter: W, deadline: float) -> None:
        """Add a request, which waits at most until `deadline`."""
        profile = waiter.profile
        others = {t for lanes in self._lanes.values() for t in lanes} - {profile.tenant}
        least = min((self._given[t] for t in others), default=0.0)
        self._given[profile.tenant] = max(self._given.get(profile.tenant, 0.0), least)
        lanes = self._lanes.setdefault(profile.priority, {})
        bisect.insort(lanes.setdefault(profile.tenant, []), waiter, key=_by_seq)
        bisect.insort(self._all, waiter, key=_by_seq)
        self._seqs[waiter.seq] = waiter
        heapq.heappush(self._deadlines, (deadline, waiter.seq))

    def remove(self, waiter: W) -> None:
        """Take a request out; it must be in the queue."""
        del self._seqs[waiter.seq]
        _take(self._all, waiter)
        profile = waiter.profile
        lanes = self._lanes[profile.priority]
        lane = lanes[profile.tenant]
        _take(lane, waiter)
        if not lane:
            del lanes[profile.tenant]
            if not lanes:
                del self._lanes[profile.priority]
        if not self._all:
            self._deadlines.clear()
            self._given.clear()

    def __contains__(self, waiter: W) -> bool:
        return waiter.seq in self._seqs

    def first(self) -> W:
        """Whose turn it is. There must be one."""
        lanes = self._lanes[max(self._lanes)]
        given = self._given
        return min((given[tenant], lane[0].seq, lane[0]) for tenant, lane in lanes.items())[2]

    def sent(self, profile: RequestProfile) -> None:
        """A request of that profile is sent while some wait, itself perhaps."""
        self._given[profile.tenant] = (
            self._given.get(profile.tenant, 0.0) + profile.tokens / profile.weight
        )

    def loser(self, newcomer: RequestProfile) -> W | None:
        """Who leaves this full queue in place of a newcomer; None: the newcomer does."""
        lowest = min(self._lanes)
        tenant, lane = max(
            self._lanes[lowest].items(), key=lambda item: len(item[1]) / item[1][0].profile.weight
        )
        if newcomer.priority == lowest:
            mine = len(self._lanes[lowest].get(newcomer.tenant, ())) + 1
            most = len(lane) / lane[0].profile.weight
            if newcomer.tenant == tenant or mine / newcomer.weight >= most:
                return None
        return lane[-1] if newcomer.priority >= lowest else None

    # -- deadlines

    def next_deadline(self) -> float | None:
        """When the first of those that wait has waited long enough."""
        while self._deadlines and self._deadlines[0][1] not in self._seqs:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def set_deadlines(self, deadline: Callable[[W], float]) -> None:
        """Other ones from now on."""
        self._deadlines = [(deadline(waiter), waiter.seq) for waiter in self._all]
        heapq.heapify(self._deadlines)

    def late(self, now: float) -> list[W]:
        """The requests that have waited long enough; they stay in the queue."""
        found = {}  # what came back is in the heap for each time it waited
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            seq = heapq.heappop(self._deadlines)[1]
            found[seq] = self._seqs[seq]
        return list(found.values())

    def check(self) -> None:
        """Raises AssertionError where the rules above do not hold."""
        lanes = [w for tenants in self._lanes.values() for lane in tenants.values() for w in lane]
        assert sorted(lanes, key=_by_seq) == self._all
        assert set(self._seqs) == {w.seq for w in self._all}
        assert {seq for _, seq in self._deadlines} >= set(self._seqs)
        assert set(self._given) >= {w.profile.tenant for w in self._all}


def _take(waiting: list[W], waiter: W) -> None:
    index = bisect.bisect_left(waiting, waiter.seq, key=_by_seq)
    assert waiting[index] is waiter
    del waiting[index]
