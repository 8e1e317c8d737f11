"""Warms models ahead of expected calls, and keeps them warm while that pays. Pure.

Rules this file keeps:
- a prewarm takes free room only, on devices where nothing else starts, and while nobody waits for
  room anywhere: it never harms a model that is called;
- a model whose spec says `forecast: off`, or without history, is left to its idle timer;
- with `stand_by`, a model that was never started is, once, when nothing else is to be done: its
  footprint is measured, its files are fetched, and its first caller finds it asleep or staged;
- each prewarm is counted: a hit if a call came before it went down again, else wasted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scheduler.policy.choices import Plan
from scheduler.policy.eviction import busy
from scheduler.policy.ladder import Descent, climb_s, descents
from scheduler.policy.placement import Fit, place
from scheduler.policy.warm_value import KeepWarm, LetGo, advise, hold_price
from scheduler.state.cluster import ClusterState, Model, Replica, Stage

ROOM_PRICE = 0.005  # holding a whole device for 600 s must save 3 s of waiting: power, and others
DISMISSED = math.inf  # `forecast_at` of a model that an operator unloaded
ASK_AGAIN_S = 60.0  # without an opinion, or without room
FORECAST, STAND_BY = "forecast: a call is expected", "stand-by"  # causes
STAND_BY_S = 5.0  # between two models that are started to stand by
# Of the hosts' budgets: with more weights, standing by costs those that are called.
ALL_ASLEEP = 1.3
STAND_BY_HOT_S = 5.0  # idle, of one that only stands by


class Prewarming:
    """From the history of calls to plans."""

    def __init__(self, min_dwell_s: float, stand_by: bool) -> None:
        self._min_dwell_s = min_dwell_s
        self._stand_by = stand_by
        self._stand_by_at = 0.0

    def forecast(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:
        """Look at each model whose time has come."""
        for model in state.models.values():
            if model.arrivals is None or model.forecast_at > now:
                continue
            if model.spec.forecast == "off" or model.blocked_until > now or model.coming():
                model.forecast_at = now + ASK_AGAIN_S
                continue
            self._consider(state, model, now, hungry, plan)

    def _consider(
        self, state: ClusterState, model: Model, now: float, hungry: bool, plan: Plan
    ) -> None:
        assert model.arrivals is not None
        level = max((r.sleep_level for r in model.asleep()), default=0)
        wall_s = now + state.wall_offset_s
        advice = advise(model.arrivals, now, wall_s, climb_s(model, level), ROOM_PRICE)
        match advice:
            case KeepWarm(until=until):
                model.forecast_at = min(until, now + ASK_AGAIN_S)
                if not hungry and self._prewarm(state, model, now, plan):
                    model.warm_until = model.forecast_at = until
            case LetGo(prewarm_at=at) if at is not None:
                model.forecast_at = max(at, now + 1.0)
            case _:
                model.forecast_at = now + ASK_AGAIN_S

    def stand_by(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:
        """Start one model that never ran, where that is in nobody's way."""
        if not self._stand_by or hungry or now < self._stand_by_at:
            return
        self._stand_by_at = now + STAND_BY_S
        if not _all_could_sleep(state):
            return
        for model in state.models.values():
            fresh = model.footprint is None and not model.replicas and not model.failures
            if fresh and model.unfit is None and self._prewarm(state, model, now, plan, STAND_BY):
                return

    def _prewarm(
        self, state: ClusterState, model: Model, now: float, plan: Plan, cause: str = FORECAST
    ) -> bool:
        """Plan a replica into free room; whether there was some."""
        answer = place(state, model, now, self._min_dwell_s, may_evict=False)
        if not isinstance(answer, Fit):
            return False
        node = state.nodes[answer.node_id]
        if any(node.books.climbing(d) for d in answer.device_ids):
            return False
        estimate = model.stored.estimate
        if cause == STAND_BY and estimate and estimate.weights_bytes > node.host_free():
            return False  # it could not stay asleep there without another's going down
        plan(model, answer, cause)
        model.warm_until = max(model.warm_until, now + model.spec.hold_s)
        for replica in model.coming():
            if cause == FORECAST:
                state.prewarms.begin(replica.replica_id, now, replica.bytes)
        return True

    def worth_keeping(
        self, state: ClusterState, model: Model, replica: Replica, now: float, hungry: bool
    ) -> bool:
        """Whether an idle replica pays to be kept hot beyond its idle timer."""
        if replica.cause == STAND_BY and model.active_at is None:
            model.warm_until = 0.0
            return False
        if now < model.warm_until:
            return True
        if model.arrivals is None or model.spec.forecast == "off" or hungry:
            return False
        levels = replica.rungs()
        climb = climb_s(model, min(levels)) if levels else climb_s(model, 0)
        wall_s = now + state.wall_offset_s
        advice = advise(model.arrivals, now, wall_s, climb, _price(state, replica, now))
        if isinstance(advice, KeepWarm):
            model.warm_until = advice.until
            return True
        return False


def _all_could_sleep(state: ClusterState) -> bool:
    """Whether nearly all declared models could sleep with their weights in host memory."""
    estimates = (model.stored.estimate for model in state.models.values())
    weights = sum(estimate.weights_bytes for estimate in estimates if estimate)
    beats = (node.heartbeat for node in state.nodes.values() if node.live)
    return weights <= ALL_ASLEEP * sum(beat.host_budget_bytes for beat in beats if beat)


def hot_s(model: Model, replica: Replica) -> float:
    """How long a replica may be hot unused: one that only stands by is to sleep at once."""
    unused = replica.cause == STAND_BY and model.active_at is None
    return min(STAND_BY_HOT_S, model.spec.idle_s) if unused else model.spec.idle_s


def _price(state: ClusterState, replica: Replica, now: float) -> float:
    """What holding its room costs, a second; free room costs ROOM_PRICE by its share."""
    node = state.nodes[replica.node_id]
    if all(node.plannable(d) >= replica.bytes for d in replica.device_ids):
        return _room_price(state, replica)
    ways = [way for d in replica.device_ids for way in _ways_beside(state, replica, d, now)]
    if not ways:
        return hold_price(replica.bytes, replica.bytes, climb_s(state.models[replica.model], 0))
    cheapest = min(ways, key=lambda way: way.cost)
    price = hold_price(replica.bytes, cheapest.frees, cheapest.cost)
    return max(price, _room_price(state, replica))


def _room_price(state: ClusterState, replica: Replica) -> float:
    node = state.nodes[replica.node_id]
    shares = (replica.bytes / max(1, node.capacity(d)) for d in replica.device_ids)
    return ROOM_PRICE * sum(shares)


def _ways_beside(
    state: ClusterState, replica: Replica, device_id: str, now: float
) -> Iterator[Descent]:
    """The ways down of the other idle replicas on a device."""
    node = state.nodes[replica.node_id]
    for other in node.on_device(device_id):
        model = state.models.get(other.model)
        idle = other.stage in (Stage.READY, Stage.ASLEEP) and not busy(state, other)
        if other is not replica and model is not None and idle:
            ways = descents(state, model, node, other, now)
            yield from (way for way in ways if way.frees > 0)
