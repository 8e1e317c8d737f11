"""What can lead a simulated cluster: the production core, or a baseline. Pure.

The contract of a policy (bench/ writes its baselines against it):
- `handle(event) -> commands` gets every event of scheduler/state/messages.py, in order, each with
  its `now`, and returns commands of that file. Elected comes first and brings the models.
- `Send` a StartReplica with a replica id never used before (its own, or with the term in it), the
  term as `epoch`, devices of one node and `device_bytes` on each; Stop, Sleep and Wake by that id.
  The node's agent obeys as in production: it drains, refuses what is stale, restarts what died.
- `Publish` a RouteTable whose version grows, with every model and the endpoints (base_url and key
  from its ReplicaReport) that serve; a model with no endpoint holds its requests for hold_s.
- Nobody else frees memory: a start before its room is really free is an over-commitment, which
  the world reports as a violation.
- `Decided` and `ColdStart` are optional; evictions are counted by `Decided.action == "evict"`.
- `state` is looked at only where it is the production ClusterState: its invariants are checked, and
  floors (FloorSet) are worked out from its models, as the driver does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.state import messages as m


class Policy(Protocol):
    """One leader."""

    def handle(self, event: m.Event) -> Sequence[m.Command]:
        """Take one event in and return what is to be done, in order."""


PolicyFactory = Callable[[], Policy]  # called for each leader that is elected


def production(settings: Settings | None = None) -> PolicyFactory:
    """The scheduler core itself."""
    return lambda: Core(settings)
