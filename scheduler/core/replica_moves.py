"""How one replica moves: what its agent says, and what its agent is told. Pure.

Rules this file keeps:
- what an agent says is taken over, unless the scheduler has begun to move the replica elsewhere;
- unroute, wait for the routers (or a deadline), then stop or put to sleep; a command whose effect
  is not seen is repeated;
- every move leaves a `Decided` with its reason and cause.
"""

from __future__ import annotations

import math

from runtime.engine.exits import FINAL_KINDS
from runtime.wire.agent_messages import (
    ReplicaCommand,
    ReplicaReport,
    SleepReplica,
    StartReplica,
    StopReplica,
    WakeReplica,
)
from scheduler.core.climbs import Climbs
from scheduler.core.page_cache_holds import Holds
from scheduler.core.turn import RESEND_S, Turn
from scheduler.policy.choices import Choices
from scheduler.policy.ladder import Descent, yielding
from scheduler.state import messages as m
from scheduler.state.cluster import LEAVING, Replica, Stage

UNROUTE_TIMEOUT_S = 3.0  # how long routers may take to confirm a table without a replica
EVICT_GRACE_S = 3600.0  # nobody's request is ended to make room, or because a model seemed idle
FIRST_RETRY_S, MAX_RETRY_S = 10.0, 300.0  # between attempts to start a model that failed
_AWAITED = {
    "start": Stage.SENT,
    "stop": Stage.STOPPING,
    "sleep": Stage.SLEEPING,
    "wake": Stage.WAKING,
    "repoint": Stage.WAKING,
}


