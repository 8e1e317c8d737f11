"""What the router counts, for Prometheus.

Rules this file keeps:
- only the names of known models become label values, so that callers cannot grow the number of
  series;
- a request costs a few additions here: the library's locks and label look-ups cost ten times as
  much, so its metrics are made from the counts when they are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from runtime.router.gate import Gate

UNKNOWN = "_unknown"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class _Durations:
    """Counts by upper bound in seconds."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total_s += seconds


class Metrics(Collector):
    """One router's counters; `status` 499 is a caller that hung up."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._ended: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._held: defaultdict[str, _Durations] = defaultdict(_Durations)
        self._ttft: defaultdict[str, _Durations] = defaultdict(_Durations)
        self.connections = 0  # open ones, kept by the front
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ended(self, model: str, status: int) -> None:
        """A request for `model` (as the caller wrote it) ended with this HTTP status."""
        self._ended[self._label(model), status] += 1

    def held(self, model: str, seconds: float) -> None:
        """A held request's wait is over."""
        self._held[self._label(model)].add(seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        """A body has begun, this long after the request arrived."""
        self._ttft[self._label(model)].add(seconds)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the library asks for at each scrape."""
        ended = CounterMetricFamily(
            "stoker_router_requests", "Requests ended, by HTTP status", labels=["model", "status"]
        )
        for (model, status), count in self._ended.items():
            ended.add_metric([model, str(status)], count)
        waiting = GaugeMetricFamily(
            "stoker_router_queue_depth", "Requests that wait for their model", labels=["model"]
        )
        in_flight = GaugeMetricFamily(
            "stoker_router_in_flight", "Requests sent to a replica", labels=["model"]
        )
        for demand in self._gate.demand()[0]:
            waiting.add_metric([demand.model], demand.waiting)
            in_flight.add_metric([demand.model], demand.in_flight)
        connections = GaugeMetricFamily(
            "stoker_router_connections", "Open client connections", value=self.connections
        )
        hold = _histogram("stoker_router_hold_seconds", "How long held requests waited", self._held)
        ttft = _histogram(
            "stoker_router_ttft_seconds", "Arrival to the first byte of a body", self._ttft
        )
        return ended, waiting, in_flight, connections, hold, ttft, *self._by_route()

    def _by_route(self) -> Iterable[Metric]:
        labels = ["route", "model"]
        requests = CounterMetricFamily(
            "stoker_router_route_requests", "Requests ended, by route and model", labels=labels
        )
        errors = CounterMetricFamily(
            "stoker_router_route_errors", "Of these, 5xx or broken off", labels=labels
        )
        for part in self._gate.versions.counts():
            requests.add_metric([part.route, part.model], part.requests)
            errors.add_metric([part.route, part.model], part.errors)
        dropped = CounterMetricFamily(
            "stoker_router_mirrors_dropped", "Copies not made, too many were under way",
            labels=["route"],
        )  # fmt: skip
        for route, count in self._gate.versions.mirrors_dropped.items():
            dropped.add_metric([route], count)
        return requests, errors, dropped

    def _label(self, model: str) -> str:
        route = self._gate.find(model)
        return route.name if route else UNKNOWN


def _histogram(name: str, help_: str, models: dict[str, _Durations]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, help_, labels=["model"])
    bounds = [*map(str, map(float, _SECONDS)), "+Inf"]
    for model, durations in models.items():
        buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
        family.add_metric([model], buckets=buckets, sum_value=durations.total_s)
    return family
