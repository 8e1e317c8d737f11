"""NVIDIA GPUs through NVML. The only file that imports pynvml.

Rules this file keeps:
- one failing query costs one figure, never the whole report;
- a device that was there when the agent started is always reported: a lost one as unhealthy;
- memory is what may be allocated: the driver's own reserve is in neither total nor used;
- memory of our own replicas is never called foreign (see `_foreign_bytes`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from runtime.wire.agent_messages import DeviceKind, DeviceReport

T = TypeVar("T")

# XIDs after which the hardware needs a reset, a reboot or a repair before it may be trusted again.
# Not here on purpose: errors of one application (13, 31, 43, 45, 68, 109, the list that NVIDIA's
# Kubernetes device plugin ignores too) and 63, a row remapping that was recorded and waits for the
# next reset without affecting new work.
CRITICAL_XIDS: Mapping[int, str] = {
    46: "the GPU stopped processing",
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "a bad memory row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "uncorrectable memory error, contained",
    95: "uncorrectable memory error, not contained",
    119: "the GPU's system processor (GSP) does not answer",
    120: "the GPU's system processor (GSP) failed",
    140: "unrecovered ECC error",
    143: "GPU initialisation failure",
}

_LOST = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost (it fell off the bus or is not accessible)",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset before it can be used again",
}
_SWITCH = "switch"
_EVENTS_A_READ = 64  # more than any burst; a bound, so that a read always ends


class NvmlUnavailable(Exception):
    """NVML cannot be used here; the message says why. `missing`: there is no such library."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class _Gone(Exception):
    """The device no longer answers; the message says it in words."""


@dataclass
class _Memory:
    total_bytes: int = 0
    used_bytes: int = 0


@dataclass
class _Device:
    """What must be remembered of a device between two reads."""

    index: int
    device_id: str
    name: str
    handle: Any = None
    events: Any = None
    memory: _Memory | None = None
    problem: str | None = None  # why `memory` could not be read this time
    compute_capability: float | None = None
    nvlink_peers: tuple[str, ...] = ()
    foreign_alone_bytes: int = 0  # foreign bytes when no replica of ours ran last
    ecc_at_start: int | None = None
    xid: int | None = None


class NvmlSource:
    """Every GPU of this host. Not thread-safe: one `read` at a time."""

    kind: DeviceKind = "nvml"

    def __init__(self) -> None:
        """Raises NvmlUnavailable without the library, without a working driver, or without GPUs."""
        self._replica_bytes: dict[str, int] = {}
        self._devices: list[_Device] = []
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
            raise NvmlUnavailable(f"NVML does not start: {error}", missing) from None
        self._devices = [_open(index) for index in range(count)]
        if not self._devices:
            self.close()
            raise NvmlUnavailable("NVML finds no GPU on this host")
        _link(self._devices)

    def read(self, pids: Mapping[str, Collection[int]]) -> list[DeviceReport]:
        """One report a device; `pids` are the live processes of each replica."""
        ours = {pid for group in pids.values() for pid in group}
        listed = [_processes(device) for device in self._devices]
        seen = any(pid in ours for processes in listed if processes for pid in processes)
        self._replica_bytes = _replica_bytes(pids, listed)
        return [
            _report(device, processes, ours, seen)
            for device, processes in zip(self._devices, listed, strict=True)
        ]

    def replica_bytes(self) -> dict[str, int]:
        """Bytes of each replica at the last read, over all devices; unmeasured ones are absent."""
        return dict(self._replica_bytes)

    def close(self) -> None:
        """Give NVML back. Idempotent."""
        for device in self._devices:
            if device.events is not None:
                _quietly(pynvml.nvmlEventSetFree, device.events)
        self._devices = []
        _quietly(pynvml.nvmlShutdown)


def _open(index: int) -> _Device:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        device_id = pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError as error:
        # Without a handle there is no uuid; the operator must still see that a GPU is missing.
        return _Device(index, f"nvml-index-{index}", "unknown GPU", problem=_words(error))
    device = _Device(index, device_id, "GPU", handle)
    try:
        device.name = _ask(pynvml.nvmlDeviceGetName, handle) or "GPU"
        device.compute_capability = _compute_capability(handle)
        device.ecc_at_start = _ecc(handle)
        device.events = _watch(handle)
    except _Gone as error:
        device.problem = str(error)
    return device


