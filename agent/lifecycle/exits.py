"""How an engine's process ended, or why it never began, in words that the core is told.

Rules this file keeps: an error of a start becomes an exit with words, never an exception of the
agent's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agent.core.messages import Event, ProcessExited
from agent.core.replica import SERVED_PHASES
from agent.host import Host
from agent.lifecycle.probes import Probes
from agent.lifecycle.replicas import Replicas
from runtime.engine.select import get_engine

log = logging.getLogger("stoker.agent")


class Exits:
    """The ends of one node's engine processes."""

    def __init__(
        self, host: Host, replicas: Replicas, probes: Probes, apply: Callable[[Event], object]
    ) -> None:
        """`apply` gives the core an event."""
        self._host = host
        self._replicas = replicas
        self._probes = probes
        self._apply = apply

    def seen(self, replica_id: str, returncode: int | None) -> None:
        """The supervisor saw its main process end; None: with a status that nobody can tell."""
        self._probes.end(replica_id)
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        engine = get_engine(replica.command.spec.engine)
        try:
            tail = self._host.supervisor.log_tail(replica_id)
            kind, words = engine.explain_exit(returncode, tail)
        except Exception:  # an engine's fault must not hide that it died
            log.exception("%s: its exit can't be explained", replica_id)
            kind, words = "crash", f"it ended with status {returncode}; see its log"
        self.tell(replica_id, kind, words)

    def tell(self, replica_id: str, kind: str, words: str) -> None:
        """Tell the core that it ended; `kind` as in ReplicaReport.exit_kind."""
        replica = self._replicas[replica_id]
        if replica.phase == "starting" and self._host.sources.failed(replica_id, words):
            kind = "crash"  # it is worth another start, with another load format
        if replica.phase == "starting" or replica.phase in SERVED_PHASES:
            self._host.metrics.exits.labels(replica.command.spec.name, kind).inc()
            log.warning("%s died while %s: %s", replica_id, replica.phase, words)
        now = time.monotonic()
        self._apply(ProcessExited(now=now, replica_id=replica_id, kind=kind, words=words))
