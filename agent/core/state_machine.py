"""What the node agent decides: which replica starts, is signalled, restarts or is given up.

Rules this file keeps:
- pure: an event carries `now`, the answer is a list of effects; nothing here waits or looks;
- commands are idempotent by replica_id; an older epoch than the highest seen is refused;
- a replica is forgotten only once Gone says that its processes *and* its memory are gone, and it
  is restarted only then;
- stop in phase starting kills at once; draining ends with in_flight 0 or with its grace time,
  then TERM, then after TERM_GRACE_S KILL;
- what sleep, wake and re-point may do stands in agent/core/rungs.py;
- a start that must be alone on its devices (`StartReplica.alone`) is: it waits in its phase for
  what moves memory there, and all others for it; how many go on at once else is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.core import replica as state
from agent.core.messages import (
    Adopted,
    CommandReceived,
    CommandRefused,
    Effect,
    Event,
    Gone,
    HealthChanged,
    PhasesSeen,
    ProcessExited,
    RepointEnded,
    RepointEngine,
    Saved,
    SaveEpoch,
    SendHeartbeatNow,
    ShutdownRequested,
    SleepEnded,
    SleepEngine,
    Spawn,
    StageWeights,
    StatusSeen,
    TermSeen,
    Tick,
    WakeEnded,
    WakeEngine,
)
from agent.core.replica import MEMORY_PHASES, SERVED_PHASES, SLEEP_PHASES, Replica
from agent.core.rungs import RungTransitions
from runtime.wire.agent_messages import (
    AgentCommand,
    ReplicaReport,
    RepointReplica,
    SleepReplica,
    StageModels,
    StartReplica,
    StopReplica,
    WakeReplica,
)
from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import REPLICA_ID

HUNG_S = 30.0  # a ready or sleeping engine whose health fails this long is killed
SLEEP_S = 60.0  # a sleep that takes longer, once it is its turn, has failed
WAKE_S = 120.0  # and so has such a wake
STATUS_S = 6.0  # how long after its grace time a drain may wait to hear of its requests


class AgentCore(RungTransitions):
    """The transition table of every replica on one node."""

    def __init__(
        self,
        *,
        start_timeout_s: float,
        max_restarts: int,
        epoch: int = 0,
        rungs: Callable[[ModelSpec], tuple[int, ...]] = lambda spec: (),
        disabled: Mapping[str, Mapping[str, str]] | None = None,
        barred: Callable[[ModelSpec], Mapping[str, str]] = lambda spec: {},
    ) -> None:
        """`rungs` says which sleep levels an engine of that spec has on this node; `disabled`,
        by `state.launch_name`, which of them are not used any more and why; `barred`, which of
        them this host has no room for now."""
        super().__init__(max_restarts, disabled or {}, barred)
        self.epoch = epoch
        self.shutting_down = False
        self._start_timeout_s = start_timeout_s
        self._rungs = rungs

    @property
    def finished(self) -> bool:
        """Shut down, and nothing is left."""
        return self.shutting_down and not self.replicas

    def handle(self, event: Event) -> list[Effect]:
        """What to do about `event`, in order. An event of an unknown replica changes nothing."""
        self._out = []
        match event:
            case CommandReceived(now=now, command=command):
                self._on_command(command, now)
            case TermSeen(term=term):
                self._see_epoch(term)
            case Tick(now=now):
                self._on_tick(now)
            case Adopted():
                self._on_adopted(event)
            case ShutdownRequested():
                self._on_shutdown(event)
            case _:
                if replica := self.replicas.get(event.replica_id):
                    self._on_replica_event(replica, event)
        self._retry(event.now)
        self._work_next(event.now)
        return list(dict.fromkeys(self._out))

    # -------------------------------------------------------------------------- commands

    def _on_command(self, command: AgentCommand, now: float) -> None:
        if command.epoch < self.epoch:
            error = f"epoch {command.epoch} is older than {self.epoch}: another scheduler leads now"
            self._out.append(CommandRefused(error, stale=True))
            return
        self._see_epoch(command.epoch)
        if isinstance(command, StageModels):
            self._out += [StageWeights(command.models), SendHeartbeatNow()]
            return
        replica = self.replicas.get(command.replica_id)
        match command:
            case StartReplica():
                self._start(command, now)
            case StopReplica():
                if replica:
                    self._stop(replica, command, now)
                else:
                    self._remember_ended(command.replica_id)
            case _ if replica is None:
                self._out.append(CommandRefused(f"{command.replica_id} is not on this node"))
            case SleepReplica():
                self._sleep(replica, command, now)
            case WakeReplica():
                self._wake(replica, command, now)
            case RepointReplica():
                self._repoint(replica, command, now)

    def _see_epoch(self, epoch: int) -> None:
        if epoch > self.epoch:
            self.epoch = epoch
            self._out.append(SaveEpoch(epoch))

    def _start(self, command: StartReplica, now: float) -> None:
        replica_id = command.replica_id
        known = self.replicas.get(replica_id)
        if self.shutting_down:
            self._out.append(CommandRefused(f"{replica_id}: this agent is shutting down"))
        elif known and known.stop:
            self._out.append(
                CommandRefused(f"{replica_id} is {known.phase}; start a new replica id")
            )
        elif replica_id in self._ended:
            self._out.append(
                CommandRefused(f"{replica_id} was stopped before; start a new replica id")
            )
        elif not REPLICA_ID.fullmatch(replica_id):
            self._out.append(
                CommandRefused(f"{replica_id!r} is not a replica id: use {REPLICA_ID.pattern}")
            )
        elif not known:
            self.replicas[replica_id] = Replica(command, "starting", now)
            self._changed(replica_id)

    def _stop(self, r: Replica, command: StopReplica, now: float) -> None:
        drains_already = r.stop is not None
        if r.stop is None:
            r.stop, r.sleep, r.repoint, r.wake_wanted = command, None, None, False
            r.reason = command.reason
        deadline = now + command.grace_s
        if r.phase == "draining":
            r.deadline = min(r.deadline, deadline) if drains_already else deadline
            self._changed(r.command.replica_id)
        elif r.phase == "ready":
            r.deadline = deadline
            self._to(r, "draining", now)
        elif r.phase != "stopping" and r.tree:
            self._to(r, "stopping", now)
            self._kill(r)
        elif not r.tree:
            self._forget(r)
        if r.phase == "draining" and now >= r.deadline:
            self._terminate(r, now)

    def _on_shutdown(self, event: ShutdownRequested) -> None:
        self.shutting_down = True
        self._out.append(SendHeartbeatNow())
        for replica_id, r in list(self.replicas.items()):
            stop = StopReplica(
                replica_id=replica_id,
                epoch=self.epoch,
                grace_s=0.0 if event.hard else event.grace_s,
                reason="the agent is shutting down",
            )
            self._stop(r, stop, event.now)
            if event.hard and r.tree:
                self._kill(r)

    # -------------------------------------------------------------------------- one replica

    def _on_replica_event(
        self,
        r: Replica,
        event: ProcessExited
        | HealthChanged
        | StatusSeen
        | SleepEnded
        | WakeEnded
        | RepointEnded
        | PhasesSeen
        | Gone,
    ) -> None:
        now = event.now
        match event:
            case ProcessExited(kind=kind, words=words):
                self._on_exit(r, kind, words, now)
            case HealthChanged(healthy=healthy):
                self._on_health(r, healthy, now)
            case StatusSeen() if r.phase in ("ready", "draining"):
                r.in_flight, r.idle_for_s = event.in_flight, event.idle_for_s
                r.status_at = now
                # an answer to a question from before the drain says nothing of the drain
                if r.phase == "draining" and (event.asked_at or now) >= r.since:
                    r.looked = True
                    self._drain(r, now)
            case SleepEnded() if r.phase == "sleeping" and r.began_at is not None:
                self._on_slept(r, event, r.began_at)
            case WakeEnded() if r.phase == "waking" and r.began_at is not None and not r.repoint:
                self._on_woken(r, event, r.began_at)
            case RepointEnded() if r.repoint and r.began_at is not None:
                self._on_repointed(r, event, r.began_at)
            case PhasesSeen(phases=phases) if r.phase in SERVED_PHASES:
                r.phases = phases
                self._changed(r.command.replica_id)
            case Gone():
                r.tree = r.killed = False
                if r.phase == "stopping":
                    self._forget(r)

    def _on_exit(self, r: Replica, kind: str, words: str, now: float) -> None:
        """Whatever is left of its tree is killed, in every phase."""
        if r.at_work and (r.sleep or r.repoint):
            self._rung_failed(r, f"it died while {r.phase}: {words}", now, kind)
        elif r.phase == "draining" and r.stop:
            r.exit_kind = kind
            r.reason = f"{r.reason}; with {r.in_flight} requests in flight it ended: {words}"
            self._to(r, "stopping", now)
        elif r.phase == "starting" or r.phase in SERVED_PHASES:
            self._fail(r, kind, words, now)
        self._kill(r)

    def _on_health(self, r: Replica, healthy: bool, now: float) -> None:
        if healthy:
            r.unhealthy_since = None
            if r.phase == "starting" and r.tree:
                r.start_s, r.ready_at = now - r.spawned_at, now
                r.reason = r.exit_kind = None
                self._to(r, "ready", now)
        elif r.unhealthy_since is None:
            r.unhealthy_since = now

    def _on_tick(self, now: float) -> None:
        for r in list(self.replicas.values()):
            if r.phase == "starting" and r.tree:
                if now - r.spawned_at > self._start_timeout_s:
                    words = (
                        f"not ready {self._start_timeout_s:.0f} s after its start"
                        " (agent.start_timeout_s); its log says how far it came"
                    )
                    self._fail(r, "start_timeout", words, now)
            elif r.phase in ("ready", "asleep"):
                if r.unhealthy_since is not None and now - r.unhealthy_since >= HUNG_S:
                    words = f"its health check has failed for {HUNG_S:.0f} s"
                    self._fail(r, "hung", words, now)
            elif r.phase == "draining":
                self._drain(r, now)
            elif r.began_at is not None:
                limit_s = SLEEP_S if r.phase == "sleeping" else WAKE_S
                if now - r.began_at > limit_s:
                    self._rung_failed(r, f"it was {r.phase} for more than {limit_s:.0f} s", now)
            elif r.phase == "stopping" and now >= r.deadline:
                self._kill(r)

    def _drain(self, r: Replica, now: float) -> None:
        """Go on if nothing is in flight, or if its grace time is over."""
        over = now >= r.deadline
        ended = r.looked and r.in_flight == 0
        if r.stop:
            if over or ended:
                self._terminate(r, now)
        elif ended and r.repoint:
            self._become(r, r.repoint, now)
        elif ended:
            self._to(r, "sleeping", now)
        elif over and r.looked:
            command = r.repoint or r.sleep
            grace_s = command.grace_s if command else 0.0
            self._serve_on(r, f"{r.in_flight} requests were in flight after {grace_s:.0f} s", now)
        elif now >= r.deadline + STATUS_S:
            self._serve_on(r, "it does not say what is in flight", now)

    # -------------------------------------------------------------------------- device memory

    def _retry(self, now: float) -> None:
        for r in self.replicas.values():
            if r.phase == "backoff" and not r.tree and now >= r.retry_at:
                r.restarts += 1
                self._to(r, "starting", now)

    def _work_next(self, now: float) -> None:
        """Begin what may. One that must be alone waits for the others on its devices, and holds
        its place there meanwhile, so that it is not overtaken."""
        turns = sorted(
            (r for r in self.replicas.values() if r.phase in MEMORY_PHASES),
            key=lambda r: (not r.at_work, r.since),
        )
        busy: set[str] = set()
        alone: set[str] = set()
        for r in turns:
            devices = r.command.device_ids
            if not r.at_work and (busy if r.alone else alone).isdisjoint(devices):
                self._begin(r, now)
            busy.update(devices)
            if r.alone:
                alone.update(devices)

    def _begin(self, r: Replica, now: float) -> None:
        replica_id = r.command.replica_id
        if r.phase == "starting":
            r.tree, r.spawned_at, r.unhealthy_since = True, now, None
            r.rungs, r.phases = self._rungs(r.command.spec), {}
            self._out.append(Spawn(replica_id))
        elif r.repoint:
            r.began_at = now
            self._out.append(RepointEngine(replica_id, r.sleep.level if r.sleep else 0))
        elif r.sleep:
            r.began_at = now
            kind = SleepEngine if r.phase == "sleeping" else WakeEngine
            self._out.append(kind(replica_id, r.sleep.level))

    # -------------------------------------------------------------------------- adoption

    def _on_adopted(self, event: Adopted) -> None:
        saved, now = event.saved, event.now
        r = state.adopted(saved, now, now - event.age_s)
        self.replicas[saved.command.replica_id] = r
        self._see_epoch(saved.command.epoch)
        lives = saved.phase == "starting" or saved.phase in SERVED_PHASES
        if event.alive and lives:
            self._adopt_alive(r, event)
        elif saved.stop:
            r.stop, r.phase = saved.stop, "stopping"
            self._kill(r)
        elif lives:
            self._fail(r, "crash", "it died while no agent ran", now)
        else:
            self._kill(r)
        self._changed(saved.command.replica_id)

    def _adopt_alive(self, r: Replica, event: Adopted) -> None:
        phase = event.saved.phase
        if phase == "waking" and r.repoint:
            self._shell_failed(r, "its agent ended while it was pointed at the model", event.now)
        elif phase in SLEEP_PHASES:
            # One that sleeps no more was left half-way: it has its canary to pass.
            r.phase = "waking" if event.sleeping is False else "asleep"
            r.residue_bytes = r.residue_bytes or event.residue_bytes
        else:
            r.sleep = r.repoint = None  # no drain for it is gone on with: it will be asked again
            r.phase = "ready" if event.healthy or phase != "starting" else "starting"
        if r.phase == "ready" and phase == "starting":
            r.start_s = event.age_s
        if r.phase in ("ready", "asleep") and not event.healthy:
            r.unhealthy_since = event.now
        if event.saved.stop:
            self._stop(r, event.saved.stop, event.now)

    # -------------------------------------------------------------------------- views

    def saved(self, replica_id: str) -> Saved:
        """What to write down of a known replica."""
        return state.saved(self.replicas[replica_id])

    def reports(self, now: float) -> Iterable[ReplicaReport]:
        """Every replica; the driver adds what only it knows (address, key, pid, memory)."""
        return [state.report(r, self._disabled_of(r), now) for r in self.replicas.values()]

    def validate_state(self) -> None:
        """Raises AssertionError where a rule of this file is broken."""
        state.check(self.replicas.values())
        for replica_id, r in self.replicas.items():
            about = f"{replica_id} ({r.phase})"
            assert not self.shutting_down or r.stop, f"{about}: left out of the shutdown"
            assert r.failures <= self._max_restarts + 1, f"{about}: {r.failures} failures"
            assert replica_id not in self._ended, f"{about}: ended"
