"""The engines of a simulated node, and the memory that they really hold. Pure.

Rules this file keeps:
- the truth goes to the observer as it happens: what is held, and where more is held than there is;
- a read of weights that an engine waits for ends with that engine.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.sim.engine import SimEngine
from agent.sim.files import Files
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.observer import Observer
from runtime.sim.pipe import Pipe, Transfer
from runtime.sim.timings import Timings
from runtime.wire.agent_messages import DeviceReport, StartReplica
from runtime.wire.model_spec import ModelSpec


class Memory:
    """The engines of one node, its devices' and its host's memory."""

    def __init__(
        self,
        loop: Loop,
        node_id: str,
        devices: int,
        timings: Timings,
        observer: Observer,
        changed: set[str],
    ) -> None:
        """`changed` gets the replicas whose memory changed."""
        self.engines: dict[str, SimEngine] = {}
        self.devices = _devices(node_id, devices, timings)
        self.used = dict.fromkeys(self.devices, 0)
        self.files = Files(loop, timings.host, self.host_held, self._needed)
        self._loop = loop
        self._node_id = node_id
        self._timings = timings
        self._observer = observer
        self._changed = changed
        self._reads: dict[str, list[tuple[Pipe, Transfer]]] = {}

    # -------------------------------------------------------------------- engines

    def begin(self, command: StartReplica, changed: Callable[[SimEngine], object]) -> SimEngine:
        """A new engine, which has nothing yet; `changed` as in SimEngine."""
        engine = SimEngine(self._loop, self._timings, command, changed)
        self.engines[command.replica_id] = engine
        self._reads[command.replica_id] = []
        return engine

    def is_there(self, replica_id: str, engine: SimEngine) -> bool:
        """Whether it runs, and is still that replica's engine."""
        return engine.alive and self.engines.get(replica_id) is engine

    def die(self, replica_id: str, engine: SimEngine) -> None:
        """End an engine's processes; what they hold is not free yet."""
        engine.die()
        for pipe, transfer in self._reads.pop(replica_id, ()):
            pipe.cancel(transfer)

    def end(self, replica_id: str, engine: SimEngine) -> None:
        """End an engine and free its memory."""
        self.die(replica_id, engine)
        self.hold(replica_id, engine, 0)
        engine.offloaded = 0
        self.engines.pop(replica_id, None)

    # -------------------------------------------------------------------- weights

    def read_weights(
        self, replica_id: str, engine: SimEngine, rung: str, done: Callable[[], object]
    ) -> None:
        """Read the weights onto the devices, through the page cache; both go on at once."""
        spec = engine.command.spec
        size = self._timings.of(spec).weights_bytes
        measured = self._timings.weights_s(spec, rung)
        if measured is not None:
            self.files.touch(spec.source, size)
            self._loop.after(measured, done)
            return
        copied_at = self._loop.now + self._timings.copy_s(spec)
        read = self.files.read(spec.source, size, lambda: self._loop.at(copied_at, done))
        if read is not None:
            self._reads.setdefault(replica_id, []).append(read)

    def fetch(self, spec: ModelSpec, done: Callable[[], object]) -> None:
        """Have the model's files on the disk, then call `done`."""
        self.files.fetch(spec.source, self._timings.of(spec).weights_bytes, done)

    # -------------------------------------------------------------------- bytes

    def hold(self, replica_id: str, engine: SimEngine, held: int) -> None:
        """Have an engine hold so many bytes on each of its devices from now on."""
        more = held - engine.held
        if not more:
            return
        engine.held = held
        self._changed.add(replica_id)
        command = engine.command
        for device_id in command.device_ids:
            self.used[device_id] += more
            total = self.devices[device_id].memory_total_bytes
            if self.used[device_id] > total:
                self._observer.violated(
                    f"{device_id} really holds {self.used[device_id]} of"
                    f" {total} bytes, {replica_id} the last"
                )
        self._observer.memory_changed(
            self._node_id, replica_id, command.spec.name, command.device_ids, held
        )

    def offload(self, engine: SimEngine) -> None:
        """Move an engine's weights to host memory."""
        engine.offloaded = self._timings.of(engine.command.spec).weights_bytes
        self.check_host()

    def host_held(self) -> int:
        """Host memory that processes and their offloaded weights hold."""
        return sum(p.PROCESS_BYTES + e.offloaded for e in self.engines.values())

    def host_budget(self) -> int:
        """Host memory for sleepers and staged weights."""
        host = self._timings.host
        return int(host.memory_bytes * host.budget_share)

    def check_host(self) -> None:
        """Sleepers fit into the budget, and staged weights give way to them."""
        budget = self.host_budget()
        sleepers = sum(e.offloaded for e in self.engines.values())
        if sleepers > budget:
            self._observer.violated(
                f"{self._node_id} holds {sleepers} bytes of sleepers, its budget is {budget}"
            )
        # A stage command that was lost or is still on its way: the kernel takes clean pages back.
        self.files.yield_staged(sleepers + self.files.staged_bytes() - budget)
        self.files.shrink()

    def _needed(self) -> set[str]:
        """Sources whose files an engine here may read."""
        return {e.command.spec.source for e in self.engines.values()}


def _devices(node_id: str, count: int, timings: Timings) -> dict[str, DeviceReport]:
    names = [f"{node_id}-gpu{i}" for i in range(count)]
    return {
        name: DeviceReport(
            device_id=name, index=i, kind="nvml", name=timings.gpu.name,
            memory_total_bytes=timings.gpu.memory_bytes, memory_used_bytes=0,
            compute_capability=timings.gpu.compute_capability,
            nvlink_peers=tuple(peer for peer in names if peer != name),
        )
        for i, name in enumerate(names)
    }  # fmt: skip
