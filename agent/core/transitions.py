"""How one replica changes phase: what the transition table's rows do.

Rules this file keeps:
- pure, and every change of a phase goes through `_to`, which knows the edges;
- a crash after having been ready restarts at once, the next ones wait longer and longer; after
  max_restarts in a row, where a restart cannot help, or where it gave its device memory away, the
  replica is failed and kept until Stop;
- every change is saved and told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import cast

from tenacity import RetryCallState, wait_exponential

from agent.core import replica as state
from agent.core.messages import (
    Effect,
    ForgetRecord,
    SaveRecord,
    SendHeartbeatNow,
    Signal,
)
from agent.core.replica import EDGES, SERVED_PHASES, SLEEP_PHASES, Replica
from runtime.engine.exits import FINAL_KINDS
from runtime.wire.agent_messages import ReplicaPhase
from runtime.wire.model_spec import ModelSpec

TERM_GRACE_S = 10.0  # between TERM and KILL
STEADY_S = 60.0  # this long after it became ready: earlier crashes no longer count
FATAL_KINDS = FINAL_KINDS | {"start_timeout", "bad_host"}  # a retry at once cannot help
REMEMBERED_ENDED = 4096  # ids of ended replicas, so that a delayed Start does not revive one

_backoff = wait_exponential(multiplier=0.5, max=30)


class Transitions:
    """Every replica of one node, and what each change of them asks the driver for."""

    def __init__(
        self,
        max_restarts: int,
        disabled: Mapping[str, Mapping[str, str]],
        barred: Callable[[ModelSpec], Mapping[str, str]],
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self.disabled = {name: dict(rungs) for name, rungs in disabled.items()}
        self._max_restarts = max_restarts
        self._barred = barred
        self._ended: dict[str, None] = {}
        self._out: list[Effect] = []

    def _fail(self, r: Replica, kind: str, words: str, now: float) -> None:
        """Restart an engine that died or must die, after a pause; or give up."""
        was_ready = r.phase in SERVED_PHASES
        if was_ready and now - r.ready_at >= STEADY_S:
            r.failures = 0
        r.failures += 1
        r.reason, r.exit_kind = words, kind
        r.died = words if was_ready else r.died
        if kind in FATAL_KINDS:
            self._to(r, "failed", now)
        elif r.phase == "asleep":
            # Its device memory may be another replica's by now: whether and where it starts again
            # is for the scheduler to decide.
            self._to(r, "failed", now)
        elif r.failures > self._max_restarts:
            r.reason = f"given up after {self._max_restarts} restarts in a row: {words}"
            self._to(r, "failed", now)
        else:
            at_once = was_ready and r.failures == 1
            r.retry_at = now + (0.0 if at_once else backoff_s(r.failures))
            self._to(r, "backoff", now)
        self._kill(r)

    def _serve_on(self, r: Replica, why: str | None, now: float) -> None:
        """Go back to ready: nothing was done to it yet. None: that was asked for."""
        what = f"not pointed at {r.repoint.spec.name}" if r.repoint else "not put to sleep"
        r.reason = f"{what}: {why}" if why else None
        self._to(r, "ready", now)

    def _terminate(self, r: Replica, now: float) -> None:
        r.deadline = now + TERM_GRACE_S
        self._to(r, "stopping", now)
        self._out.append(Signal(r.command.replica_id, "TERM"))

    def _kill(self, r: Replica) -> None:
        if r.tree and not r.killed:
            r.killed = True
            self._out.append(Signal(r.command.replica_id, "KILL"))

    def _forget(self, r: Replica) -> None:
        replica_id = r.command.replica_id
        if None not in EDGES[r.phase]:
            raise AssertionError(f"{replica_id}: forgotten while {r.phase}")
        del self.replicas[replica_id]
        self._remember_ended(replica_id)
        self._out += [ForgetRecord(replica_id), SendHeartbeatNow()]

    def _remember_ended(self, replica_id: str) -> None:
        self._ended[replica_id] = None
        while len(self._ended) > REMEMBERED_ENDED:
            del self._ended[next(iter(self._ended))]

    def _to(self, r: Replica, phase: ReplicaPhase, now: float) -> None:
        if phase not in EDGES[r.phase]:
            raise AssertionError(f"{r.command.replica_id}: {r.phase} -> {phase}")
        r.phase, r.since = phase, now
        r.began_at, r.looked, r.wake_wanted = None, False, False
        if phase in ("ready", "asleep"):
            r.unhealthy_since = None
        if phase != "draining" and phase not in SLEEP_PHASES:
            r.sleep = None
        if phase not in ("draining", "waking"):
            r.repoint = None
        if phase not in SERVED_PHASES:
            r.in_flight, r.idle_for_s = 0, None
        self._changed(r.command.replica_id)

    def _changed(self, replica_id: str) -> None:
        self._out += [SaveRecord(replica_id), SendHeartbeatNow()]

    def _disabled_of(self, r: Replica) -> Mapping[str, str]:
        """What is not used any more, and what this host has no room for."""
        spec = r.command.spec
        return {**self._barred(spec), **self.disabled.get(state.launch_name(spec), {})}


def backoff_s(failures: int) -> float:
    """The pause before a restart after so many failures in a row: 0.5, 1, 2 … at most 30 s."""
    return _backoff(cast(RetryCallState, SimpleNamespace(attempt_number=failures)))
