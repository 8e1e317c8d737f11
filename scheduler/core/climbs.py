"""Ways up that end: what they taught, and their post-mortems. Pure.

Rules this file keeps:
- every climb leaves its post-mortem, a failed one too;
- only the largest memory figures are kept, so that a steady replica writes nothing.
"""

from __future__ import annotations

from runtime.contract.footprint_ledger import Footprint
from runtime.wire.agent_messages import ReplicaReport
from scheduler.core.turn import Turn
from scheduler.policy.ladder import REPOINT, step_name
from scheduler.state import messages as m
from scheduler.state.cluster import Model, Replica
from scheduler.state.learning import finished, footprint_key, remember

PHASES_S = 2.5  # how long after a replica serves its agent may take to tell its phases


class Climbs:
    """Learns from starts and wakes."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def finish(
        self, replica: Replica, report: ReplicaReport, now: float, at_once: bool = False
    ) -> None:
        """Learn from a climb that is over: once its agent told its phases, a moment later."""
        climb = replica.climb
        if climb is None or climb.ready_at is None:
            return
        if not report.phases and now - climb.ready_at < PHASES_S and not at_once:
            return
        model = self._turn.state.models.get(replica.model)
        if model is not None:
            self._learn_times(model, replica, report, climb.woken_from)
        self.end(replica, "ready", climb.ready_at)

    def end(self, replica: Replica, outcome: str, now: float) -> None:
        """Leave the post-mortem of a way up that is over."""
        if replica.climb is None:
            return
        self._turn.state.cold_start_count += 1
        model = self._turn.state.models.get(replica.model)
        ready_at, first_token_s = replica.climb.ready_at, None
        if model is not None and ready_at is not None and model.first_token_at >= ready_at:
            first_token_s = model.first_token_s  # not that of an earlier climb
        record = finished(
            self._turn.state.cold_start_count, replica, replica.climb, outcome, now, first_token_s
        )
        replica.climb = None
        self._turn.state.cold_starts.append(record)
        self._turn.out.append(record)

    def learn_memory(self, replica: Replica, report: ReplicaReport) -> None:
        """Keep the largest figures only, so that a steady replica writes nothing."""
        model = self._turn.state.models.get(replica.model)
        key = footprint_key(self._turn.state, replica)
        if model is None or key is None or key not in model.footprints:
            return
        known = model.footprints[key]
        seen = known.with_memory(report)
        if seen != known:
            self._learned(model, seen)

    def _learn_times(
        self, model: Model, replica: Replica, report: ReplicaReport, woken_from: int
    ) -> None:
        """Of climbs that this leader began: an adopted replica's was counted by an earlier one."""
        key = footprint_key(self._turn.state, replica)
        # One that failed as a shell was started plainly.
        shell = replica.climb is not None and replica.climb.rung == "shell" and report.wake_s
        seconds = report.wake_s if woken_from or shell else report.start_s
        if key is None or seconds is None:
            return
        known = model.footprints.get(key) or Footprint(key=key)
        step = REPOINT if shell else step_name(woken_from, report.started_from)
        self._learned(model, known.with_times(step, seconds, report.phases))
        weights = model.weights_bytes(replica) // len(replica.device_ids)
        beside = replica.climb is not None and replica.climb.beside
        self._turn.state.climb_times.learn(key.device_kind, step, weights, seconds, beside)

    def _learned(self, model: Model, footprint: Footprint) -> None:
        remember(model, footprint)
        self._turn.out.append(m.Learned(footprint=footprint))
