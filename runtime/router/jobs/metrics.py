"""What is counted of batches, jobs and webhooks, for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class JobMetrics(Collector):
    """One router's counters."""

    def __init__(self) -> None:
        self._lines: Counter[str] = Counter()
        self._jobs: Counter[str] = Counter()
        self._hooks: Counter[str] = Counter()

    def line(self, status: str, count: int = 1) -> None:
        """Lines were completed, failed, expired, cancelled, or put_back to be sent again."""
        self._lines[status] += count

    def job(self, status: str) -> None:
        """A job was created, or ended as completed, failed, cancelled or expired, or put_back."""
        self._jobs[status] += 1

    def hook(self, status: str) -> None:
        """A webhook was delivered or given_up, or an attempt has failed."""
        self._hooks[status] += 1

    def collect(self) -> Iterable[Metric]:
        """What the library asks for at each scrape."""
        yield _family(
            "stoker_router_batch_lines", "Lines of batches, by how they ended", self._lines
        )
        yield _family("stoker_router_jobs", "Jobs, by what happened to them", self._jobs)
        yield _family("stoker_router_webhooks", "Webhooks, by what happened to them", self._hooks)


def _family(name: str, help_: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=["status"])
    for status, count in counts.items():
        if count:
            family.add_metric([status], count)
    return family
