"""What production chooses by: placement, scaling and prewarming together. Pure policy.

Rules this file keeps: one more replica beside others may cost other models little waiting, and
never takes the room of one that is in use. Sleepers stop for a model that is called only once its
callers have waited, all together, for as long as stopping them is expected to cost others (renting
skis before buying: what is paid is at most twice what hindsight would pay), and never longer than
half of what its climb there is expected to take. So the guarantee, for n callers whose climb takes
c and whose room costs sleepers h seconds: they wait for the sleepers' sake at most min(h / n,
c / 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.contract.config import SchedulerConfig
from scheduler.policy import autoscale
from scheduler.policy.choices import Plan, Scale
from scheduler.policy.placement import Answer, Fit, NotNow, place
from scheduler.policy.prewarming import Prewarming
from scheduler.signals.replica_target import Desired
from scheduler.state.cluster import ClusterState, Demand, Model, Node, Replica, Stage

MIN_DWELL_S = SchedulerConfig().min_dwell_s  # ready for less: it does not go down again
HARM_S = 3.0  # of expected waiting: what stopping sleepers may cost others at once
PATIENCE = 0.5  # of its own climb: so long at most a caller waits for the sleepers' sake
LOOK_AGAIN_S = 3.0  # at the most, at what sleepers would cost
EXTRA_S = 1.0  # expected waiting of others that one more replica beside others is worth


class Production:
    """The policy of `stoker scheduler`; see `Choices`."""

    idle_timers = True

    def __init__(
        self, *, min_dwell_s: float = MIN_DWELL_S, stand_by: bool = False, staging: bool = True
    ) -> None:
        self.staging = staging
        self._min_dwell_s = min_dwell_s
        self._prewarming = Prewarming(min_dwell_s, stand_by)

    def place(
        self, state: ClusterState, model: Model, now: float, evict: bool, extra: bool
    ) -> Answer:
        """The cheapest place, in expected seconds of waiting."""
        patient = now < model.patient_until
        answer = place(state, model, now, self._min_dwell_s, evict and not patient)
        if patient and isinstance(answer, NotNow):
            return NotNow(model.waiting_for or "waiting for room")
        if extra and isinstance(answer, Fit):
            cost_s = sum(way.cost for way in answer.victims)
            cost_s += answer.shell.cost if answer.shell is not None else 0.0
            if cost_s > EXTRA_S or any(way.busy for way in answer.victims):
                return NotNow(f"another replica would cost others {cost_s:.0f} s of waiting")
        if isinstance(answer, Fit) and (harm_s := _harm_s(answer)) > HARM_S:
            demand = state.demand(model.name)
            missing_s = harm_s - demand.oldest_wait_s * demand.waiting
            missing_s = min(
                missing_s, (PATIENCE * answer.wait_s - demand.oldest_wait_s) * demand.waiting
            )
            # What an operator asked for, or a floor, waits for nobody.
            if demand.waiting and missing_s > 0:
                model.patient_until = now + min(LOOK_AGAIN_S, missing_s / demand.waiting)
                return NotNow(f"stopping sleepers would cost others {harm_s:.0f} s of waiting")
        return answer

    def scale(self, state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
        """By demand, and by what was asked for."""
        return scale(state, model, demand, now)

    def worth_keeping(
        self, state: ClusterState, model: Model, replica: Replica, now: float, hungry: bool
    ) -> bool:
        """Where a call is expected soon enough."""
        return self._prewarming.worth_keeping(state, model, replica, now, hungry)

    def look_ahead(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:
        """Warm what a forecast expects to be called, then what never ran."""
        self._prewarming.forecast(state, now, hungry, plan)
        self._prewarming.stand_by(state, now, hungry, plan)

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """Nothing: sleepers give way only to what saves more."""
        return ()


def _harm_s(fit: Fit) -> float:
    """Expected waiting of the sleepers that would have to start again instead of waking."""
    ways = fit.victims if fit.shell is None else (*fit.victims, fit.shell)
    return sum(way.cost for way in ways if way.level == 0 and way.replica.stage is Stage.ASLEEP)


def scale(state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
    """By demand, and by what was asked for; see scheduler/policy/autoscale.py."""
    desired = autoscale.decide(state, model, demand, now)
    wanted = desired.replicas
    # The last one goes by its own idleness, but more than the most is too many at any time.
    keep = None if demand.waiting else wanted or model.spec.max_replicas
    return Scale(wanted, desired.reason, keep, _look_again_s(model, desired))


def _look_again_s(model: Model, desired: Desired) -> float:
    """Until windows and policies, or metrics that no event tells of, may say something else."""
    coming = len(model.coming())
    if not coming or (model.spec.max_replicas == 1 and not model.spec.autoscale.metrics):
        return math.inf
    if model.spec.autoscale.metrics or (desired.limited_by or "").startswith(("up", "panic")):
        return 1.0
    return 5.0 if coming > 1 else math.inf  # on the way down nobody waits
