"""What warming ahead was good for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Prewarms:
    """What warming ahead was good for: counters for metrics, and the prewarms not settled yet.

    A prewarm is a hit if a call came before its replica went down again. Repeats and unknown
    replicas change nothing, so any event may be told twice.
    """

    started: int = 0
    hits: int = 0
    misses: int = 0
    wasted_byte_s: float = 0.0  # of misses: from the prewarm until it went down
    open: dict[str, tuple[float, int]] = field(default_factory=dict)  # replica: since, bytes

    def begin(self, replica_id: str, now: float, held_bytes: int) -> None:
        """Count a prewarm that holds `held_bytes`, once a replica."""
        if replica_id not in self.open:
            self.open[replica_id] = (now, max(0, held_bytes))
            self.started += 1

    def called(self, replica_id: str) -> None:
        """Count a hit: the replica was called."""
        if self.open.pop(replica_id, None) is not None:
            self.hits += 1

    def gone(self, replica_id: str, now: float) -> None:
        """Count a miss: the replica went without a call."""
        since, held_bytes = self.open.pop(replica_id, (None, 0))
        if since is not None:
            self.misses += 1
            self.wasted_byte_s += max(0.0, now - since) * held_bytes
