"""What a node can place models on: NVIDIA GPUs, the host's RAM, or declared (simulated) devices.

Rules this file keeps:
- figures are measured, never guessed; one that a device does not give is None;
- a simulated device is only ever there because someone declared it, and says so in its kind;
- nothing here decides: it reads, and the scheduler judges.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import psutil

from agent.devices.nvml import NvmlSource, NvmlUnavailable
from runtime.contract.schema import parse_bytes
from runtime.wire.agent_messages import DeviceKind, DeviceReport

log = logging.getLogger("stoker.agent")

# The share of the host's RAM that engines may have when no size is declared: the rest is for the
# operating system, the agent, and the page cache that weights are loaded through.
HOST_SHARE = 0.8
SETTINGS = "auto | nvml | cpu | cpu:SIZE | simulated:COUNTxSIZE, e.g. simulated:2x24GiB"
_CGROUP = Path("/sys/fs/cgroup")


class DeviceSource(Protocol):
    """Every device of this node. Calls block (milliseconds); one at a time."""

    kind: DeviceKind

    def read(self, pids: Mapping[str, Collection[int]]) -> list[DeviceReport]:
        """One report a device, now. `pids`: replica_id -> the pids of its live processes."""
        ...

    def replica_bytes(self) -> dict[str, int]:
        """Measured bytes of each replica at the last read, summed over its devices.

        A replica that could not be measured is absent.
        """
        ...

    def close(self) -> None:
        """Give back what was opened. Idempotent."""
        ...


def open_devices(setting: str, node_id: str) -> DeviceSource:
    """The devices that `[agent] devices = setting` means.

    `auto` is the GPUs that NVML finds, else the host's RAM; it is never simulated. Raises
    ValueError that names the setting, what is wrong and what to write.
    """
    kind, colon, size = setting.strip().partition(":")
    if kind == "simulated" and colon:
        return _simulated(setting, size, node_id)
    if kind == "cpu":
        declared = _size(setting, size) if colon else None
        limit_bytes, _ = host_memory()
        if declared is not None and declared > limit_bytes:
            raise ValueError(
                f"agent.devices = {setting!r} is more than this host (or its cgroup) has,"
                f" {limit_bytes / 2**30:.1f} GiB; declare less, or leave the size out"
            )
        return CpuSource(node_id, declared)
    if setting.strip() == "nvml":
        try:
            return NvmlSource()
        except NvmlUnavailable as error:
            fix = "install the NVIDIA driver, or write devices = 'auto' or 'cpu'"
            raise ValueError(f"agent.devices = 'nvml': {error}; {fix}") from None
    if setting.strip() == "auto":
        return _auto(node_id)
    raise ValueError(f"agent.devices = {setting!r} is not known; write {SETTINGS}")


def _auto(node_id: str) -> DeviceSource:
    try:
        return NvmlSource()
    except NvmlUnavailable as error:
        if not error.missing:  # a GPU host whose driver is broken must not turn CPU unnoticed
            log.warning("devices = 'auto': %s; this node offers its RAM instead", error)
        return CpuSource(node_id, None)


def _size(setting: str, text: str) -> int:
    try:
        size_bytes = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"agent.devices = {setting!r}: {error}") from None
    if size_bytes <= 0:
        raise ValueError(f"agent.devices = {setting!r}: the size must be more than 0")
    return size_bytes


def _simulated(setting: str, text: str, node_id: str) -> SimulatedSource:
    found = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(.+)", text)
    if not found or int(found[1]) == 0:
        raise ValueError(
            f"agent.devices = {setting!r}: write simulated:COUNTxSIZE, COUNT 1 or more"
        )
    return SimulatedSource(node_id, int(found[1]), _size(setting, found[2]))


class SimulatedSource:
    """Declared devices that do not exist.

    Nothing can be measured on them, so used and foreign bytes are 0 and no replica has bytes: the
    scheduler's bookings are all there is.
    """

    kind: DeviceKind = "simulated"

    def __init__(self, node_id: str, count: int, size_bytes: int) -> None:
        self._reports = [
            DeviceReport(
                device_id=f"simulated:{node_id}:{index}",
                index=index,
                kind="simulated",
                name="simulated device",
                memory_total_bytes=size_bytes,
                memory_used_bytes=0,
            )
            for index in range(count)
        ]

    def read(self, pids: Mapping[str, Collection[int]]) -> list[DeviceReport]:
        """The declared devices, always alike."""
        return list(self._reports)

    def replica_bytes(self) -> dict[str, int]:
        """Nothing: there is nothing to measure."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""


