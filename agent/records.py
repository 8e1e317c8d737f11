"""What an agent remembers across its own restart: files below <state_dir>, written whole or not.

Rules this file keeps:
- one file per replica, mode 0600, since it holds the engine's keys;
- a file that can't be read is set aside with a warning, never deleted and never fatal;
- a file that can't be written is said in the log: a full disk must not end the agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from agent.core.messages import Saved
from agent.engines.process import MainProcess
from agent.engines.wake_canary import WakeCanary
from agent.weights.load_format_policy import Known
from runtime import places
from runtime.wire.agent_messages import StartRung

log = logging.getLogger("stoker.agent")

KEPT_DISABLED = 256  # launches whose disabled rungs are remembered
KEPT_SHELLS = 1024  # launches whose canaries are

T = TypeVar("T")


class Record(Struct, frozen=True, kw_only=True):
    """One replica: what the core saved, and how to reach its engine."""

    saved: Saved
    port: int = 0
    health_path: str = "/health"
    route_key: str = ""
    control_key: str = ""
    leader: MainProcess | None = None  # None: never started
    engine_version: str | None = None
    canary: WakeCanary | None = None  # None: not asked for yet
    started_from: StartRung = "cached"
    shell_key: str | None = None  # as in ReplicaReport
    load_format: str | None = None  # that its process was started with


class KnownShell(Struct, frozen=True, kw_only=True):
    """A launch that engines may be pointed at: its shell key, and its own engine's canary."""

    shell_key: str
    canary: WakeCanary
    source: str | None  # of its weights, which must be on the disk; None: it has none


class _Disabled(Struct, frozen=True, kw_only=True):
    rungs: dict[str, dict[str, str]] = {}


class _Shells(Struct, frozen=True, kw_only=True):
    launches: dict[str, KnownShell] = {}


class _LoadFormats(Struct, frozen=True, kw_only=True):
    launches: dict[str, Known] = {}


class _Agent(Struct, frozen=True, kw_only=True):
    boot_id: int = 0
    epoch: int = 0
    host_boot: str = ""


class Records:
    """The files of one agent. Holds a lock: two agents on one state_dir would fight."""

    def __init__(self, folder: str) -> None:
        """Raises RuntimeError if another agent uses that folder; OSError if it can't be written."""
        state_dir = Path(folder)
        self._folder = state_dir / "replicas"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._agent_file = state_dir / "agent.json"
        self._disabled_file = state_dir / "disabled.json"
        self._shells_file = state_dir / "shells.json"
        self._formats_file = state_dir / "load-formats.json"
        self._lock = (state_dir / "agent.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(
                f"another agent runs with state_dir {state_dir}; stop it, or set another state_dir"
            ) from None
        earlier = _read(self._agent_file, _Agent) or _Agent()
        host_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._host_rebooted = host_boot != earlier.host_boot
        self._agent = _Agent(
            # The clock makes it grow even where the state was lost with the disk.
            boot_id=max(earlier.boot_id + 1, int(time.time())),
            epoch=earlier.epoch,
            host_boot=host_boot,
        )
        self._write(self._agent_file, self._agent)

    @property
    def boot_id(self) -> int:
        """Grows with every start."""
        return self._agent.boot_id

    @property
    def epoch(self) -> int:
        """The highest scheduler epoch seen."""
        return self._agent.epoch

    def save_epoch(self, epoch: int) -> None:
        """Remember the highest epoch."""
        self._agent = msgspec.structs.replace(self._agent, epoch=epoch)
        with _logged("the scheduler's epoch"):
            self._write(self._agent_file, self._agent)

    def disabled(self) -> dict[str, dict[str, str]]:
        """Which rungs are not used any more and why, by `replica.launch_name`."""
        return (_read(self._disabled_file, _Disabled) or _Disabled()).rungs

    def save_disabled(self, rungs: dict[str, dict[str, str]]) -> None:
        """Remember the latest of them."""
        kept = dict(list(rungs.items())[-KEPT_DISABLED:])
        with _logged("the disabled rungs"):
            self._write(self._disabled_file, _Disabled(rungs=kept))

    def shells(self) -> dict[str, KnownShell]:
        """The launches that engines may be pointed at, by `replica.launch_name`."""
        return (_read(self._shells_file, _Shells) or _Shells()).launches

    def save_shells(self, launches: dict[str, KnownShell]) -> None:
        """Remember the latest of them."""
        kept = dict(list(launches.items())[-KEPT_SHELLS:])
        with _logged("what engines may be pointed at"):
            self._write(self._shells_file, _Shells(launches=kept))

    def load_formats(self) -> dict[str, Known]:
        """How long weights took to load, by `replica.launch_name`."""
        return (_read(self._formats_file, _LoadFormats) or _LoadFormats()).launches

    def save_load_formats(self, launches: dict[str, Known]) -> None:
        """Remember how long weights took to load."""
        with _logged("the load formats"):
            self._write(self._formats_file, _LoadFormats(launches=launches))

    def load(self) -> list[Record]:
        """Every replica that was not forgotten; no process of an earlier boot of the host."""
        found = (_read(path, Record) for path in sorted(self._folder.glob("*.json")))
        records = [record for record in found if record]
        if self._host_rebooted:
            return [msgspec.structs.replace(record, leader=None) for record in records]
        return records

    def save(self, record: Record) -> None:
        """Write one replica's record."""
        replica_id = record.saved.command.replica_id
        with _logged(f"the record of {replica_id}"):
            self._write(self._file(replica_id), record)

    def forget(self, replica_id: str) -> None:
        """Remove one replica's record; an unknown one is success."""
        with _logged(f"the record of {replica_id}"):
            self._file(replica_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another agent have the state_dir."""
        self._lock.close()

    def _file(self, replica_id: str) -> Path:
        return places.below(self._folder, f"{replica_id}.json")

    @staticmethod
    def _write(path: Path, content: Struct) -> None:
        """Whole or not at all for a reader; not synced to disk, as no engine survives a crash
        of the host."""
        temporary = path.with_suffix(".tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(content))
        temporary.replace(path)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        log.warning("%s is unreadable (%s); set aside as %s.bad", path, error, path.name)
        path.replace(path.with_name(path.name + ".bad"))
        return None


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.error("%s can't be written: %s; an agent started later will not know it", what, error)
