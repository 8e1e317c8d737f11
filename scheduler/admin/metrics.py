"""Prometheus metrics of the scheduler, read from the state when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.driver import Driver
from scheduler.policy.eviction import standing
from scheduler.state.learning import mismatch
from scheduler.state.messages import ColdStart


class ColdStartTimes:
    """Histograms of cold starts and wakes, by the rung they climbed from."""

    BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)

    def __init__(self, registry: CollectorRegistry) -> None:
        self._total = Histogram(
            "stoker_cold_start_seconds", "from the oldest request's arrival to ready",
            ["rung", "outcome"], buckets=self.BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._phases = Histogram(
            "stoker_cold_start_phase_seconds", "the same, by phase", ["rung", "phase"],
            buckets=self.BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._mismatches = prometheus_client.Counter(
            "stoker_cold_start_mismatches",
            "post-mortems whose phases do not add up to their total: a fault of the scheduler",
            registry=registry,
        )

    def observe(self, record: ColdStart) -> None:
        """Count one cold start or wake."""
        self._total.labels(record.rung, record.outcome).observe(record.total_s)
        if mismatch(record) is not None:
            self._mismatches.inc()
        for phase, seconds in (record.phases | record.after).items():
            self._phases.labels(record.rung, phase).observe(seconds)


class StateCollector(Collector):
    """Nothing is counted twice: every gauge is the state itself."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def collect(self) -> Iterator[Metric]:
        """Read all figures from the state."""
        state = self.driver.core.state
        yield GaugeMetricFamily(
            "stoker_scheduler_leader", "1 where this scheduler leads", int(self.driver.leads)
        )
        replicas = GaugeMetricFamily(
            "stoker_replicas", "replicas by model and stage", labels=["model", "stage"]
        )
        for (model, stage), count in Counter(
            (r.model, r.stage.value) for r in state.replicas.values()
        ).items():
            replicas.add_metric([model, stage], count)
        yield replicas
        waiting = GaugeMetricFamily("stoker_waiting", "requests held", labels=["model"])
        flying = GaugeMetricFamily("stoker_in_flight", "requests in flight", labels=["model"])
        for name in state.models:
            demand = state.demand(name)
            waiting.add_metric([name], demand.waiting)
            flying.add_metric([name], demand.in_flight)
        yield waiting
        yield flying
        yield from self._fairness()
        yield from self._prewarms()
        yield from self._devices()
        decisions = CounterMetricFamily("stoker_decisions", "decisions made", labels=["action"])
        for action, count in self.driver.decided.items():
            decisions.add_metric([action], count)
        yield decisions

    def _fairness(self) -> Iterator[Metric]:
        """A model that starves shows as an old request and a standing far above its priority."""
        state = self.driver.core.state
        oldest = GaugeMetricFamily(
            "stoker_oldest_wait_seconds", "of the requests held for a model", labels=["model"]
        )
        standings = GaugeMetricFamily(
            "stoker_model_standing", "priority, raised by waiting", labels=["model"]
        )
        wanted = GaugeMetricFamily(
            "stoker_wanted_replicas", "replicas as last decided", labels=["model"]
        )
        for name, model in state.models.items():
            oldest.add_metric([name], state.demand(name).oldest_wait_s)
            standings.add_metric([name], standing(state, model))
            wanted.add_metric([name], model.wanted)
        yield from (oldest, standings, wanted)

    def _prewarms(self) -> Iterator[Metric]:
        tally = self.driver.core.state.prewarms
        counts = CounterMetricFamily(
            "stoker_prewarms", "replicas warmed ahead of a call that was expected",
            labels=["outcome"],
        )  # fmt: skip
        counts.add_metric(["hit"], tally.hits)
        counts.add_metric(["miss"], tally.misses)
        yield counts
        yield CounterMetricFamily(
            "stoker_prewarm_wasted_byte_seconds", "device memory held for calls that did not come",
            tally.wasted_byte_s,
        )  # fmt: skip

    def _devices(self) -> Iterator[Metric]:
        state = self.driver.core.state
        labels = ["node", "device"]
        families = {
            name: GaugeMetricFamily(f"stoker_device_memory_{name}_bytes", text, labels=labels)
            for name, text in (
                ("total", "memory of the device"),
                ("booked", "memory booked by replicas"),
            )
        }
        used = GaugeMetricFamily(
            "llm_gpu_memory_bytes", "memory in use, by anyone", labels=["node", "gpu"]
        )
        sick = GaugeMetricFamily(
            "stoker_device_quarantined", "1 while a device is set aside", labels=labels
        )
        up = GaugeMetricFamily("stoker_node_up", "1 while the node reports", labels=["node"])
        for node in state.nodes.values():
            up.add_metric([node.node_id], int(node.live))
            for device_id, device in node.devices.items():
                where = [node.node_id, device_id]
                families["total"].add_metric(where, device.memory_total_bytes)
                used.add_metric(where, device.memory_used_bytes)
                families["booked"].add_metric(where, node.committed(device_id))
                sick.add_metric(where, int(device_id in node.quarantine))
        yield up
        yield sick
        yield used
        yield from families.values()
