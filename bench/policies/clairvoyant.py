"""Policies that know every arrival beforehand. Pure.

- What goes down is what is called again latest (Belady), to the highest rung the host has room for;
  a sleeper gives its host memory to one that is called before it.
- `Clairvoyant` also warms each model so that it stands when its call comes: a climb, the starts
  before it on its devices and a stop ahead; into free room or the room of models that are called
  later. `Belady` warms nothing: it bounds policies that cannot see the future, all of which start a
  model only once it was called.
- Nothing goes down before somebody needs its room.

What they bound, and what not: Belady's rule is optimal for pages of one size and one cost, all
misses alike. Here sizes, costs, devices and rungs differ and the general problem is NP-hard, so
this is what one gets from knowing the future with a sensible greedy rule, not a proven optimum: a
policy without that knowledge may in principle beat it. A proven lower bound of TTFT is that of
models that are always hot ("dedicated", on many more devices).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from bench.policies.sleeping import Sleeping, sleepers
from scheduler.policy.choices import Plan
from scheduler.policy.ladder import climb_s
from scheduler.policy.placement import Fit
from scheduler.policy.warm_value import LEAD
from scheduler.sim.traces import Arrival
from scheduler.state.cluster import ClusterState, Model, Node, Replica

SLACK_S = 2.0  # how much sooner than needed: climbs vary, ticks come each half second
AHEAD_S = 15.0  # when it begins to look for room, beside LEAD starts
LATE_S = 60.0  # a sleeper that is called sooner keeps its host memory
KEPT_S = 30.0  # a model that was warmed for a call is kept for so long after it


class Belady(Sleeping):
    """Evicts by the future and warms nothing. `arrivals` in order of time; `lead_s`: as the
    scenario's."""

    def __init__(self, arrivals: Iterable[Arrival], lead_s: float) -> None:
        super().__init__()
        self._calls: dict[str, list[float]] = {}
        for arrival in arrivals:
            self._calls.setdefault(arrival.model, []).append(arrival.at_s + lead_s)
        self._next: dict[str, float] = {}
        self._for = -float("inf")  # the call that room is looked for now
        self._now = 0.0  # of the present question

    def next_call(self, name: str, now: float) -> float:
        """When `name` is called next; infinity: never."""
        known = self._next.get(name)
        if known is None or known < now:
            calls = self._calls.get(name, [])
            index = bisect_left(calls, now)
            known = self._next[name] = calls[index] if index < len(calls) else float("inf")
        return known

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """For a call that is there already."""
        return self._choose_for(state, model, now, now)

    def _choose_for(self, state: ClusterState, model: Model, now: float, at: float) -> Fit | None:
        self._for, self._now = at, now
        return super().choose(state, model, now)

    def _order(self, state: ClusterState, replica: Replica) -> float:
        return -min(self.next_call(replica.model, self._now), 1e9)

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        later = self.next_call(replica.model, now) > self._for
        return later and super()._may_go(replica, model, now)

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """The sleepers that are called latest, and not within a minute, until the host has room for
        the next one that goes to sleep."""
        self._now = now
        late = [r for r in sleepers(node) if self.next_call(r.model, now) >= now + LATE_S]
        return self._enough(node, sorted(late, key=lambda r: self._order(state, r)))


class Clairvoyant(Belady):
    """Evicts by the future and warms what is called soon."""

    def look_ahead(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:
        """Warm what is called soon."""
        due = []
        for model in state.models.values():
            at = self.next_call(model.name, now)
            ahead_s = LEAD * climb_s(model, 0, "cached") + AHEAD_S
            if at - now < ahead_s and not model.coming() and model.blocked_until <= now:
                due.append((at, model.name))
        for at, name in sorted(due):
            model = state.models[name]
            fit = self._choose_for(state, model, now, at)
            if fit is not None and now + fit.wait_s + SLACK_S >= at:
                model.warm_until = at + KEPT_S
                plan(model, fit, "known: it will be called")
