"""A policy that knows every arrival beforehand. Pure.

- What goes down is what is called again latest (Belady), to the highest rung the host has room for;
  a sleeper gives its host memory to one that is called before it.
- Each model is warmed so that it stands when its call comes: a climb, the starts before it on its
  devices and a stop ahead; into free room or the room of models that are called later.
- Nothing goes down before somebody needs its room.

What it bounds, and what not: Belady's rule is optimal for pages of one size and one cost, all
misses alike. Here sizes, costs, devices and rungs differ and the general problem is NP-hard, so
this is what one gets from knowing the future with a sensible greedy rule, not a proven optimum: a
policy without that knowledge may in principle beat it. A proven lower bound of TTFT is that of
models that are always hot ("dedicated", on many more devices).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import takewhile

from bench.policies.base import Baseline
from scheduler.policy.choices import Plan
from scheduler.policy.ladder import EVICT_S, Descent, climb_s, expected_residue
from scheduler.policy.placement import Fit
from scheduler.policy.warm_value import LEAD
from scheduler.sim.traces import Arrival
from scheduler.state.cluster import ClusterState, Model, Node, Replica, Stage

SLACK_S = 2.0  # how much sooner than needed: climbs vary, ticks come each half second
AHEAD_S = 15.0  # when it begins to look for room, beside LEAD starts
KEPT_S = 30.0  # a model that was warmed for a call is kept for so long after it


class Clairvoyant(Baseline):
    """`arrivals` in order of time; `lead_s`: as the scenario's."""

    idle_timers = False

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

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """For a call that is there already."""
        return self._choose_for(state, model, now, now)

    def _choose_for(self, state: ClusterState, model: Model, now: float, at: float) -> Fit | None:
        self._for, self._now = at, now
        fits = []
        for riser in model.asleep():
            node = state.nodes[riser.node_id]
            fit = self._rise(state, node, model, riser, now)
            if fit is not None:
                fits.append(fit)
        for node in self._able(state, model):
            rung = node.start_rung(model.spec.source)
            load_s = climb_s(model, 0, rung)
            devices = self._free(node, model)
            if devices:
                wait_s = load_s + self._turn_s(state, node, devices, now)
                fits.append((wait_s, 0.0, Fit(node.node_id, devices, rung=rung, wait_s=wait_s)))
            cleared = self._cleared(state, node, model, now, self._latest)
            if cleared is not None and cleared[1]:
                devices, ways, last = cleared
                wait_s = load_s + self._turn_s(state, node, devices, now) + EVICT_S
                fits.append(
                    (wait_s, last, Fit(node.node_id, devices, ways, rung=rung, wait_s=wait_s))
                )
        best = min(fits, key=lambda f: (round(f[0], 1), f[1]), default=None)
        return best[2] if best else None

    def _rise(
        self, state: ClusterState, node: Node, model: Model, riser: Replica, now: float
    ) -> tuple[float, float, Fit] | None:
        if not node.schedulable or not all(map(node.usable, riser.device_ids)):
            return None
        gone: dict[str, Replica] = {}
        for device_id in riser.device_ids:
            need = riser.bytes - riser.residue
            victims = self._victims(state, node, device_id, need, model, now, self._latest)
            if victims is None:
                return None
            gone.update((r.replica_id, r) for r in victims)
        ways = tuple(self._way_down(state, node, r, now) for r in gone.values())
        wait_s = climb_s(model, riser.sleep_level) + self._turn_s(
            state, node, riser.device_ids, now
        )
        wait_s += EVICT_S if ways else 0.0
        last = max(map(self._latest, gone.values()), default=0.0)
        return wait_s, last, Fit(node.node_id, riser.device_ids, ways, riser, wait_s=wait_s)

    def _latest(self, replica: Replica) -> float:
        return -min(self.next_call(replica.model, self._now), 1e9)

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        return self.next_call(replica.model, now) > self._for and (
            replica.stage is Stage.READY or replica.residue > 0
        )

    def _way_down(self, state: ClusterState, node: Node, replica: Replica, now: float) -> Descent:
        """Asleep where the host has room, or sleepers that are called later make it; else stops."""
        if replica.stage is Stage.READY:
            owner = state.models[replica.model]
            residue = expected_residue(owner, node, replica)
            for level in replica.rungs():
                host_bytes = owner.weights_bytes(replica) if level == 1 else 0
                if residue < replica.bytes and host_bytes <= node.host_free():
                    return Descent(replica, level, replica.bytes - residue, host_bytes, 0.0)
        return Descent(replica, 0, replica.committed, 0, 0.0)

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """The sleepers that are called latest, until the host has room for one more of the same
        size: the next one that goes down may sleep."""
        self._now = now
        budget = node.heartbeat.host_budget_bytes if node.heartbeat else 0
        if node.host_free() >= min(budget // 8, 64 * 2**30):
            return ()
        sleepers = [r for r in node.replicas.values() if r.stage is Stage.ASLEEP]
        late = takewhile(
            lambda r: self.next_call(r.model, now) >= now + 60.0,
            sorted(sleepers, key=self._latest),
        )
        return tuple(late)
