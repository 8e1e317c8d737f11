"""Which piece of waiting work is sent next, and what its end means for what follows. Pure.

Rules this file keeps:
- at most `limit` pieces are in flight, but that a tenant with none there may send one, while there
  are fewer than twice as many: whoever fills the limit keeps nobody else out;
- of each tenant's model as many as its window allows: one more after each answer, `first_window`
  at the beginning, one again after a refusal. A refusal may be a tenant's own (its limits), so it
  says nothing of the others;
- a refused or broken piece goes back to the head of its lane; its model rests for its tenant,
  longer with each refusal in a row. Only a piece that ended without an answer BREAKS_MAX times is
  given up on;
- tenants take turns; within a tenant the oldest owner goes first, past models that rest.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

REST_S = 1.0  # after the first refusal in a row; then twice as long each time
REST_MAX_S = 60.0
BREAKS_MAX = 3

# broken: sent, and no answer came; given up: so for the last time
Verdict = Literal["answered", "refused", "broken", "given up"]


class Item(NamedTuple):
    """One piece: line `line` of batch (or job) `owner`."""

    owner: int
    line: int
    tenant: str
    model: str


Key = tuple[int, int]
_Lane = tuple[int, str]


@dataclass(slots=True)
class _Model:
    window: int
    in_flight: int = 0
    refusals: int = 0  # in a row
    rests_until: float = 0.0


class Plan:
    """Work that is known, by tenant, owner and model; and what of it is in flight."""

    def __init__(self, limit: int, first_window: int) -> None:
        self._limit = limit
        self._first_window = first_window
        self._lanes: dict[str, dict[_Lane, deque[Item]]] = {}  # tenant -> its lanes; tenants turn
        self._models: dict[tuple[str, str], _Model] = {}  # by tenant and model
        self._flying: Counter[str] = Counter()  # by tenant
        self._breaks: Counter[Key] = Counter()
        self.in_flight: dict[Key, Item] = {}
        self.paused: frozenset[str] = frozenset()  # tenants of whom nothing is sent now

    def add(self, item: Item) -> None:
        """Add a piece after those of its lane; it must not be known already."""
        lanes = self._lanes.setdefault(item.tenant, {})
        lanes.setdefault((item.owner, item.model), deque()).append(item)

    def waiting(self, owner: int) -> int:
        """How many of the owner's pieces wait here."""
        return sum(
            len(lane)
            for lanes in self._lanes.values()
            for (of, _), lane in lanes.items()
            if of == owner
        )

    def next(self, now: float) -> Item | None:
        """The piece to send now, which is in flight from here on."""
        if len(self.in_flight) >= 2 * self._limit:
            return None
        full = len(self.in_flight) >= self._limit
        for tenant in list(self._lanes):
            if tenant in self.paused or (full and self._flying[tenant]):
                continue
            lanes = self._lanes[tenant]
            ready = (lane for lane in lanes if self._may(tenant, lane[1], now))
            lane = min(ready, default=None)
            if lane is None:
                continue
            item = lanes[lane].popleft()
            if not lanes[lane]:
                del lanes[lane]
            del self._lanes[tenant]
            if lanes:
                self._lanes[tenant] = lanes  # the others' turn
            self._model(item).in_flight += 1
            self._flying[tenant] += 1
            self.in_flight[item[:2]] = item
            return item
        return None

    def last_try(self, key: Key) -> bool:
        """Whether a piece in flight that ends without an answer is to be given up on."""
        return self._breaks[key] + 1 >= BREAKS_MAX

    def ended(self, key: Key, verdict: Verdict, now: float, retry_after_s: float = 0.0) -> None:
        """How a piece in flight ended; a refused or broken one waits again."""
        item = self._landed(key)
        model = self._model(item)
        if verdict == "answered":
            model.window = min(model.window + 1, self._limit)
            model.refusals = 0
        else:
            self._rest(model, now, retry_after_s)
        if verdict == "refused" or verdict == "broken":
            self._breaks[key] += verdict == "broken"
            lanes = self._lanes.setdefault(item.tenant, {})
            lanes.setdefault((item.owner, item.model), deque()).appendleft(item)
        else:
            self._breaks.pop(key, None)
            self._forget_if_unused(item)

    def drop(self, owner: int) -> list[Key]:
        """Forget what waits of an owner; returns what is in flight of it, which still has to end
        by `gone`."""
        for tenant in list(self._lanes):
            lanes = self._lanes[tenant]
            for lane in [lane for lane in lanes if lane[0] == owner]:
                del lanes[lane]
            if not lanes:
                del self._lanes[tenant]
        for key in [key for key in self._breaks if key[0] == owner]:
            del self._breaks[key]
        return [key for key in self.in_flight if key[0] == owner]

    def gone(self, key: Key) -> None:
        """A piece in flight was called off."""
        item = self._landed(key)
        self._breaks.pop(key, None)
        self._forget_if_unused(item)

    def _landed(self, key: Key) -> Item:
        """A piece that is in flight no more."""
        item = self.in_flight.pop(key)
        self._model(item).in_flight -= 1
        self._flying[item.tenant] -= 1
        if not self._flying[item.tenant]:
            del self._flying[item.tenant]
        return item

    def due_at(self, now: float) -> float | None:
        """When a model that rests may be asked again; None: nothing waits for that."""
        models = {(tenant, lane[1]) for tenant, lanes in self._lanes.items() for lane in lanes}
        rests = [self._models[model].rests_until for model in models if model in self._models]
        return min((until for until in rests if until > now), default=None)

    def _may(self, tenant: str, model: str, now: float) -> bool:
        known = self._models.get((tenant, model))
        return known is None or (known.rests_until <= now and known.in_flight < known.window)

    def _model(self, item: Item) -> _Model:
        return self._models.setdefault((item.tenant, item.model), _Model(self._first_window))

    def _rest(self, model: _Model, now: float, retry_after_s: float) -> None:
        """Pause a model. Pieces in flight together are refused together: they count once."""
        if model.rests_until > now:
            return
        pause_s = min(REST_S * 2**model.refusals, REST_MAX_S)
        model.refusals = min(model.refusals + 1, 16)
        model.rests_until = now + max(pause_s, min(retry_after_s, REST_MAX_S))
        model.window = 1

    def _forget_if_unused(self, item: Item) -> None:
        name = (item.tenant, item.model)
        used = any(lane[1] == item.model for lane in self._lanes.get(item.tenant, ()))
        if not used and not self._models[name].in_flight:
            del self._models[name]
