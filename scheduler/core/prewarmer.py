"""Warms models ahead of expected calls, and keeps them warm while that pays. Pure.

Rules this file keeps:
- a prewarm takes free room only, on devices where nothing else starts, and while nobody waits for
  room anywhere: it never harms a model that is called;
- a model whose spec says `forecast: off`, or without history, is left to its idle timer;
- with `stand_by`, a model that was never started is, once, when nothing else is to be done: its
  footprint is measured, its files are fetched, and its first caller finds it asleep or staged;
- what an operator unloaded stays down until a call waits for it, whatever the forecast says;
- each prewarm is counted: a hit if a call came before it went down again, else wasted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.core.planner import Planning
from scheduler.policy.eviction import busy
from scheduler.policy.ladder import GUESS_START_S, Descent, climb_s, descents
from scheduler.policy.placement import Fit, place
from scheduler.policy.warm_value import KeepWarm, LetGo, advise, hold_price
from scheduler.signals.forecast import Arrivals, StoredArrivals, restore
from scheduler.state import messages as m
from scheduler.state.cluster import Model, Replica, Router, Stage

ROOM_PRICE = 0.005  # holding a whole device for 600 s must save 3 s of waiting: power, and others
DISMISSED = math.inf  # `forecast_at` of a model that an operator unloaded
ASK_AGAIN_S = 60.0  # without an opinion, or without room
FORECAST, STAND_BY = "forecast: a call is expected", "stand-by"  # causes
STAND_BY_S = 5.0  # between two models that are started to stand by
STAND_BY_HOT_S = 5.0
SKETCH_S = 300.0  # how often a model's history is written down
SKETCHES_AT_ONCE = 20


class Warm(Planning):
    """From history to prewarms."""

    _stand_by_at = 0.0

    def _arrived(self, last: Router | None, report: DemandReport, now: float) -> None:
        """Count the calls that a router reports."""
        for part in report.models:
            model = self.state.models.get(part.model)
            if model is not None:
                count = _new_calls(last, report, part)
                if count > 0:
                    self._called(model, count, part.waiting > 0, now)

    def _called(self, model: Model, count: int, waits: bool, now: float) -> None:
        for replica in model.replicas.values():
            self.state.prewarms.called(replica.replica_id)
        model.warm_until = 0.0
        # Calls that a dismissed model's last replica answered are reported after the unload.
        if model.forecast_at != DISMISSED or waits or model.coming():
            model.forecast_at = 0.0
        if model.spec.forecast == "off":
            model.arrivals = None
            return
        if model.arrivals is None:
            model.arrivals = Arrivals(now)
        model.arrivals.observe(now, now + self.state.wall_offset_s, count)
        model.odds = (-1e9, 0.0)

    def _recall(self, sketches: dict[str, StoredArrivals], now: float) -> None:
        for name, sketch in sketches.items():
            model = self.state.models.get(name)
            if model is not None and model.spec.forecast != "off":
                model.arrivals = restore(sketch, now, now + self.state.wall_offset_s)
                model.sketched_at = now

    def _write_down(self, now: float) -> None:
        """A few histories at a time."""
        told = 0
        for model in self.state.models.values():
            arrivals = model.arrivals
            if arrivals is None or arrivals.last_at is None:
                continue
            if arrivals.last_at > model.sketched_at and now - model.sketched_at >= SKETCH_S:
                model.sketched_at = now
                sketch = arrivals.sketch(now, now + self.state.wall_offset_s)
                self._out.append(m.Sketched(model=model.name, sketch=sketch))
                told += 1
                if told == SKETCHES_AT_ONCE:
                    return

    # ------------------------------------------------------------------------- ahead of a call

    def _dismiss(self, model: Model) -> None:
        """An operator unloaded it: the forecast has no say until a call has to wait for it."""
        model.warm_until, model.forecast_at = 0.0, DISMISSED

    def _forecast(self, now: float) -> None:
        """Look at each model whose time has come."""
        for model in self.state.models.values():
            if model.arrivals is None or model.forecast_at > now:
                continue
            if model.spec.forecast == "off" or model.blocked_until > now or model.coming():
                model.forecast_at = now + ASK_AGAIN_S
                continue
            self._consider(model, now)

    def _consider(self, model: Model, now: float) -> None:
        assert model.arrivals is not None
        level = max((r.sleep_level for r in model.asleep()), default=0)
        wall_s = now + self.state.wall_offset_s
        advice = advise(model.arrivals, now, wall_s, climb_s(model, level), ROOM_PRICE)
        match advice:
            case KeepWarm(until=until):
                model.forecast_at = min(until, now + ASK_AGAIN_S)
                if not self._hungry and self._prewarm(model, now):
                    model.warm_until = model.forecast_at = until
            case LetGo(prewarm_at=at) if at is not None:
                model.forecast_at = max(at, now + 1.0)
            case _:
                model.forecast_at = now + ASK_AGAIN_S

    def _stand_by(self, now: float) -> None:
        """Start one model that never ran, where that is in nobody's way."""
        if not self.settings.stand_by or self._hungry or now < self._stand_by_at:
            return
        self._stand_by_at = now + STAND_BY_S
        for model in self.state.models.values():
            fresh = model.footprint is None and not model.replicas and not model.failures
            if fresh and model.unfit is None and self._prewarm(model, now, STAND_BY):
                return

    def _prewarm(self, model: Model, now: float, cause: str = FORECAST) -> bool:
        """Plan a replica into free room; whether there was some."""
        answer = place(self.state, model, now, self.settings.min_dwell_s, may_evict=False)
        if not isinstance(answer, Fit):
            return False
        node = self.state.nodes[answer.node_id]
        if any(node.books.climbing(d) for d in answer.device_ids):
            return False
        estimate = model.stored.estimate
        if cause == STAND_BY and estimate and estimate.weights_bytes > node.host_free():
            return False  # it could not stay asleep there without another's going down
        self._plan(model, answer, cause, now)
        model.warm_until = max(model.warm_until, now + model.spec.hold_s)
        for replica in model.coming():
            if cause == FORECAST:
                self.state.prewarms.begin(replica.replica_id, now, replica.bytes)
        return True

    def _idle_s(self, model: Model, replica: Replica) -> float:
        """How long it may be hot unused: one that only stands by is to sleep at once."""
        unused = replica.cause == STAND_BY and model.active_at is None
        return min(STAND_BY_HOT_S, model.spec.idle_s) if unused else model.spec.idle_s

    def _worth_keeping(self, model: Model, replica: Replica, now: float) -> bool:
        """Whether an idle replica pays to be kept hot beyond its idle timer."""
        if replica.cause == STAND_BY and model.active_at is None:
            model.warm_until = 0.0
            return False
        if now < model.warm_until:
            return True
        if model.arrivals is None or model.spec.forecast == "off" or self._hungry:
            return False
        levels = replica.rungs()
        climb = climb_s(model, min(levels)) if levels else climb_s(model, 0)
        wall_s = now + self.state.wall_offset_s
        advice = advise(model.arrivals, now, wall_s, climb, self._price(replica, now))
        if isinstance(advice, KeepWarm):
            model.warm_until = advice.until
            return True
        return False

    def _price(self, replica: Replica, now: float) -> float:
        """What holding its room costs, a second; free room costs ROOM_PRICE by its share."""
        node = self.state.nodes[replica.node_id]
        if all(node.plannable(d) >= replica.bytes for d in replica.device_ids):
            return self._room_price(replica)
        ways = [way for d in replica.device_ids for way in self._ways_beside(replica, d, now)]
        if not ways:
            return hold_price(replica.bytes, replica.bytes, GUESS_START_S)
        cheapest = min(ways, key=lambda way: way.cost)
        price = hold_price(replica.bytes, cheapest.frees, cheapest.cost)
        return max(price, self._room_price(replica))

    def _room_price(self, replica: Replica) -> float:
        node = self.state.nodes[replica.node_id]
        shares = (replica.bytes / max(1, node.capacity(d)) for d in replica.device_ids)
        return ROOM_PRICE * sum(shares)

    def _ways_beside(self, replica: Replica, device_id: str, now: float) -> Iterator[Descent]:
        """The ways down of the other idle replicas on a device."""
        node = self.state.nodes[replica.node_id]
        for other in node.on_device(device_id):
            model = self.state.models.get(other.model)
            idle = other.stage in (Stage.READY, Stage.ASLEEP) and not busy(self.state, other)
            if other is not replica and model is not None and idle:
                ways = descents(self.state, model, node, other, now)
                yield from (way for way in ways if way.frees > 0)


def _new_calls(last: Router | None, report: DemandReport, part: ModelDemand) -> int:
    """Calls since the router's last report. What a new leader was not there for is not counted."""
    before = last.models.get(part.model) if last is not None else None
    if last is not None and last.boot_id != report.boot_id:
        return part.arrived  # all since the router began anew
    if before is not None and part.arrived:
        return part.arrived - before.arrived
    # Seen for the first time, or by a router that does not count: a quiet model is called.
    was_called = before is not None and (before.waiting or before.in_flight)
    return int(bool(part.waiting or part.in_flight) and not was_called)
