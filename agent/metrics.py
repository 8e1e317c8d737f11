"""What a node agent exports to Prometheus."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.wire.agent_messages import DeviceReport, ReplicaPhase

_RUNG_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_START_BUCKETS_S = (0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960)


class Metrics:
    """Counters are counted as things happen; gauges are set when asked for."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self.starts = Counter(
            "stoker_agent_starts",
            "engine processes started: forked from the launcher, or plain and why",
            ["model", "how", "why"],
            registry=self._all,
        )
        self.exits = Counter(
            "stoker_agent_exits",
            "engine processes that died unasked, by kind",
            ["model", "kind"],
            registry=self._all,
        )
        self.start_s = Histogram(
            "stoker_agent_start_seconds",
            "from process start to ready",
            ["model"],
            buckets=_START_BUCKETS_S,
            registry=self._all,
        )
        self.compile_caches = Counter(
            "stoker_agent_compile_caches",
            "compiled code of starts: fetched from the shared store, present, pushed, refused or"
            " failed",
            ["what"],
            registry=self._all,
        )
        self.load_formats = Counter(
            "stoker_agent_load_formats",
            "starts by the format their weights were loaded with, and why that one",
            ["model", "format", "why"],
            registry=self._all,
        )
        self.launchers = Gauge(
            "stoker_agent_launchers", "pre-imported parents that can fork", registry=self._all
        )
        self.snapshots = Gauge(
            "stoker_agent_snapshots",
            "1 where this host has all that process images need; the log says what is missing",
            registry=self._all,
        )
        self.launcher_bytes = Gauge(
            "stoker_agent_launcher_bytes",
            "host memory of the pre-imported parents, shared pages by share",
            registry=self._all,
        )
        self.host_budget_bytes = Gauge(
            "stoker_agent_host_budget_bytes",
            "host memory that may be booked for sleeping engines and staged weights",
            registry=self._all,
        )
        self._rung_changes = Counter(
            "stoker_agent_rung_changes",
            "sleeps and wakes of engines, by level; ok is 1 or 0",
            ["model", "change", "level", "ok"],
            registry=self._all,
        )
        self._rung_change_s = Histogram(
            "stoker_agent_rung_change_seconds",
            "how long a sleep (until its memory was seen free) or a wake (canary included) took",
            ["model", "change", "level"],
            buckets=_RUNG_BUCKETS_S,
            registry=self._all,
        )
        self.staged_read_bytes = Counter(
            "stoker_agent_staged_read_bytes",
            "weights read into the page cache ahead of a start",
            registry=self._all,
        )
        self._staged_bytes = Gauge(
            "stoker_agent_staged_bytes",
            "weights to be held in the page cache: booked, and resident",
            ["what"],
            registry=self._all,
        )
        self._replicas = Gauge(
            "stoker_agent_replicas", "replicas by phase", ["phase"], registry=self._all
        )
        self._used = Gauge(
            "stoker_agent_device_memory_used_bytes", "in use", ["device"], registry=self._all
        )
        self._total = Gauge(
            "stoker_agent_device_memory_total_bytes", "in all", ["device"], registry=self._all
        )
        self._healthy = Gauge(
            "stoker_agent_device_healthy", "1 or 0", ["device"], registry=self._all
        )

    def rung_changed(self, model: str, change: str, level: int, ok: bool, took_s: float) -> None:
        """A "sleep" or "wake" is over."""
        self._rung_changes.labels(model, change, level, int(ok)).inc()
        if ok:
            self._rung_change_s.labels(model, change, level).observe(took_s)

    def staged(self, booked_bytes: int, resident_bytes: int) -> None:
        """What the scheduler wishes to be held, and what is there of it."""
        self._staged_bytes.labels("booked").set(booked_bytes)
        self._staged_bytes.labels("resident").set(resident_bytes)

    def render(self, devices: Iterable[DeviceReport], phases: Sequence[ReplicaPhase]) -> bytes:
        """The exposition text; `phases` has one entry a replica."""
        for phase in typing.get_args(ReplicaPhase):
            self._replicas.labels(phase).set(phases.count(phase))
        for device in devices:
            self._used.labels(device.device_id).set(device.memory_used_bytes)
            self._total.labels(device.device_id).set(device.memory_total_bytes)
            self._healthy.labels(device.device_id).set(device.healthy)
        return generate_latest(self._all)
