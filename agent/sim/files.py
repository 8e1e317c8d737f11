"""The files of a simulated node: what is on its disk, and what of it is in the page cache. Pure.

Rules this file keeps:
- the disk forgets what was used longest ago, never what a start needs now;
- the page cache does likewise, within the host memory that nobody else holds; what the agent was
  told to stage stays;
- fetches share the store's rate, reads the disk's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from runtime.sim.loop import Loop
from runtime.sim.pipe import Pipe, Transfer
from runtime.sim.profile import Host
from runtime.wire.agent_messages import CachedModel


class Files:
    """`host_held` tells the bytes of host memory that are not to be had for the page cache,
    `needed` the sources that must stay on the disk."""

    def __init__(
        self,
        loop: Loop,
        host: Host,
        host_held: Callable[[], int],
        needed: Callable[[], set[str]],
    ) -> None:
        self.disk: dict[str, int] = {}  # source -> bytes, used longest ago first
        self.resident: dict[str, int] = {}  # likewise
        self.staged: dict[str, int] = {}  # told to hold
        self.disk_pipe = Pipe(loop, host.disk_rate)
        self.store_pipe = Pipe(loop, host.store_rate)
        self._loop = loop
        self._host = host
        self._host_held = host_held
        self._needed = needed
        self._reading: dict[str, Transfer] = {}
        self._pulls: dict[str, tuple[Transfer, list[Callable[[], object]]]] = {}
        self._told: tuple[CachedModel, ...] | None = None  # None: something changed

    def rung(self, source: str) -> str:
        """Where a start would find the weights: staged, cached or remote."""
        if source not in self.disk:
            return "remote"
        return "staged" if source in self.resident else "cached"

    def cached(self) -> tuple[CachedModel, ...]:
        """As heartbeats tell it."""
        if self._told is None:
            self._told = tuple(
                CachedModel(
                    source=source, disk_bytes=size, resident_bytes=self.resident.get(source, 0)
                )
                for source, size in self.disk.items()
            )
        return self._told

    def add(self, source: str, size: int) -> None:
        """Put a model on the disk."""
        self._told = None
        self.disk.pop(source, None)
        self.disk[source] = size
        over = sum(self.disk.values()) - self._host.disk_bytes
        if over <= 0:
            return
        needed = self._needed()
        for name in [n for n in self.disk if n != source and n not in needed]:
            if over <= 0:
                break
            over -= self.disk.pop(name)
            self.resident.pop(name, None)

    def fetch(self, source: str, size: int, done: Callable[[], object]) -> None:
        """Pull it from the store if it is not on the disk, then call `done`.

        One pull a model, whoever waits for it; it goes on if they do not any more
        (agent/cache/model_cache.py).
        """
        if source in self.disk:
            self.add(source, size)
            done()
        elif source in self._pulls:
            self._pulls[source][1].append(done)
        else:
            pull = self.store_pipe.send(size, lambda: self._pulled(source, size))
            self._pulls[source] = (pull, [done])

    def _pulled(self, source: str, size: int) -> None:
        _, waiting = self._pulls.pop(source)
        self.add(source, size)
        self.touch(source, size)  # what was just written is in the page cache
        for done in waiting:
            done()

    def read(
        self, source: str, size: int, done: Callable[[], object]
    ) -> tuple[Pipe, Transfer] | None:
        """Bring its weights into the page cache, then call `done`; None: they are there."""
        if source in self.resident:
            self.touch(source, size)
            done()
            return None

        def was_read() -> None:
            self.touch(source, size)
            done()

        return self.disk_pipe, self.disk_pipe.send(size, was_read)

    def touch(self, source: str, size: int) -> None:
        """Note that a model's weights were read just now."""
        self._told = None
        self.resident.pop(source, None)
        self.resident[source] = size
        self.shrink()

    def shrink(self) -> None:
        """Give back what others took."""
        over = sum(self.resident.values()) - (self._host.memory_bytes - self._host_held())
        for name in list(self.resident):
            if over <= 0:
                break
            if name not in self.staged:
                over -= self.resident.pop(name)
                self._told = None

    def stage(self, wish: Iterable[tuple[str, int]], changed: Callable[[], object]) -> None:
        """Hold these, and no others; `changed` is called when one has been read."""
        self.staged = dict(wish)
        for name in [n for n in self._reading if n not in self.staged]:
            self.disk_pipe.cancel(self._reading.pop(name))
        for source, size in self.staged.items():
            if source in self.disk and source not in self.resident and source not in self._reading:
                self._reading[source] = self.disk_pipe.send(size, self._staged(source, changed))
        self.shrink()

    def staged_bytes(self) -> int:
        """Host memory that staging holds now."""
        return sum(self.resident.get(name, 0) for name in self.staged)

    def yield_staged(self, over: int) -> None:
        """The kernel needs `over` bytes: staged weights go like any clean page."""
        if over > 0:
            self._told = None
        for name in list(self.staged):
            if over <= 0:
                return
            over -= self.resident.pop(name, 0)

    def reboot(self) -> None:
        """The page cache is empty."""
        for transfer in self._reading.values():
            self.disk_pipe.cancel(transfer)
        for pull, _ in self._pulls.values():
            self.store_pipe.cancel(pull)
        self._pulls = {}
        self._reading, self.resident, self.staged = {}, {}, {}
        self._told = None

    def _staged(self, source: str, changed: Callable[[], object]) -> Callable[[], None]:
        def was_read() -> None:
            self._reading.pop(source, None)
            if source in self.staged and source in self.disk:
                self.touch(source, self.staged[source])
                changed()

        return was_read
