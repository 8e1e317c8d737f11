"""How one replica moves: the hands of the scheduler's core. Pure.

Rules this file keeps:
- what an agent says is taken over, unless the scheduler has begun to move the replica elsewhere;
- unroute, wait for the routers (or a deadline), then stop or put to sleep; a command whose effect
  is not seen is repeated;
- every move leaves a `Decided` with its reason and cause, every climb its post-mortem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.contract.footprint_ledger import Footprint
from runtime.engine.exits import FINAL_KINDS
from runtime.wire.agent_messages import (
    ReplicaReport,
    SleepReplica,
    StartReplica,
    StopReplica,
    WakeReplica,
)
from scheduler.policy.ladder import Descent, step_name, yielding
from scheduler.policy.learning import finished, footprint_key, remember
from scheduler.state import messages as m
from scheduler.state.cluster import LEAVING, ClusterState, Hold, Model, Node, Replica, Stage

UNROUTE_TIMEOUT_S = 3.0  # how long routers may take to confirm a table without a replica
EVICT_GRACE_S = 3600.0  # nobody's request is ended to make room, or because a model seemed idle
RESEND_S = 3.0  # a command whose effect is not seen is repeated after this
PHASES_S = 2.5  # how long after a replica serves its agent may take to tell its phases
FIRST_RETRY_S, MAX_RETRY_S = 10.0, 300.0  # between attempts to start a model that failed


@dataclass(frozen=True, slots=True)
class Settings:
    """The core's own knobs; see runtime.contract.config.SchedulerConfig."""

    node_timeout_s: float = 10.0
    recovery_grace_s: float = 10.0
    drain_grace_s: float = 60.0
    min_dwell_s: float = 5.0
    stand_by: bool = False  # start each new model once, into free room, and put it to sleep


