"""What the router counts, for Prometheus.

Rules this file keeps:
- only the names and versions of known models become label values, so that callers cannot grow the
  number of series; never a tenant or a key;
- a request costs a few additions here: the library's locks and label look-ups cost ten times as
  much, so its metrics are made from the counts when they are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from runtime.router.admission.gate import Gate
from runtime.router.call.outcome import Outcome

UNKNOWN = "_unknown"
_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class _Durations:
    """Counts by upper bound in seconds."""

    __slots__ = ("bounds", "counts", "total_s")

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds


class _Series:
    """What is counted of one version of a model."""

    __slots__ = ("estimated", "generated", "held", "latency", "prompt", "requests", "token", "ttft")

    def __init__(self) -> None:
        self.requests: defaultdict[int, int] = defaultdict(int)  # by status
        self.latency = _Durations()
        self.ttft = _Durations()
        self.token = _Durations(_TOKEN_SECONDS)
        self.held: defaultdict[str, _Durations] = defaultdict(_Durations)  # by rung
        self.prompt = self.generated = self.estimated = 0

    def add(self, outcome: Outcome) -> None:
        """Count one call."""
        self.requests[outcome.status] += 1
        total_s, ttft_s, usage = outcome.total_s, outcome.ttft_s, outcome.usage
        self.latency.add(total_s)
        if outcome.held_s:
            self.held[outcome.rung].add(outcome.held_s)
        if ttft_s is None:
            return
        self.ttft.add(ttft_s)
        if usage.streamed and usage.completion_tokens is not None and usage.completion_tokens > 1:
            self.token.add((total_s - ttft_s) / (usage.completion_tokens - 1))
        if usage.prompt_tokens is not None:
            self.prompt += usage.prompt_tokens
        if usage.completion_tokens is not None:
            self.generated += usage.completion_tokens
            if not usage.exact:
                self.estimated += usage.completion_tokens


class Looks(Protocol):
    """How often a model's answers were looked for among the kept ones."""

    hits: int
    misses: int


class KeptAnswers(Protocol):
    """What the cache of answers says of itself."""

    evicted: int
    size_bytes: int

    @property
    def counts(self) -> Mapping[str, Looks]:
        """By model."""


class RouterMetrics(Collector):
    """One router's counters; `status` 499 is a caller that hung up."""

    def __init__(self, gate: Gate, cache: KeptAnswers) -> None:
        self._gate = gate
        self._cache = cache
        self._series: defaultdict[tuple[str, str], _Series] = defaultdict(_Series)
        self.hedged: Counter[tuple[str, str]] = Counter()  # by model and result
        self.connections = 0  # open ones, kept by the front
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ended(self, outcome: Outcome) -> None:
        """A call is over."""
        self._series[outcome.model or UNKNOWN, outcome.call.version].add(outcome)

    def include(self, collector: Collector) -> None:
        """Show another's figures too."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the library asks for at each scrape."""
        yield from self._now()
        yield from self._counters()
        yield from self._kept()
        yield from self._histograms()
        yield from self._by_route()

    def _now(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily(
            "llm_queue_depth", "Requests that wait for their model", labels=["model"]
        )
        in_flight = GaugeMetricFamily(
            "stoker_router_in_flight", "Requests sent to a replica", labels=["model"]
        )
        for demand in self._gate.demand()[0]:
            waiting.add_metric([demand.model], demand.waiting)
            in_flight.add_metric([demand.model], demand.in_flight)
        yield waiting
        yield in_flight
        yield GaugeMetricFamily(
            "stoker_router_connections", "Open client connections", value=self.connections
        )

    def _counters(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        requests = CounterMetricFamily(
            "llm_inference_requests", "Requests ended, by HTTP status", labels=[*labels, "status"]
        )
        generated = CounterMetricFamily(
            "llm_tokens_generated", "Completion tokens, by the engines' word", labels=labels
        )
        estimated = CounterMetricFamily(
            "llm_tokens_estimated", "Those of them counted as events of a stream", labels=labels
        )
        prompt = CounterMetricFamily(
            "llm_prompt_tokens", "Prompt tokens, where the engine told", labels=labels
        )
        for label, series in self._series.items():
            for status, count in series.requests.items():
                requests.add_metric([*label, str(status)], count)
            generated.add_metric(label, series.generated)
            estimated.add_metric(label, series.estimated)
            prompt.add_metric(label, series.prompt)
        yield from (requests, generated, estimated, prompt)

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
        yield from (requests, errors, dropped)

    def _kept(self) -> Iterable[Metric]:
        asked = CounterMetricFamily(
            "llm_response_cache_requests", "Requests that a kept answer could have served",
            labels=["model", "result"],
        )  # fmt: skip
        for model, counts in self._cache.counts.items():
            asked.add_metric([model, "hit"], counts.hits)
            asked.add_metric([model, "miss"], counts.misses)
        yield asked
        hedged = CounterMetricFamily(
            "stoker_router_hedged_requests", "Requests sent to a second replica too",
            labels=["model", "result"],
        )  # fmt: skip
        for labels, count in self.hedged.items():
            hedged.add_metric(labels, count)
        yield hedged
        yield CounterMetricFamily(
            "llm_response_cache_evicted", "Answers that made room", value=self._cache.evicted
        )
        yield GaugeMetricFamily(
            "llm_response_cache_bytes", "Memory of kept answers", value=self._cache.size_bytes
        )

    def _histograms(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        latency = HistogramMetricFamily(
            "llm_inference_latency_seconds", "Arrival to the end of the answer", labels=labels
        )
        ttft = HistogramMetricFamily(
            "llm_time_to_first_token_seconds", "Arrival to the first byte of a body", labels=labels
        )
        token = HistogramMetricFamily(
            "llm_inter_token_latency_seconds", "Mean gap between a stream's tokens", labels=labels
        )
        held = HistogramMetricFamily(
            "llm_hold_seconds", "How long held requests waited, by the model's rung when they came",
            labels=[*labels, "rung"],
        )  # fmt: skip
        for label, series in self._series.items():
            _add(latency, label, series.latency)
            _add(ttft, label, series.ttft)
            _add(token, label, series.token)
            for rung, durations in series.held.items():
                _add(held, (*label, rung), durations)
        yield from (latency, ttft, token, held)


def _add(family: HistogramMetricFamily, label: tuple[str, ...], durations: _Durations) -> None:
    bounds = [*map(str, map(float, durations.bounds)), "+Inf"]
    buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
    family.add_metric(label, buckets=buckets, sum_value=durations.total_s)
