"""The footprint ledger: what each model was *measured* to take and how long each step took. Pure.

One entry per (model, launch key, engine version, device kind): a changed argument, an upgraded
engine or another kind of device starts a new one.

Rules this file keeps: only measurements enter; the last KEPT samples of each step are kept, so
that an entry follows a host that became slower or faster.
"""

from __future__ import annotations

import math
import re

from msgspec import Struct
from msgspec.structs import replace

from runtime.wire.agent_messages import ReplicaReport

KEPT = 32


class Key(Struct, frozen=True):
    """What a footprint belongs to."""

    model: str
    launch_key: str
    engine: str
    engine_version: str
    device_kind: str

    def path(self) -> str:
        """The entry's place below `<prefix>/footprints/` in the registry."""
        version = re.sub(r"[^A-Za-z0-9.+-]", "_", self.engine_version)  # an agent's word
        return f"{self.model}/{self.launch_key}-{self.engine}-{version}-{self.device_kind}"


class Times(Struct, frozen=True, kw_only=True):
    """The seconds of one step, over its last KEPT times."""

    samples: tuple[float, ...] = ()

    @property
    def last_s(self) -> float:
        """The newest sample."""
        return self.samples[-1]

    def percentile_s(self, share: float) -> float:
        """Nearest rank: of (1, 2, 3, 4), share 0.5 gives 2 and share 0.95 gives 4."""
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def plus(self, seconds: float) -> Times:
        """A copy with one more sample; the oldest goes where there are KEPT already."""
        return Times(samples=(*self.samples, round(seconds, 4))[-KEPT:])


class Footprint(Struct, frozen=True, kw_only=True):
    """One ledger entry. Bytes are per device where they are of a device; the largest seen."""

    key: Key
    device_bytes: int | None = None  # while hot
    residue_bytes: int | None = None  # while asleep
    host_bytes: int | None = None  # of its processes while hot
    host_asleep_bytes: int | None = None  # while asleep: offloaded weights included
    times: dict[str, Times] = {}  # "start-cached", "wake-1", "wake-1.canary", …

    def with_times(self, step: str, total_s: float, phases: dict[str, float]) -> Footprint:
        """After one more `step` that took `total_s`, split into `phases`."""
        times = dict(self.times)
        for name, seconds in {
            step: total_s,
            **{f"{step}.{p}": s for p, s in phases.items()},
        }.items():
            times[name] = times.get(name, Times()).plus(seconds)
        return replace(self, times=times)

    def with_memory(self, report: ReplicaReport) -> Footprint:
        """After a replica reported what it holds now."""
        devices = max(1, len(report.device_ids))
        used = None if report.memory_used_bytes is None else report.memory_used_bytes // devices
        if report.phase == "ready":
            return replace(
                self,
                device_bytes=_larger(self.device_bytes, used),
                host_bytes=_larger(self.host_bytes, report.host_bytes or None),
            )
        if report.phase == "asleep":
            return replace(
                self,
                residue_bytes=_larger(self.residue_bytes, report.residue_bytes),
                host_asleep_bytes=_larger(self.host_asleep_bytes, report.host_bytes or None),
            )
        return self

    def median_s(self, step: str) -> float | None:
        """The median seconds of a step; None if it was never measured."""
        times = self.times.get(step)
        return times.percentile_s(0.5) if times and times.samples else None


def _larger(old: int | None, new: int | None) -> int | None:
    if old is None or new is None:
        return new if old is None else old
    return max(old, new)