def _watch(handle: Any) -> Any:
    """An event set of this device's own, so that an event needs no matching; None if refused."""
    events = _ask(pynvml.nvmlEventSetCreate)
    if events is None:
        return None
    try:  # for every XID that NVML knows of; no other kind of event
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:  # not supported on this GPU, or not permitted in this container
        _quietly(pynvml.nvmlEventSetFree, events)
        return None
    return events


def _compute_capability(handle: Any) -> float | None:
    """9.0 of an H100."""
    found = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return None if found is None else float(f"{found[0]}.{found[1]}")


def _link(devices: Collection[_Device]) -> None:
    """Learn which devices have an NVLink to each other, once: links do not move.

    Devices that reach an NVSwitch are all peers of each other: a host's switches are one fabric.
    """
    by_bus: dict[str | None, str] = {}
    ends: dict[str, set[str]] = {}
    for device in devices:
        if device.handle is None:
            continue
        try:
            by_bus[_bus(_ask(pynvml.nvmlDeviceGetPciInfo, device.handle))] = device.device_id
            ends[device.device_id] = set(_link_ends(device.handle))
        except _Gone as error:
            device.problem = str(error)
    switched = {device_id for device_id, found in ends.items() if _SWITCH in found}
    for device in devices:
        found = ends.get(device.device_id, set())
        peers = {by_bus[bus] for bus in found if bus in by_bus}
        peers |= switched if device.device_id in switched else set()
        device.nvlink_peers = tuple(sorted(peers - {device.device_id}))


def _link_ends(handle: Any) -> Iterator[str]:
    """The bus id at the other end of each NVLink that is up, or _SWITCH."""
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        if _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link) != pynvml.NVML_FEATURE_ENABLED:
            continue
        kind = _ask(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        end = _bus(_ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link))
        if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            yield _SWITCH
        elif end is not None:
            yield end


def _bus(info: Any) -> str | None:
    """domain:bus:device of a PCI address, as a device and a link's end both have it."""
    if info is None:
        return None
    return f"{info.domain:08x}:{info.bus:02x}:{info.device:02x}"


def _report(
    device: _Device, processes: Mapping[int, int | None] | None, ours: set[int], seen: bool
) -> DeviceReport:
    figures: dict[str, Any] = {}
    gone: str | None = None
    try:
        if device.handle is None:
            raise _Gone(device.problem or "the GPU cannot be opened")
        _read_xids(device)
        device.problem = _read_memory(device)
        figures = _figures(device.handle)
    except _Gone as error:
        gone = str(error)
    memory = device.memory or _Memory()
    reason = gone or _sickness(device, figures.get("ecc_uncorrected")) or device.problem
    return DeviceReport(
        device_id=device.device_id,
        index=device.index,
        kind="nvml",
        name=device.name,
        memory_total_bytes=memory.total_bytes,
        memory_used_bytes=memory.used_bytes,
        foreign_bytes=_foreign_bytes(device, memory.used_bytes, processes, ours, seen),
        xid=device.xid,
        compute_capability=device.compute_capability,
        nvlink_peers=device.nvlink_peers,
        healthy=reason is None,
        unhealthy_reason=reason,
        **figures,
    )


def _figures(handle: Any) -> dict[str, Any]:
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return {
        "utilization": None if rates is None else rates.gpu / 100,
        "temperature_c": _temperature(handle),
        "power_w": None if power_mw is None else power_mw / 1000,
        "ecc_uncorrected": _ecc(handle),
    }


def _temperature(handle: Any) -> float | None:
    for query in (pynvml.nvmlDeviceGetTemperatureV, pynvml.nvmlDeviceGetTemperature):
        value = _ask(query, handle, pynvml.NVML_TEMPERATURE_GPU)
        if value is not None:
            return float(value)
    return None


def _ecc(handle: Any) -> int | None:
    return _ask(
        pynvml.nvmlDeviceGetTotalEccErrors,
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )


