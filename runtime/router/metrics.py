"""What the router counts, for Prometheus.

Rule this file keeps: only the names of known models become label values, so that callers cannot
grow the number of series.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from runtime.router.gate import Gate

UNKNOWN = "_unknown"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class _Queues(Collector):
    """Read from the admission when scraped, so that the hot path keeps no second count."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def collect(self) -> Iterable[GaugeMetricFamily]:
        waiting = GaugeMetricFamily(
            "stoker_router_queue_depth", "Requests that wait for their model", labels=["model"]
        )
        in_flight = GaugeMetricFamily(
            "stoker_router_in_flight", "Requests sent to a replica", labels=["model"]
        )
        for demand in self._gate.demand()[0]:
            waiting.add_metric([demand.model], demand.waiting)
            in_flight.add_metric([demand.model], demand.in_flight)
        return waiting, in_flight


class Metrics:
    """One router's counters; `status` 499 is a caller that hung up."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._registry = CollectorRegistry()
        self._registry.register(_Queues(gate))
        requests = Counter(
            "stoker_router_requests", "Requests ended, by HTTP status", ["model", "status"],
            registry=self._registry,
        )  # fmt: skip
        hold = Histogram(
            "stoker_router_hold_seconds", "How long held requests waited", ["model"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        ttft = Histogram(
            "stoker_router_ttft_seconds", "Arrival to the first byte of a body", ["model"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        # `labels()` takes longer than all else here: look each series up once.
        self._request = cache(lambda model, status: requests.labels(model, str(status)))
        self._hold = cache(hold.labels)
        self._ttft = cache(ttft.labels)

    def ended(self, model: str, status: int) -> None:
        """A request for `model` (as the caller wrote it) ended with this HTTP status."""
        self._request(self._label(model), status).inc()

    def held(self, model: str, seconds: float) -> None:
        """A held request's wait is over."""
        self._hold(self._label(model)).observe(seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        """A body has begun, this long after the request arrived."""
        self._ttft(self._label(model)).observe(seconds)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def _label(self, model: str) -> str:
        route = self._gate.find(model)
        return route.name if route else UNKNOWN
