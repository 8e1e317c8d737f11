"""What routers say: who is called, who waits, which replicas are used. Pure.

Rules this file keeps:
- what a router told of when replicas were used stays true when it is gone;
- what an operator unloaded stays down until a call waits for it, whatever the forecast says.
"""

from __future__ import annotations

from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.core.turn import Turn
from scheduler.policy.prewarming import DISMISSED
from scheduler.signals.forecast import Arrivals, StoredArrivals, restore
from scheduler.state import messages as m
from scheduler.state.clocks import RemoteClock
from scheduler.state.cluster import Model, Router

SKETCH_S = 300.0  # how often a model's history is written down
SKETCHES_AT_ONCE = 20
REPORTED_S = 5.0  # of a longer silence no more is counted: the router, or this leader, was away
# A model without room is looked at with each ordinary report, not with more of them.
LOOK_AGAIN_S = 0.9


class RouterReports:
    """Takes routers' reports in, and keeps the history of calls."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def take(self, event: m.DemandSeen, now: float) -> None:
        """Take one router's report in, unless a newer one was."""
        report, state = event.report, self._turn.state
        last = state.routers.get(report.router_id)
        if last is not None and (report.boot_id, report.seq) <= (last.boot_id, last.seq):
            return
        self._count(last, report, now)
        same_run = last is not None and last.boot_id == report.boot_id
        clock = last.clock if last is not None and same_run else RemoteClock()
        made_at = clock.made_at(report.sent_s, now)
        models = self._take_models(last, report, made_at, now)
        self._turn.unrouted = True
        state.new_event()
        state.routers[report.router_id] = Router(
            report.router_id, report.boot_id, report.seq, now, report.routes_version,
            models, report.in_flight, clock,
        )  # fmt: skip
        self._take_uses(report, made_at)

    def _take_models(
        self, last: Router | None, report: DemandReport, made_at: float, now: float
    ) -> dict[str, ModelDemand]:
        """The demand of each model, as told; those whose demand changed are looked at again."""
        known, dirty = self._turn.state.models, self._turn.dirty
        old = last.models if last else {}
        models = {part.model: part for part in report.models}
        for name, part in models.items():
            model = known.get(name)
            if model is None:
                continue
            if part.idle_for_s is not None:
                model.active_at = max(model.active_at or 0.0, made_at - part.idle_for_s)
            before = old.get(name)
            known_s = before.first_token_s if before else None
            if last is not None and part.first_token_s not in (None, known_s):
                model.first_token_s, model.first_token_at = part.first_token_s, now
            waits = part.waiting and not self._just_looked_at(model, now)
            if waits or before is None or _differs(before, part):
                dirty.add(name)
        dirty.update(name for name in old.keys() - models.keys() if name in known)
        self._turn.freed = self._turn.freed or any(_busy(part) for part in old.values())
        return models

    def _just_looked_at(self, model: Model, now: float) -> bool:
        """Whether it found no room a moment ago: what frees some has it looked at again."""
        return model.name in self._turn.hungry and now - model.looked_at < LOOK_AGAIN_S

    def _take_uses(self, report: DemandReport, made_at: float) -> None:
        """When each replica was used last, by this router's word."""
        replicas = self._turn.state.replicas
        # A router that does not say how long a replica is idle says at least what is in flight.
        idle_s = dict.fromkeys((r for r, n in report.in_flight.items() if n), 0.0) | report.idle_s
        for replica_id, seconds in idle_s.items():
            replica = replicas.get(replica_id)
            if replica is not None:
                replica.routed_at[report.router_id] = made_at - seconds
                replica.judge_use()

    def router_gone(self, router: Router) -> None:
        """Forget a router; what it told of when replicas were used stays true."""
        del self._turn.state.routers[router.router_id]
        self._turn.state.new_event()
        for replica in self._turn.state.replicas.values():
            at = replica.routed_at.pop(router.router_id, None)
            if at is not None:
                replica.routed_at[""] = max(at, replica.routed_at.get("", at))

    def _count(self, last: Router | None, report: DemandReport, now: float) -> None:
        """Count the calls that a router reports."""
        for part in report.models:
            model = self._turn.state.models.get(part.model)
            if model is not None:
                count = _new_calls(last, report, part)
                if last is not None:
                    model.saw(max(0, count), part.in_flight, min(REPORTED_S, now - last.seen_at))
                if count > 0:
                    self._called(model, count, part.waiting > 0, now)

    def _called(self, model: Model, count: int, waits: bool, now: float) -> None:
        for replica in model.replicas.values():
            self._turn.state.prewarms.called(replica.replica_id)
        model.warm_until = 0.0
        # Calls that a dismissed model's last replica answered are reported after the unload.
        if model.forecast_at != DISMISSED or waits or model.coming():
            model.forecast_at = 0.0
        if model.spec.forecast == "off":
            model.arrivals = None
            return
        if model.arrivals is None:
            model.arrivals = Arrivals(now)
        model.arrivals.observe(now, now + self._turn.state.wall_offset_s, count)
        model.odds = (-1e9, 0.0)

    def recall(self, sketches: dict[str, StoredArrivals], now: float) -> None:
        """Take over the histories that earlier leaders stored."""
        for name, sketch in sketches.items():
            model = self._turn.state.models.get(name)
            if model is not None and model.spec.forecast != "off":
                model.arrivals = restore(sketch, now, now + self._turn.state.wall_offset_s)
                model.sketched_at = now

    def write_down(self, now: float) -> None:
        """Hand out a few histories at a time, to be stored."""
        told = 0
        for model in self._turn.state.models.values():
            arrivals = model.arrivals
            if arrivals is None or arrivals.last_at is None:
                continue
            if arrivals.last_at > model.sketched_at and now - model.sketched_at >= SKETCH_S:
                model.sketched_at = now
                sketch = arrivals.sketch(now, now + self._turn.state.wall_offset_s)
                self._turn.out.append(m.Sketched(model=model.name, sketch=sketch))
                told += 1
                if told == SKETCHES_AT_ONCE:
                    return

    def dismiss(self, model: Model) -> None:
        """Take down that an operator unloaded it: the forecast has no say until a call waits."""
        model.warm_until, model.forecast_at = 0.0, DISMISSED


def _new_calls(last: Router | None, report: DemandReport, part: ModelDemand) -> int:
    """Calls since the router's last report. What a new leader was not there for is not counted."""
    before = last.models.get(part.model) if last is not None else None
    if last is not None and last.boot_id != report.boot_id:
        return part.arrived  # all since the router started again
    if before is not None and part.arrived:
        return part.arrived - before.arrived
    # Seen for the first time, or by a router that does not count: a quiet model is called.
    was_called = before is not None and (before.waiting or before.in_flight)
    return int(bool(part.waiting or part.in_flight) and not was_called)


def _differs(old: ModelDemand, new: ModelDemand) -> bool:
    return old.in_flight != new.in_flight or old.waiting != new.waiting


def _busy(part: ModelDemand) -> bool:
    return bool(part.waiting or part.in_flight)