class Moves:
    """What every move needs: the state, what is to be done, and whom to look at again."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.state = ClusterState()
        self._out: list[m.Command] = []
        self._now = 0.0  # of the event being handled
        self._dirty: set[str] = set()  # models to look at again and whose route may have changed

    # --------------------------------------------------------------------------- what agents say

    def _follow_phase(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        """Take over what the agent says, unless the scheduler has begun to move the replica."""
        match replica.stage:
            case Stage.STOPPING:
                if report.phase not in ("draining", "stopping") and now >= replica.retry_at:
                    self._send_stop(replica, now)
            case Stage.UNROUTING:
                if report.phase != "ready":
                    self._send_stop(replica, now)  # it serves nobody: no ack to wait for
            case Stage.SLEEPING:
                self._follow_sleep(replica, report, now)
            case Stage.ASLEEP | Stage.RISING if report.phase == "asleep":
                replica.keep_residue(report.residue_bytes)
            case Stage.WAKING if report.phase in ("asleep", "waking"):
                if report.phase == "asleep" and now >= replica.retry_at:
                    self._send_wake(replica, now)
            case _:
                self._take_phase(replica, report, now)

    def _take_phase(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        match report.phase:
            case "starting":
                replica.move(Stage.STARTING, now)
            case "ready":
                self._ready(replica, report, now)
            case "backoff":
                replica.move(Stage.BACKOFF, now)
            case "draining" if report.sleep_level:
                self._asleep(replica, report, now)  # on its way to sleep
            case "draining" | "stopping":
                replica.move(Stage.STOPPING, now)  # its agent is going down
                replica.retry_at = now + RESEND_S
            case "sleeping" | "asleep":
                self._asleep(replica, report, now)
            case "waking":
                replica.move(Stage.WAKING, now)
                replica.retry_at = now + RESEND_S
            case "failed":
                self._failed(replica, report.reason or "its start failed", now)

    def _follow_sleep(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        if report.phase == "asleep":
            self._asleep(replica, report, now)
        elif report.phase == "ready":
            if self._shown(replica):  # it could not sleep; its agent says why
                self._decide("stay", replica, report.reason or "it could not sleep", now)
                self._back_to_ready(replica, now)
            elif now >= replica.retry_at:
                self._send_sleep(replica, now)
        elif report.phase not in ("draining", "sleeping"):
            self._send_stop(replica, now)  # it died of it

    def _asleep(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        replica.move(Stage.ASLEEP if report.phase == "asleep" else Stage.SLEEPING, now)
        level = report.sleep_level or replica.sleep_level or 1
        replica.retry_at = now + RESEND_S
        model = self.state.models.get(replica.model)
        host_bytes = replica.host_booked
        if model is not None and level == 1 and not host_bytes:
            host_bytes = model.weights_bytes(replica)
        if (level, host_bytes) != (replica.sleep_level, replica.host_booked):
            replica.book_sleep(level, host_bytes, replica.residue)
        if report.phase == "asleep":
            replica.keep_residue(report.residue_bytes)

    def _back_to_ready(self, replica: Replica, now: float) -> None:
        replica.move(Stage.READY, now)
        replica.ready_at = now  # its dwell time begins anew: it is not asked again at once
        replica.book_sleep(0, 0, 0)

    def _shown(self, replica: Replica) -> bool:
        """Whether the node's last heartbeat was made after the last command arrived there."""
        heartbeat = self.state.nodes[replica.node_id].heartbeat
        return (
            heartbeat is not None
            and replica.confirmed is not None
            and (heartbeat.boot_id, heartbeat.seq) >= replica.confirmed
        )

    def _ready(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        if replica.stage is Stage.READY:
            return
        woken_from = replica.sleep_level
        replica.move(Stage.READY, now)
        replica.book_sleep(0, 0, 0)
        replica.ready_at = now - report.phase_age_s
        replica.used_at = max(replica.used_at, replica.ready_at)
        model = self.state.models.get(replica.model)
        if model is not None:
            model.forgive()
        if replica.climb is not None:
            replica.climb.ready_at, replica.climb.woken_from = now, woken_from
            self._finish_climb(replica, report, now)

    def _finish_climb(
        self, replica: Replica, report: ReplicaReport, now: float, at_once: bool = False
    ) -> None:
        """Learn from a climb that is over: once its agent told its phases, a moment later."""
        climb = replica.climb
        if climb is None or climb.ready_at is None:
            return
        if not report.phases and now - climb.ready_at < PHASES_S and not at_once:
            return
        model = self.state.models.get(replica.model)
        if model is not None:
            self._learn_times(model, replica, report, climb.woken_from)
        self._climbed(replica, "ready", climb.ready_at)

    def _learn_times(
        self, model: Model, replica: Replica, report: ReplicaReport, woken_from: int
    ) -> None:
        """Of climbs that this leader began: an adopted replica's was counted by an earlier one."""
        key = footprint_key(self.state, replica)
        seconds = report.wake_s if woken_from else report.start_s
        if key is None or seconds is None:
            return
        known = model.footprints.get(key) or Footprint(key=key)
        step = step_name(woken_from, report.started_from)
        self._learned(model, known.with_times(step, seconds, report.phases))

    def _learn_memory(self, replica: Replica, report: ReplicaReport) -> None:
        """Largest figures only, so that a steady replica writes nothing."""
        model, key = self.state.models.get(replica.model), footprint_key(self.state, replica)
        if model is None or key is None or key not in model.footprints:
            return
        known = model.footprints[key]
        seen = known.with_memory(report)
        if seen != known:
            self._learned(model, seen)

    def _learned(self, model: Model, footprint: Footprint) -> None:
        remember(model, footprint)
        self._out.append(m.Learned(footprint=footprint))

    def _climbed(self, replica: Replica, outcome: str, now: float) -> None:
        """Its way up is over: leave the post-mortem."""
        if replica.climb is None:
            return
        self.state.cold_start_count += 1
        model = self.state.models.get(replica.model)
        ready_at, first_token_s = replica.climb.ready_at, None
        if model is not None and ready_at is not None and model.first_token_at >= ready_at:
            first_token_s = model.first_token_s  # not that of an earlier climb
        record = finished(
            self.state.cold_start_count, replica, replica.climb, outcome, now, first_token_s
        )
        replica.climb = None
        self.state.cold_starts.append(record)
        self._out.append(record)

    def _failed(self, replica: Replica, why: str, now: float) -> None:
        """Its agent gave up. The model rests for a while; other replicas go on serving."""
        self._decide("give_up", replica, why, now)
        self._climbed(replica, "failed", now)
        model = self.state.models.get(replica.model)
        if model is not None and replica.stage not in (Stage.ASLEEP, Stage.RISING):
            model.failures += 1
            kind = replica.report.exit_kind if replica.report else None
            final = model.problem_final = kind in FINAL_KINDS
            pause_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** (model.failures - 1))
            pause_s = MAX_RETRY_S if final else pause_s
            model.blocked_until, model.problem = now + pause_s, why
            model.spares_s = math.inf if final else pause_s
        self._send_stop(replica, now, reason="clearing the failed start")

    # ------------------------------------------------------------------------ what agents are told

    def _send_start(self, replica: Replica, now: float) -> None:
        assert replica.spec is not None  # only our own plans are started
        if replica.climb is not None and replica.climb.sent_at is None:
            replica.climb.sent_at = now
        replica.move(Stage.SENT, now)
        replica.retry_at, replica.confirmed = now + RESEND_S, None
        command = StartReplica(
            replica_id=replica.replica_id, epoch=self.state.term, spec=replica.spec,
            device_ids=replica.device_ids, device_bytes=replica.bytes,
            reason=replica.reason, cause=replica.cause,
        )  # fmt: skip
        self._out.append(m.Send(node_id=replica.node_id, command=command))
        self._dirty.add(replica.model)

    def _descend(self, way: Descent, reason: str, cause: str, now: float, action: str) -> None:
        """Take a replica down as far as `way` says; requests it has may end first."""
        replica = way.replica
        node = self.state.nodes[replica.node_id]
        if way.level and replica.stage is Stage.READY:
            worth = float("inf")  # that it pays was decided when `way` was chosen
            gone = yielding(self.state, node, way.host_bytes, worth, now)
            if gone is not None:
                for hold in gone:
                    self._let_go(node, hold, f"host memory for {replica.model} asleep", now)
                replica.book_sleep(way.level, way.host_bytes, replica.bytes - way.frees)
        to_sleep = bool(replica.sleep_level) and replica.stage is Stage.READY
        self._leave(replica, reason, cause, now, action, to_sleep=to_sleep, grace_s=EVICT_GRACE_S)
        if not to_sleep:
            self._keep_staged(replica, now)

    def _let_go(self, node: Node, hold: Hold, reason: str, now: float) -> None:
        """Hold a model's weights in a node's page cache no longer."""
        raise NotImplementedError

    def _keep_staged(self, replica: Replica, now: float) -> None:
        """A replica stops: its model's weights may stay in the page cache for a while."""
        raise NotImplementedError

    def _leave(
        self, replica: Replica, reason: str, cause: str, now: float, action: str = "stop",
        to_sleep: bool = False, grace_s: float | None = None,
    ) -> None:  # fmt: skip
        """Begin to stop a replica, whatever it is doing, or to put a ready one to sleep.

        Repeating it changes nothing; stopping one that is on its way to sleep does.
        """
        if replica.stage in LEAVING and (to_sleep or not replica.sleep_level):
            return
        if replica.stage is not Stage.READY or not to_sleep:
            to_sleep = False
        if replica.report is not None:  # its next climb must not take this one's place
            self._finish_climb(replica, replica.report, now, at_once=True)
        self._decide(action, replica, reason, now, cause=cause)
        self.state.prewarms.gone(replica.replica_id, now)
        replica.reason, replica.cause = reason, cause
        replica.grace_s = self.settings.drain_grace_s if grace_s is None else grace_s
        self._dirty.add(replica.model)
        if replica.stage in (Stage.PLANNED, Stage.UNKNOWN):
            self._forget(replica)  # a lost node's replica is met again when the node returns
        elif replica.stage is Stage.READY:
            if not to_sleep:
                replica.book_sleep(0, 0, 0)
            replica.move(Stage.UNROUTING, now)
            replica.unrouted_version = self.state.routes_version + 1
            replica.unrouted_deadline = now + UNROUTE_TIMEOUT_S
        elif replica.stage is Stage.UNROUTING:
            replica.book_sleep(0, 0, 0)
        else:
            self._send_stop(replica, now)

    def _stop_unrouted(self, now: float) -> None:
        for replica in list(self.state.index.unrouting.values()):
            confirmed = all(
                router.routes_version >= replica.unrouted_version
                for router in self.state.routers.values()
            )
            if confirmed or now >= replica.unrouted_deadline:
                if replica.sleep_level:
                    self._send_sleep(replica, now)
                else:
                    self._send_stop(replica, now)

    def _send_sleep(self, replica: Replica, now: float) -> None:
        replica.move(Stage.SLEEPING, now)
        replica.retry_at, replica.confirmed = now + RESEND_S, None
        command = SleepReplica(
            replica_id=replica.replica_id, epoch=self.state.term,
            level=1 if replica.sleep_level == 1 else 2, grace_s=replica.grace_s,
            reason=replica.reason, cause=replica.cause,
        )  # fmt: skip
        self._out.append(m.Send(node_id=replica.node_id, command=command))
        self._dirty.add(replica.model)

    def _send_wake(self, replica: Replica, now: float) -> None:
        if replica.climb is not None and replica.climb.sent_at is None:
            replica.climb.sent_at = now
        replica.move(Stage.WAKING, now)
        replica.retry_at, replica.confirmed = now + RESEND_S, None
        command = WakeReplica(
            replica_id=replica.replica_id, epoch=self.state.term, reason=replica.reason,
            cause=replica.cause,
        )  # fmt: skip
        self._out.append(m.Send(node_id=replica.node_id, command=command))
        self._dirty.add(replica.model)

    def _send_stop(self, replica: Replica, now: float, reason: str | None = None) -> None:
        if replica.sleeps:
            replica.shrink()
        replica.move(Stage.STOPPING, now)
        # Host memory of a sleeper is free when it is gone, not when it was told to go.
        replica.book_sleep(0, replica.host_booked, 0)
        replica.retry_at, replica.confirmed = now + RESEND_S, None
        command = StopReplica(
            replica_id=replica.replica_id, epoch=self.state.term,
            grace_s=replica.grace_s or self.settings.drain_grace_s,
            reason=reason or replica.reason,
            cause=replica.cause,
        )  # fmt: skip
        self._out.append(m.Send(node_id=replica.node_id, command=command))
        self._dirty.add(replica.model)

    def _unplan(self, replica: Replica, now: float) -> None:
        """Take a plan back that has not begun: a new replica is forgotten, a riser sleeps on."""
        self._dirty.add(replica.model)
        if replica.stage is Stage.RISING:
            replica.climb = None
            replica.move(Stage.ASLEEP, now)
        else:
            self._forget(replica)

    def _forget(self, replica: Replica) -> None:
        self.state.prewarms.gone(replica.replica_id, self._now)
        self.state.drop(replica)
        self._dirty.add(replica.model)

    def _decide(
        self, action: str, replica: Replica, reason: str, now: float, cause: str | None = None,
        considered: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._record(
            action, replica.model, reason, now, cause=replica.cause if cause is None else cause,
            replica_id=replica.replica_id, node_id=replica.node_id, considered=considered,
        )  # fmt: skip

    def _record(
        self, action: str, model: str, reason: str, now: float, *, cause: str = "",
        replica_id: str | None = None, node_id: str | None = None,
        considered: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.state.decision_count += 1
        decided = m.Decided(
            number=self.state.decision_count, at=now, action=action, model=model, reason=reason,
            cause=cause, replica_id=replica_id, node_id=node_id, considered=considered,
        )  # fmt: skip
        self.state.decisions.append(decided)
        self._out.append(decided)
