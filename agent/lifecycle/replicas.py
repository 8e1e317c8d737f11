"""What this node knows of its replicas: the core's state of each, and its record on the disk.

Rules this file keeps: it changes records only, never the core's state.
"""

from __future__ import annotations

from collections.abc import Iterable

import aiohttp
import msgspec

from agent.core.replica import SLEEP_PHASES, Replica
from agent.core.state_machine import AgentCore
from agent.engines.probe import Target
from agent.engines.sleep import Controls
from agent.engines.wake_canary import WakeCanary
from agent.records import Record, Records
from runtime import places
from runtime.wire.agent_messages import ReplicaPhase

_WILDCARDS = {"0.0.0.0", "::"}
_READING = ("starting", "backoff", "waking")  # phases in which an engine may read its weights


class Replicas:
    """The replicas of one node."""

    def __init__(
        self, core: AgentCore, records: Records, session: aiohttp.ClientSession, host: str
    ) -> None:
        """`host`: the address that engines listen on."""
        self._core = core
        self._records = records
        self._session = session
        self._host = "127.0.0.1" if host in _WILDCARDS else host
        self._known: dict[str, Record] = {}

    # ------------------------------------------------------------------ the core's state

    def get(self, replica_id: str) -> Replica | None:
        """The core's state of a replica; None once it is forgotten."""
        return self._core.replicas.get(replica_id)

    def __getitem__(self, replica_id: str) -> Replica:
        return self._core.replicas[replica_id]

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._core.replicas

    def phase(self, replica_id: str) -> ReplicaPhase | None:
        """The phase of a replica; None once it is forgotten."""
        replica = self.get(replica_id)
        return replica.phase if replica else None

    def any_of(self, model: str) -> bool:
        """Whether the core has a replica of that model."""
        return any(r.command.spec.name == model for r in self._core.replicas.values())

    def awake(self) -> list[str]:
        """The replicas that are not asleep, nor on their way there or back."""
        return [i for i, r in self._core.replicas.items() if r.phase not in SLEEP_PHASES]

    def loading(self) -> set[str]:
        """The sources that engines read right now, or may."""
        replicas = self._core.replicas.values()
        return {r.command.spec.source for r in replicas if r.phase in _READING}

    # ------------------------------------------------------------------ its engine

    def target(self, replica_id: str) -> Target:
        """Where the engine of a recorded replica is reached."""
        record = self._known[replica_id]
        return Target(
            replica_id=replica_id,
            base_url=places.base_url(self._host, record.port),
            health_path=record.health_path,
            control_key=record.control_key,
        )

    def controls(self, replica_id: str) -> Controls:
        """The control routes of that engine."""
        target = self.target(replica_id)
        return Controls(self._session, target.base_url, target.control_key)

    def ready_engines(self, model: str) -> list[Controls]:
        """The control routes of a model's engines that serve."""
        return [
            self.controls(i)
            for i, r in self._core.replicas.items()
            if r.command.spec.name == model and r.phase == "ready" and i in self._known
        ]

    # ------------------------------------------------------------------ its record

    def record(self, replica_id: str) -> Record | None:
        """What is written down of a replica; None where nothing is."""
        return self._known.get(replica_id)

    def is_shell(self, replica_id: str) -> bool:
        """Whether other engines may be pointed at a replica's model, or its own at another."""
        record = self._known.get(replica_id)
        return record is not None and record.shell_key is not None

    def canary(self, replica_id: str) -> WakeCanary | None:
        """The answer that a wake is compared with; None if it was not asked for yet."""
        record = self._known.get(replica_id)
        return record.canary if record else None

    def keep_canary(self, replica_id: str, canary: WakeCanary) -> None:
        """Remember that answer, across restarts of the agent too."""
        self.save(replica_id, canary=canary)

    def save(self, replica_id: str, **fields: object) -> None:
        """Write down the core's state of a replica, and `fields` of its record."""
        if replica_id not in self:
            return
        saved = self._core.saved(replica_id)
        known = self._known.get(replica_id) or Record(saved=saved)
        record = msgspec.structs.replace(known, saved=saved, **fields)
        self._known[replica_id] = record
        self._records.save(record)

    def take_over(self, records: Iterable[Record]) -> None:
        """Know the replicas that an earlier agent wrote down."""
        self._known.update((r.saved.command.replica_id, r) for r in records)

    def forget(self, replica_id: str) -> Record | None:
        """Remove the record of a replica that is over; what it was."""
        record = self._known.pop(replica_id, None)
        self._records.forget(replica_id)
        return record