def _read_memory(device: _Device) -> str | None:
    """Refresh `device.memory`; on failure keep the last figures and say why."""
    found = _ask(pynvml.nvmlDeviceGetMemoryInfo, device.handle, pynvml.nvmlMemory_v2)
    reserved = found.reserved if found is not None else 0
    try:
        found = found or pynvml.nvmlDeviceGetMemoryInfo(device.handle)
    except pynvml.NVMLError as error:
        return f"its memory cannot be read: {_words(error)}"
    # Drivers differ on whether `used` holds the reserve; the three figures' sum tells.
    rest = found.total - found.used - found.free
    inside = reserved if abs(rest) < abs(rest - reserved) else 0
    device.memory = _Memory(found.total - reserved, max(0, found.used - inside))
    return None


def _read_xids(device: _Device) -> None:
    if device.events is None:
        return
    for _ in range(_EVENTS_A_READ):
        event = _ask(pynvml.nvmlEventSetWait, device.events, 0)
        if event is None:  # a timeout: nothing (more) has happened
            return
        # "critical" is NVML's word for any XID; only those of our list condemn a device
        if event.eventData in CRITICAL_XIDS:
            device.xid = int(event.eventData)


def _sickness(device: _Device, ecc: int | None) -> str | None:
    if device.xid is not None:
        return f"XID {device.xid}: {CRITICAL_XIDS[device.xid]}; check the kernel log, reset the GPU"
    if ecc is not None and device.ecc_at_start is not None and ecc > device.ecc_at_start:
        grown = ecc - device.ecc_at_start
        return f"{grown} uncorrectable ECC error(s) since the agent started; reset the GPU"
    return None


def _processes(device: _Device) -> dict[int, int | None] | None:
    """Bytes by pid, None where NVML does not say how many; None if it lists no processes at all."""
    found: dict[int, int | None] | None = None
    if device.handle is None:
        return None
    for query in (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
    ):
        try:
            listed = _ask(query, device.handle)
        except _Gone:
            return None
        if listed is None:
            continue
        found = {} if found is None else found
        for process in listed:  # one that is in both lists has the same bytes in both
            found[process.pid] = process.usedGpuMemory
    return found


def _replica_bytes(
    pids: Mapping[str, Collection[int]], listed: Collection[Mapping[int, int | None] | None]
) -> dict[str, int]:
    measured: dict[str, int] = {}
    for replica_id, group in pids.items():
        figures = [p[pid] for p in listed if p is not None for pid in set(group) if pid in p]
        if figures and None not in figures:
            measured[replica_id] = sum(figure or 0 for figure in figures)
    return measured


def _foreign_bytes(
    device: _Device,
    used_bytes: int,
    processes: Mapping[int, int | None] | None,
    ours: set[int],
    seen: bool,
) -> int:
    """What is used by others: used bytes less those of our pids.

    In a container NVML may list no processes, or pids of the host that mean nothing here. Then
    nobody can tell whose the bytes are, and the figure from when no replica of ours ran last
    stands (0 if there has been none since the agent started).
    """
    if not ours:
        device.foreign_alone_bytes = used_bytes
        return used_bytes
    if processes is None or _blind(processes, ours, seen):
        return min(device.foreign_alone_bytes, used_bytes)
    return max(0, used_bytes - sum(processes.get(pid) or 0 for pid in ours))


def _blind(processes: Mapping[int, int | None], ours: set[int], seen: bool) -> bool:
    if any(processes.get(pid, 0) is None for pid in ours):
        return True
    if seen:  # one of our pids is listed on some device: NVML speaks of our pid namespace
        return False
    return not processes or any(not os.path.exists(f"/proc/{pid}") for pid in processes)


def _ask(query: Callable[..., T], *args: Any) -> T | None:
    """The answer, None if this figure is not to be had; raises _Gone for a lost device."""
    try:
        return query(*args)
    except pynvml.NVMLError as error:
        if error.value in _LOST:
            raise _Gone(_LOST[error.value]) from None
        return None


def _quietly(call: Callable[..., object], *args: Any) -> None:
    try:
        call(*args)
    except pynvml.NVMLError:
        return  # we are leaving; there is nothing to do about it


def _words(error: Any) -> str:
    return _LOST.get(error.value, f"NVML says: {error}")
