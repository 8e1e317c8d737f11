"""One event's work, as the parts of the core share it. Pure.

Rules this file keeps:
- the state is read through the turn, never kept: an election replaces it as a whole;
- every decision leaves a `Decided` with its reason and cause;
- what was decided of an event is never lost, also where the core fails on the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.contract.config import SchedulerConfig
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, Replica

_DEFAULTS = SchedulerConfig()
RESEND_S = 3.0  # a command whose effect is not seen is repeated after this


@dataclass(frozen=True, slots=True)
class Settings:
    """What the core needs of SchedulerConfig, whose comments say what each is."""

    node_timeout_s: float = _DEFAULTS.node_timeout_s
    recovery_grace_s: float = _DEFAULTS.recovery_grace_s
    drain_grace_s: float = _DEFAULTS.drain_grace_s
    min_dwell_s: float = _DEFAULTS.min_dwell_s
    stand_by: bool = _DEFAULTS.stand_by
    starts_at_once: int = _DEFAULTS.starts_at_once
    shells: bool = _DEFAULTS.shells


class EventFailed(Exception):
    """An event that the core failed on, and why. `commands`: what was decided of it before.

    The state has taken that in (a device is quarantined, a start is sent), so it has to happen.
    """

    def __init__(self, event: m.Event, why: Exception, commands: list[m.Command]) -> None:
        super().__init__(f"the core failed on {type(event).__name__}: {why!r}")
        self.commands = commands


class Turn:
    """The state, what is to be done, and what to look at again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = ClusterState()
        self.out: list[m.Command] = []
        self.now = 0.0  # of the event being handled
        self.dirty: set[str] = set()  # models to look at again and whose route may have changed
        self.hungry: set[str] = set()  # models that want more replicas than they could get
        self.freed = False  # something moved that may have made room
        self.restage: set[str] = set()  # nodes to be told what to hold in their page cache
        self.unrouted = False  # a router or the clock may have let an unrouted replica go

    def decide(
        self, action: str, replica: Replica, reason: str, now: float, cause: str | None = None,
        considered: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Record what was decided of a replica; its own cause counts where none is given."""
        self.record(
            action, replica.model, reason, now, cause=replica.cause if cause is None else cause,
            replica_id=replica.replica_id, node_id=replica.node_id, considered=considered,
        )  # fmt: skip

    def record(
        self, action: str, model: str, reason: str, now: float, *, cause: str = "",
        replica_id: str | None = None, node_id: str | None = None,
        considered: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Record a decision, with its number."""
        self.state.decision_count += 1
        decided = m.Decided(
            number=self.state.decision_count, at=now, action=action, model=model, reason=reason,
            cause=cause, replica_id=replica_id, node_id=node_id, considered=considered,
        )  # fmt: skip
        self.state.decisions.append(decided)
        self.out.append(decided)
