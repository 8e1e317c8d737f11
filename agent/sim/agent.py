"""The agent process of a simulated node: the production core, its restarts, and its ticks. Pure.

Rules this file keeps:
- the core is AgentCore itself; a restart makes a new one, so whoever waits for an outcome compares
  the core it asked with the one there is;
- ticks that can change nothing are left out: `_deadline` says when one can (docs/simulator.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from agent.core import messages as m
from agent.core.periods import TICK_S
from agent.core.replica import Replica
from agent.core.state_machine import HUNG_S, SLEEP_S, STATUS_S, WAKE_S, AgentCore
from runtime.contract.config import AgentConfig
from runtime.sim.loop import Loop
from runtime.wire.model_spec import ModelSpec

_CONFIG = AgentConfig()  # what an operator gets who sets nothing


class Agent:
    """One node's agent. `core` is another after each restart."""

    def __init__(
        self,
        loop: Loop,
        rungs: tuple[int, ...],
        *,
        check: bool,
        changed: set[str],
        execute: Callable[[m.Effect], object],
    ) -> None:
        """`rungs`: the sleep levels of its engines; `check`: validate the core's state after each
        event; `changed` gets the replicas that an event may have changed; `execute` carries an
        effect out."""
        self.up = True
        self.core = self._new_core(0, {}, rungs)
        self._loop = loop
        self._rungs = rungs
        self._check = check
        self._changed = changed
        self._execute = execute
        self._tick_at = math.inf

    @staticmethod
    def _new_core(
        epoch: int, disabled: dict[str, dict[str, str]], rungs: tuple[int, ...]
    ) -> AgentCore:
        def levels(spec: ModelSpec) -> tuple[int, ...]:
            return () if spec.sleep == "off" else rungs

        return AgentCore(
            start_timeout_s=_CONFIG.start_timeout_s, max_restarts=_CONFIG.max_restarts,
            epoch=epoch, rungs=levels, disabled=disabled,
        )  # fmt: skip

    def restart(self) -> None:
        """Begin again with what a new process reads from the disk, but for its replicas."""
        self.up = True
        self.core = self._new_core(self.core.epoch, self.core.disabled, self._rungs)

    def end(self) -> None:
        """Stop, with the host."""
        self.up = False
        self._tick_at = math.inf

    def asks(self, core: AgentCore) -> bool:
        """Whether `core` is the one of the agent that runs now."""
        return self.up and core is self.core

    def apply(self, event: m.Event) -> list[m.Effect]:
        """Give the core an event and carry out what it says."""
        effects = self.core.handle(event)
        self._mark(event, effects)
        for effect in effects:
            self._execute(effect)
        if self._check:
            self.core.validate_state()
        if effects or not isinstance(event, m.StatusSeen):
            self._arm()
        return effects

    def _mark(self, event: m.Event, effects: list[m.Effect]) -> None:
        """Note the replicas that the event may have changed."""
        replica_id = getattr(event, "replica_id", None)
        if replica_id is None:
            self._changed.update(self.core.replicas)
        else:
            self._changed.add(replica_id)
        for effect in effects:  # e.g. another one's turn has come
            if (other_id := getattr(effect, "replica_id", None)) is not None:
                self._changed.add(other_id)

    def _arm(self) -> None:
        due = self._due_at()
        if due < self._tick_at:
            self._tick_at = due
            self._loop.at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        if due == self._tick_at and self.up:
            self._tick_at = math.inf
            self.apply(m.Tick(now=self._loop.now))

    def _due_at(self) -> float:
        """The first tick that may change something: on the driver's grid, after a deadline."""
        now = self._loop.now
        due = min((_deadline(r, now) for r in self.core.replicas.values()), default=math.inf)
        if due == math.inf:
            return due
        return (math.floor(max(due, now) / TICK_S) + 1) * TICK_S


def _deadline(r: Replica, now: float) -> float:
    """When a tick first changes this replica, if nothing else does."""
    match r.phase:
        case "ready" | "asleep":
            return math.inf if r.unhealthy_since is None else r.unhealthy_since + HUNG_S
        case "starting":
            return r.spawned_at + _CONFIG.start_timeout_s if r.tree else math.inf
        case "draining":
            return r.deadline if now < r.deadline else r.deadline + STATUS_S
        case "stopping":
            return math.inf if r.killed else r.deadline
        case "backoff":
            return math.inf if r.tree else r.retry_at
        case "sleeping" | "waking" if r.began_at is not None:
            return r.began_at + (SLEEP_S if r.phase == "sleeping" else WAKE_S)
    return math.inf