class Moves:
    """Moves replicas up and down, and follows what their agents say of it."""

    def __init__(self, turn: Turn, holds: Holds, climbs: Climbs, choices: Choices) -> None:
        self._turn = turn
        self._holds = holds
        self._climbs = climbs
        self._choices = choices

    def follow_phase(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        """Take over what the agent says, unless the scheduler has begun to move the replica."""
        match replica.stage:
            case Stage.STOPPING:
                if report.phase not in ("draining", "stopping") and now >= replica.retry_at:
                    self.send_stop(replica, now)
            case Stage.UNROUTING:
                if report.phase != "ready":
                    self.send_stop(replica, now)  # it serves nobody: no ack to wait for
            case Stage.SLEEPING:
                self._follow_sleep(replica, report, now)
            case Stage.ASLEEP | Stage.RISING if report.phase == "asleep":
                replica.keep_residue(report.residue_bytes)
            case Stage.WAKING if report.phase in ("asleep", "waking"):
                if report.phase == "asleep" and now >= replica.retry_at:
                    self.send_wake(replica, now)
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
                self.failed(replica, report.reason or "its start failed", now)

    def _follow_sleep(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        if report.phase == "asleep":
            self._asleep(replica, report, now)
        elif report.phase == "ready":
            if self.shown(replica):  # it could not sleep; its agent says why
                self._turn.decide("stay", replica, report.reason or "it could not sleep", now)
                self._back_to_ready(replica, now)
            elif now >= replica.retry_at:
                self._send_sleep(replica, now)
        elif report.phase not in ("draining", "sleeping"):
            self.send_stop(replica, now)  # it died of it

    def _asleep(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        replica.move(Stage.ASLEEP if report.phase == "asleep" else Stage.SLEEPING, now)
        level = report.sleep_level or replica.sleep_level or 1
        replica.retry_at = now + RESEND_S
        model = self._turn.state.models.get(replica.model)
        host_bytes = replica.host_booked
        if model is not None and level == 1 and not host_bytes:
            host_bytes = model.weights_bytes(replica)
        if (level, host_bytes) != (replica.sleep_level, replica.host_booked):
            replica.book_sleep(level, host_bytes, replica.residue)
        if report.phase == "asleep":
            replica.keep_residue(report.residue_bytes)

    def _back_to_ready(self, replica: Replica, now: float) -> None:
        replica.move(Stage.READY, now)
        replica.ready_at = now  # its dwell time starts again: it is not asked again at once
        replica.book_sleep(0, 0, 0)

    def shown(self, replica: Replica) -> bool:
        """Whether the node's last heartbeat was made after the last command arrived there."""
        heartbeat = self._turn.state.nodes[replica.node_id].heartbeat
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
        model = self._turn.state.models.get(replica.model)
        if model is not None:
            model.forgive()
        if replica.climb is not None:
            replica.climb.ready_at, replica.climb.woken_from = now, woken_from
            self._climbs.finish(replica, report, now)

    def failed(self, replica: Replica, why: str, now: float) -> None:
        """Clear away what its agent gave up: the model rests for a while, while others serve."""
        self._turn.decide("give_up", replica, why, now)
        self._climbs.end(replica, "failed", now)
        model = self._turn.state.models.get(replica.model)
        if model is not None and replica.stage not in (Stage.ASLEEP, Stage.RISING):
            model.failures += 1
            kind = replica.report.exit_kind if replica.report else None
            told = kind in ("oom", "too_small") and replica.kv_bytes is not None
            model.sizes_itself |= told  # the next start measures what there is
            final = model.problem_final = kind in FINAL_KINDS and not told
            pause_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** (model.failures - 1))
            pause_s = MAX_RETRY_S if final else pause_s
            model.blocked_until, model.problem = now + pause_s, why
            model.spares_s = math.inf if final else pause_s
        self.send_stop(replica, now, reason="clearing the failed start")

    def command_done(self, event: m.CommandDone, now: float) -> None:
        """Take in an agent's answer to a command."""
        replica = self._turn.state.replicas.get(event.replica_id)
        if replica is None or not event.delivered:
            return  # repeated after RESEND_S, or settled by the next heartbeat
        if replica.stage is not _AWAITED[event.kind]:
            return
        why = event.error or f"its agent refused to {event.kind} it"
        if event.ok:
            replica.confirmed = (event.boot_id, event.seq)
        elif event.kind == "start":
            self.failed(replica, why, now)
        elif event.kind == "sleep":
            # What wanted its memory may still have it: then it stops instead.
            self._turn.decide("stay", replica, why, now)
            replica.book_sleep(0, 0, 0)
            self.send_stop(replica, now)
        elif event.kind == "repoint":
            if replica.former is not None:
                self.give_back(replica, why, now)
        elif event.kind == "wake":
            self._turn.decide("lost", replica, why, now)
            self.send_stop(replica, now)

    def descend(self, way: Descent, reason: str, cause: str, now: float, action: str) -> None:
        """Take a replica down as far as `way` says; requests it has may end first."""
        replica = way.replica
        node = self._turn.state.nodes[replica.node_id]
        if way.level and replica.stage is Stage.READY:
            worth = float("inf")  # that it pays was decided when `way` was chosen
            gone = yielding(self._turn.state, node, way.host_bytes, worth, now)
            if gone is not None:
                for hold in gone:
                    self._holds.let_go(node, hold, f"host memory for {replica.model} asleep", now)
                replica.book_sleep(way.level, way.host_bytes, replica.bytes - way.frees)
        to_sleep = bool(replica.sleep_level) and replica.stage is Stage.READY
        self.leave(replica, reason, cause, now, action, to_sleep=to_sleep, grace_s=EVICT_GRACE_S)
        if not to_sleep:
            self.keep_staged(replica)
        for sleeper in self._choices.also_down(self._turn.state, node, now):
            self.leave(sleeper, "its host memory is needed", "host memory", now)

    def keep_staged(self, replica: Replica) -> None:
        """A replica stops: its model's weights may stay in the page cache for a while.

        Not held at once: a sleeper's host memory is free only when it is gone.
        """
        if self._choices.staging:
            replica.stage_after = True

    def leave(
        self, replica: Replica, reason: str, cause: str, now: float, action: str = "stop",
        to_sleep: bool = False, grace_s: float | None = None,
    ) -> None:  # fmt: skip
        """Begin to stop a replica, whatever it is doing, or to put a ready one to sleep.

        Repeating it changes nothing; stopping one that is on its way to sleep does.
        """
        if replica.stage in LEAVING and (to_sleep or not replica.sleep_level):
            return
        if replica.former is not None and replica.stage is Stage.RISING:
            self.unplan(replica, now)  # it serves or sleeps on as what it was
            return
        if replica.stage is not Stage.READY or not to_sleep:
            to_sleep = False
        if replica.report is not None:  # its next climb must not take this one's place
            self.finish_climb(replica, replica.report, now)
        self._turn.decide(action, replica, reason, now, cause=cause)
        self._turn.state.prewarms.gone(replica.replica_id, now)
        replica.reason, replica.cause = reason, cause
        replica.grace_s = self._turn.settings.drain_grace_s if grace_s is None else grace_s
        self._turn.dirty.add(replica.model)
        if replica.stage in (Stage.PLANNED, Stage.UNKNOWN):
            self.forget(replica)  # a lost node's replica is met again when the node returns
        elif replica.stage is Stage.READY:
            if not to_sleep:
                replica.book_sleep(0, 0, 0)
            replica.move(Stage.UNROUTING, now)
            replica.unrouted_version = self._turn.state.routes_version + 1
            replica.unrouted_deadline = now + UNROUTE_TIMEOUT_S
        elif replica.stage is Stage.UNROUTING:
            replica.book_sleep(0, 0, 0)
        else:
            self.send_stop(replica, now)

    def finish_climb(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        """Learn from a climb that is over, without waiting for more words of it."""
        self._climbs.finish(replica, report, now, at_once=True)

    def unrouted(self, replica: Replica, now: float) -> bool:
        """Whether no router sends requests to it any more, or had its time to hear of it."""
        return now >= replica.unrouted_deadline or all(
            router.routes_version >= replica.unrouted_version
            for router in self._turn.state.routers.values()
        )

    def stop_unrouted(self, now: float) -> None:
        """Stop or put to sleep what no router sends requests to any more."""
        for replica in list(self._turn.state.index.unrouting.values()):
            if self.unrouted(replica, now):
                if replica.sleep_level:
                    self._send_sleep(replica, now)
                else:
                    self.send_stop(replica, now)

    def send_start(self, replica: Replica, now: float) -> None:
        """Tell its agent to start it, for the first time or again."""
        assert replica.spec is not None  # only our own plans are started
        if replica.climb is not None and replica.climb.sent_at is None:
            replica.climb.sent_at = now
        replica.move(Stage.SENT, now)
        command = StartReplica(
            replica_id=replica.replica_id, epoch=self._turn.state.term, spec=replica.spec,
            device_ids=replica.device_ids, device_bytes=replica.bytes,
            reason=replica.reason, cause=replica.cause, kv_bytes=replica.kv_bytes,
            alone=replica.alone,
        )  # fmt: skip
        self.tell(replica, command, now)

    def _send_sleep(self, replica: Replica, now: float) -> None:
        replica.move(Stage.SLEEPING, now)
        command = SleepReplica(
            replica_id=replica.replica_id, epoch=self._turn.state.term,
            level=1 if replica.sleep_level == 1 else 2, grace_s=replica.grace_s,
            reason=replica.reason, cause=replica.cause,
        )  # fmt: skip
        self.tell(replica, command, now)

    def send_wake(self, replica: Replica, now: float) -> None:
        """Tell its agent to wake it, for the first time or again."""
        if replica.climb is not None and replica.climb.sent_at is None:
            replica.climb.sent_at = now
        replica.move(Stage.WAKING, now)
        command = WakeReplica(
            replica_id=replica.replica_id, epoch=self._turn.state.term, reason=replica.reason,
            cause=replica.cause,
        )  # fmt: skip
        self.tell(replica, command, now)

    def send_stop(self, replica: Replica, now: float, reason: str | None = None) -> None:
        """Tell its agent to stop it, for the first time or again."""
        if replica.sleeps:
            replica.shrink()
        replica.move(Stage.STOPPING, now)
        # Host memory of a sleeper is free when it is gone, not when it was told to go.
        replica.book_sleep(0, replica.host_booked, 0)
        command = StopReplica(
            replica_id=replica.replica_id, epoch=self._turn.state.term,
            grace_s=replica.grace_s or self._turn.settings.drain_grace_s,
            reason=reason or replica.reason,
            cause=replica.cause,
        )  # fmt: skip
        self.tell(replica, command, now)

    def tell(self, replica: Replica, command: ReplicaCommand, now: float) -> None:
        """Send its agent a command, which is repeated where nothing shows its effect."""
        replica.retry_at, replica.confirmed = now + RESEND_S, None
        self._turn.out.append(m.Send(node_id=replica.node_id, command=command))
        self._turn.dirty.add(replica.model)

    def unplan(self, replica: Replica, now: float) -> None:
        """Take a plan back that has not begun: a new replica is forgotten, a riser sleeps on."""
        self._turn.dirty.add(replica.model)
        if replica.former is not None:
            self.give_back(replica, "nobody waits for it any more", now, refused=False)
        elif replica.stage is Stage.RISING:
            replica.climb = None
            replica.move(Stage.ASLEEP, now)
        else:
            self.forget(replica)

    def give_back(self, replica: Replica, why: str, now: float, *, refused: bool = True) -> None:
        """Make a replica that was to be another model's what it was. `refused`: by its agent, so
        that the model is started plainly for a while."""
        former, state = replica.former, self._turn.state
        assert former is not None
        self._turn.decide("keep", replica, f"it stays {former.model}'s: {why}", now)
        self._turn.dirty.update((replica.model, former.model))
        if refused and replica.model in state.models:
            state.models[replica.model].own_engine_until = now + MAX_RETRY_S
        state.reassign(replica, former.model)
        replica.launch_key, replica.spec, replica.used_at = (
            former.launch_key, former.spec, former.used_at,
        )  # fmt: skip
        replica.former = replica.climb = None
        residue = 0 if former.hot else replica.residue
        replica.move(Stage.READY if former.hot else Stage.ASLEEP, now)
        replica.book_sleep(former.sleep_level, former.host_booked, residue)
        if former.model not in state.models:
            self.leave(replica, "its model was removed", "operator", now)

    def forget(self, replica: Replica) -> None:
        """Forget a replica that is gone; its weights may stay in the page cache."""
        self._turn.state.prewarms.gone(replica.replica_id, self._turn.now)
        self._turn.state.drop(replica)
        self._turn.dirty.add(replica.model)
        self._holds.after_stop(replica)
