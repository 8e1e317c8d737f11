"""Runs the core in the world: feeds events in, carries commands out, publishes the route table.

Rules this file keeps: it decides nothing; the core is called on the event loop only, one event at a
time; a scheduler that is not the leader touches nothing; what the core decided of an event before
it failed on the rest is carried out, and a core that keeps failing is noticed (`keeps_failing`);
who fails on what is stored does not lead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from runtime.wire.routes import RouteTable
from scheduler.agent_calls import AgentCalls
from scheduler.core.decisions import Core
from scheduler.core.turn import EventFailed
from scheduler.learned_state import LearnedState
from scheduler.state import messages as m
from scheduler.state.learning import mismatch
from scheduler.tasks import Tasks

log = logging.getLogger("stoker.scheduler")

FAILURES = 3  # of the core within so long: what it knows can't be trusted any more
FAILURES_S = 10.0


class Driver:
    """One scheduler's core at work. `leads` tells whether it may act."""

    def __init__(
        self,
        core: Core,
        agents: AgentCalls,
        learned: LearnedState,
        tasks: Tasks,
        clock: Callable[[], float],
    ) -> None:
        self.core = core
        self.agents = agents
        self._learned = learned
        self._tasks = tasks
        self._clock = clock
        self.leads = False
        self.table: RouteTable | None = None
        self.decided: dict[str, int] = {}  # decisions made, by action, for the metrics
        self.on_cold_start: Callable[[m.ColdStart], None] = lambda _: None  # the metrics' hook
        self._table_changed = asyncio.Event()
        self._demand_seen = asyncio.Event()
        self._failed_at: tuple[float, ...] = ()  # the last FAILURES

    def now(self) -> float:
        """The one clock of all events."""
        return self._clock()

    # ------------------------------------------------------------------------------- leading

    def lead(self, event: m.Elected) -> None:
        """Act from now on, with what is stored.

        Raises EventFailed where the core can't take that in: it would know a part of the models,
        and stop the replicas of all others.
        """
        commands = self.core.handle(event)
        self.leads = True
        self._failed_at = ()
        self._carry_out(commands, event.now)

    def stand_by(self) -> None:
        """Act no more: what was not sent yet is not sent, and routers look for the new leader."""
        self.leads = False
        self._wake_table_waiters()
        self.agents.drop_queued()

    @property
    def keeps_failing(self) -> bool:
        """Whether the core failed so often of late that it may have stopped deciding."""
        failed_at = self._failed_at
        return len(failed_at) == FAILURES and failed_at[-1] - failed_at[0] <= FAILURES_S

    # ------------------------------------------------------------------------------- events

    def apply(self, event: m.Event) -> None:
        """Hand one event to the core and begin to carry out what it answers."""
        try:
            commands = self.core.handle(event)
        except EventFailed as failed:
            # One failure is outlived: the next heartbeats and reports tell everything again.
            log.exception("%s", failed)
            self._count_failure(event.now)
            commands = failed.commands
        if isinstance(event, m.DemandSeen):
            self._demand_seen.set()
            self._demand_seen = asyncio.Event()
        self._carry_out(commands, event.now)

    def _carry_out(self, commands: Iterable[m.Command], now: float) -> None:
        for command in commands:
            try:
                self._execute(command)
            except Exception:  # those after it are no less decided
                log.exception("%s could not be carried out", type(command).__name__)
                self._count_failure(now)

    def _count_failure(self, now: float) -> None:
        self._count("core_error")
        self._failed_at = (*self._failed_at, now)[-FAILURES:]

    def _execute(self, command: m.Command) -> None:
        match command:
            case m.Send():
                self.agents.send(command.node_id, command.command, self._command_done)
            case m.Publish():
                self.table = command.table
                self._wake_table_waiters()
            case m.ColdStart():
                if wrong := mismatch(command):
                    log.error("%s", wrong)
                self.on_cold_start(command)
            case m.Sketched():
                self._learned.keep_sketch(command.model, command.sketch)
            case m.Quarantined():
                self._tasks.spawn(self._learned.keep_quarantine(command))
            case m.Learned():
                self._learned.keep_footprint(command.footprint)
            case m.Decided():
                self._count(command.action)
                log.info(
                    "%s %s: %s", command.action, command.replica_id or command.model,
                    command.reason,
                    extra={"cause": command.cause or None, "node": command.node_id},
                )  # fmt: skip

    def _command_done(self, done: m.CommandDone) -> None:
        if self.leads:
            self.apply(done)

    def _count(self, action: str) -> None:
        self.decided[action] = self.decided.get(action, 0) + 1

    # ------------------------------------------------------------------------------- routers

    async def routes_after(self, version: int, wait_s: float) -> RouteTable | None:
        """The table as soon as it is newer than `version`; None if it is not within `wait_s`."""
        deadline = self.now() + wait_s
        while self.leads and (self.table is None or self.table.version <= version):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline - self.now()):
                    await self._table_changed.wait()
                continue
            return None
        return self.table if self.leads else None

    async def routers_follow(self, limit_s: float = 2.0) -> None:
        """Return once every router that reports routes by the present table, or after `limit_s`.

        So that who was told "added" is not told "unknown model" by a router right after.
        """
        version = self.table.version if self.table else 0
        routers = self.core.state.routers
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while any(r.routes_version < version for r in routers.values()):
                    await self._demand_seen.wait()

    def _wake_table_waiters(self) -> None:
        self._table_changed.set()
        self._table_changed = asyncio.Event()