class CpuSource:
    """The RAM of this host as one device.

    With a declared size, that much RAM is Stoker's alone: used is what our replicas take, and
    nothing is foreign. Without one, the device is HOST_SHARE of the RAM (of the cgroup's limit
    where that is less), and what others use beyond the rest is foreign.
    """

    kind: DeviceKind = "cpu"

    def __init__(self, node_id: str, size_bytes: int | None) -> None:
        limit_bytes, _ = host_memory()
        self._declared = size_bytes is not None
        self._total_bytes = size_bytes or int(limit_bytes * HOST_SHARE)
        self._device_id = f"cpu:{node_id}"
        self._name = _cpu_name()
        self._replica_bytes: dict[str, int] = {}
        self._ticks = _cpu_ticks()

    def read(self, pids: Mapping[str, Collection[int]]) -> list[DeviceReport]:
        """One report. Utilization is of all cores since the last read; None if no time passed."""
        self._replica_bytes = {
            replica_id: sum(process_bytes(pid) for pid in group)
            for replica_id, group in pids.items()
        }
        ours = sum(self._replica_bytes.values())
        foreign = 0 if self._declared else self._foreign_bytes(ours)
        return [
            DeviceReport(
                device_id=self._device_id,
                index=0,
                kind="cpu",
                name=self._name,
                memory_total_bytes=self._total_bytes,
                memory_used_bytes=ours + foreign,
                foreign_bytes=foreign,
                utilization=self._utilization(),
            )
        ]

    def replica_bytes(self) -> dict[str, int]:
        """PSS of each replica's processes at the last read."""
        return dict(self._replica_bytes)

    def close(self) -> None:
        """Nothing to give back."""

    def _foreign_bytes(self, ours_bytes: int) -> int:
        limit_bytes, used_bytes = host_memory()
        spare_bytes = limit_bytes - self._total_bytes
        return max(0, used_bytes - ours_bytes - spare_bytes)

    def _utilization(self) -> float | None:
        (busy_before, all_before), self._ticks = self._ticks, _cpu_ticks()
        passed = self._ticks[1] - all_before
        if passed <= 0:
            return None
        return min(1.0, max(0.0, (self._ticks[0] - busy_before) / passed))


def host_memory() -> tuple[int, int]:
    """(limit, used) in bytes of what this process may use: its cgroup's, else the host's."""
    host = psutil.virtual_memory()
    limit_bytes, used_bytes = host.total, host.total - host.available
    for folder in _cgroup_folders():
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= limit_bytes:
            continue
        current = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        # page cache that is not in use goes when memory is needed, so it is not "used"
        cache = _stat(folder, "inactive_file") or _stat(folder, "total_inactive_file")
        limit_bytes, used_bytes = limit, max(0, (current or 0) - cache)
    return limit_bytes, used_bytes


def _cgroup_folders() -> list[Path]:
    """The folders of this process's memory cgroup, v2 or v1, from its own up to the root."""
    folders: list[Path] = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUP / "memory" if controllers else _CGROUP
        own = root / path.lstrip("/")
        folders += [own, *(p for p in own.parents if p.is_relative_to(root))]
    return folders


def process_bytes(pid: int) -> int:
    """Proportional set size: pages shared with siblings count once. 0 for a gone process."""
    for line in _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    resident = _text(Path(f"/proc/{pid}/statm")).split()  # not ours to look into: RSS is public
    return int(resident[1]) * os.sysconf("SC_PAGE_SIZE") if resident else 0


def _cpu_ticks() -> tuple[float, float]:
    """(busy, all) CPU seconds of all cores since boot."""
    times = psutil.cpu_times()
    # guest time is already part of user time
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _cpu_name() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return "CPU"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _stat(folder: Path, key: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0
