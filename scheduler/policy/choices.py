"""What a policy chooses for the core: the seam for other policies than production's. Pure.

The core carries out: it drains, unroutes, sends, retries, books and publishes alike whoever
chooses. `scheduler/policy/production.py` is what production chooses by; bench/policies/ has others.

Rules this file keeps: a policy reads the state and may keep notes in its models (`warm_until`,
`scaling`), but moves no replica: it says what should move, or calls `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scheduler.policy.placement import Answer, Fit
from scheduler.state.cluster import ClusterState, Demand, Model, Node, Replica

# Enter a replica of a model into the state, with its cause in words; what is in its way goes down.
Plan = Callable[[Model, Fit, str], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas a model should have."""

    wanted: int
    reason: str
    keep: int | None  # ready ones beyond this many step down; None: all stay for now
    look_again_s: float = math.inf  # ask again after so long though nothing happened


class Choices(Protocol):
    """One policy, for the lifetime of one core."""

    staging: bool  # a stopped replica's weights may stay in the page cache
    idle_timers: bool  # replicas step down when nobody used them for idle_s and asleep_s

    def place(
        self, state: ClusterState, model: Model, now: float, evict: bool, extra: bool
    ) -> Answer:
        """Where one more replica goes, and what goes down for it.

        `extra`: others serve or will, or nobody is in a hurry, so it is not worth much waiting of
        the models it moves down. Without `evict` it takes free room only.
        """

    def scale(self, state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
        """How many replicas `model` should have. Asked once an event."""

    def worth_keeping(
        self, state: ClusterState, model: Model, replica: Replica, now: float, hungry: bool
    ) -> bool:
        """Whether an idle replica stays hot beyond its idle timer. `hungry`: some model has found
        no room."""

    def look_ahead(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:
        """Plan what should stand before it is called; asked with every tick."""

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """Sleepers that stop, now that another replica of `node` went down."""
