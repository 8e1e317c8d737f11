"""How many replicas a model should have, in the words of Kubernetes' HorizontalPodAutoscaler. Pure.

Per metric, as HPA does (kubernetes.io, "Horizontal Pod Autoscaling", algorithm details):

    a total (queue_depth, concurrency)            wish = ceil(total / target)
    a mean (gpu_utilization, kv_cache_usage,      wish = ceil(ready x value / target), and as many
            ttft_p95)                                    as there are if value / target is 1 +- 0.1

The largest wish counts. Without `autoscale.metrics` there is one metric: concurrency (waiting and
in flight) at `target_concurrency`. Worked example: 2 ready, 40 requests at a concurrency target of
16 a replica, KV cache 0.9 full with target 0.6: max(ceil(40 / 16), ceil(2 x 0.9 / 0.6)) = 3.

Then, in this order:

- a metric without a figure never takes a replica away: it only stops the others from doing so;
- *stabilization*: more than there are only up to the least wish within `up.stabilization_s`, fewer
  only down to the greatest within `down.stabilization_s`;
- *policies*: per direction, the one that allows most. N replicas when a period began may become
  ceil(N x (1 + percent / 100)) or N + count in it, and floor(N x (1 - percent / 100)) or N - count
  on the way down. No policy: no limit;
- `max(min_replicas, 1)` to `max_replicas`, at once.

*Panic*, as in Knative's KPA (knative.dev, "Additional autoscaling configuration for KPA"): if the
mean demand within `panic_window_s` is `panic_threshold` times what the ready replicas are meant to
take, wishes are followed at once and nothing goes down, until it was less for STABLE_WINDOW_S.
Worked example: 1 ready, target 16, 100 requests arrive at t = 0: with a window of 6 s the mean is
100 x 1/6 = 16.7 at t = 1 and 33 = 2 x 16 at t = 2: from then on ceil(100 / 16) = 7 are wanted.
With nothing ready any demand is a burst: from zero, the wish counts at once.

Rules this file keeps: the present number is `coming`, what serves or is on its way, so
stabilization never *starts* a replica for demand that is gone; it never says 0 while there is a
replica (the idle timer, `idle_s`, takes the last one); more demand never asks for fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from runtime.wire.model_spec import ModelSpec, ScalePolicy, ScaleTarget
from scheduler.signals.windows import Changes, Extreme, Mean

TOLERANCE = 0.1  # HPA's default
STABLE_WINDOW_S = 60.0  # Knative's default: how long panic lasts after its last cause
MANY = 1 << 20  # a wish no cluster can meet: keeps figures finite
ROUNDING = 1e-9  # 10 x 1.1 is 11.000000000000002 in floats, and means 11


@dataclass(frozen=True, slots=True)
class Sample:
    """A model as it is now. A figure nobody tells is None; one that is not a number counts as None.

    `in_flight` leaves out what replicas on their way out are finishing: it needs no other. `coming`
    should leave out plans that still wait for room: what is not counted can be called off at once
    when demand is gone, what is counted is stabilized.
    """

    now: float
    ready: int
    coming: int  # ready and started
    waiting: int
    in_flight: int
    gpu_utilization: float | None = None  # 0..1, the mean over its replicas' devices
    kv_cache_usage: float | None = None  # 0..1, the mean over its replicas
    ttft_p95_s: float | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """How many there should be, why, and what kept it from the metrics' wish (None: nothing)."""

    replicas: int
    reason: str
    limited_by: str | None = None


@dataclass(slots=True)
class ScaleHistory:
    """What one model's windows and policies need to remember.

    Changes are seen by comparing samples: of how `coming` moved since the last evaluation, the part
    that was asked for counts, at that evaluation's time. So apply each `Desired` before the next
    evaluation; what was not applied (no room) or was another's doing (a crash, an operator) is not
    counted against the policies.
    """

    least: Extreme = field(default_factory=lambda: Extreme(1))
    greatest: Extreme = field(default_factory=lambda: Extreme(-1))
    pressure: Mean = field(default_factory=Mean)  # of demand, in replicas needed
    ups: Changes = field(default_factory=Changes)
    downs: Changes = field(default_factory=Changes)
    panic_until: float = -math.inf
    held_until: float = -math.inf
    at: float | None = None  # of the last evaluation
    coming: int = 0
    asked: int = 0

    def hold(self, until: float) -> None:
        """Take nothing away before `until`: after a restart, now + `down.stabilization_s`."""
        self.held_until = max(self.held_until, until)

    def panicking(self, now: float) -> bool:
        """Whether a burst was seen so lately that nothing goes down."""
        return now < self.panic_until


def desired_replicas(spec: ModelSpec, sample: Sample, history: ScaleHistory) -> Desired:
    """How many replicas the model should have now. Never raises; remembers in `history`."""
    rules = spec.autoscale
    now = sample.now if history.at is None else max(sample.now, history.at)
    coming = max(sample.coming, sample.ready)
    demand = sample.waiting + sample.in_flight
    low = max(spec.min_replicas, 1 if coming or demand > 0 else 0)
    high = max(spec.max_replicas, low)
    wish, reason, missing = _largest_wish(spec, sample)
    target = min(max(wish, low), high)
    _observe(history, spec, now, coming)
    if history.at is None:  # as HPA does: what there is counts as the first recommendation
        history.greatest.push(now, max(target, min(coming, high)), rules.down.stabilization_s)
    least = history.least.push(now, target, rules.up.stabilization_s)
    greatest = history.greatest.push(now, target, rules.down.stabilization_s)
    panic = _panic(history, spec, sample, now)
    limit = "max_replicas" if wish > high else "min_replicas" if wish < low else None
    if coming == 0 or panic or sample.ready == 0:
        replicas = max(target, coming)
        if replicas > target:
            limit = "panic" if panic else "nothing is ready yet"
    elif target > coming:
        replicas, limit = _upwards(spec, history, now, coming, target, least, limit)
    elif target < coming and now < history.held_until:
        replicas, limit = coming, "hold after a restart"
    elif target < coming and missing:
        replicas, limit = coming, f"no figure for {missing}"
    elif target < coming:
        replicas, limit = _downwards(spec, history, now, coming, target, greatest, limit)
    else:
        replicas = target
    if replicas > high:  # as HPA does: a lowered maximum is kept at once
        replicas, limit = high, "max_replicas"
    history.at, history.coming, history.asked = now, coming, replicas
    return Desired(replicas, reason, limit)


# --------------------------------------------------------------------------------- the wish


def _targets(spec: ModelSpec) -> tuple[ScaleTarget, ...]:
    default = ScaleTarget(metric="concurrency", target=float(spec.target_concurrency))
    return spec.autoscale.metrics or (default,)


def _total(metric: str, sample: Sample) -> int | None:
    """Requests a total metric counts; None for a metric that is a mean."""
    if metric == "queue_depth":
        return max(0, sample.waiting)
    return max(0, sample.waiting) + max(0, sample.in_flight) if metric == "concurrency" else None


def _mean(metric: str, sample: Sample) -> float | None:
    if metric == "gpu_utilization":
        value = sample.gpu_utilization
    else:
        value = sample.kv_cache_usage if metric == "kv_cache_usage" else sample.ttft_p95_s
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def _largest_wish(spec: ModelSpec, sample: Sample) -> tuple[int, str, str | None]:
    """The largest wish, which metric's it is, and a metric without a figure."""
    best, reason, missing = -1, "no metric has a figure", None
    for rule in _targets(spec):
        total = _total(rule.metric, sample)
        if total is not None:
            wish, value = _ceil(total / rule.target), float(total)
        else:
            mean = _mean(rule.metric, sample)
            if mean is None or sample.ready <= 0:
                missing = rule.metric
                continue
            wish, value = _by_mean(sample, mean / rule.target), mean
        if wish > best:
            best, reason = wish, f"{rule.metric} {value:g} at a target of {rule.target:g}"
    return max(best, 0), reason, missing


def _by_mean(sample: Sample, ratio: float) -> int:
    """Replicas that bring a mean to its target, `ratio` being value / target.

    Those on the way take load too, so on the way up they count as idle, as HPA counts pods that are
    not ready. Worked example: 2 ready at 0.9, target 0.6, 1 more on its way: spread over 3 that is
    0.6, as wanted, so 3.
    """
    coming = max(sample.coming, sample.ready)
    if abs(ratio - 1) <= TOLERANCE + ROUNDING:
        return coming
    needed = sample.ready * ratio
    if ratio > 1 and needed <= coming * (1 + TOLERANCE):
        return coming
    return _ceil(needed)


def _ceil(replicas: float) -> int:
    return math.ceil(min(replicas, MANY) - ROUNDING)


# ------------------------------------------------------------------- panic, windows, policies


def _panic(history: ScaleHistory, spec: ModelSpec, sample: Sample, now: float) -> bool:
    rules = spec.autoscale
    totals = [(_total(t.metric, sample), t.target) for t in _targets(spec)]
    loads = [total / target for total, target in totals if total is not None]
    if not loads:
        loads = [(_total("concurrency", sample) or 0) / spec.target_concurrency]
    mean = history.pressure.push(now, min(max(loads), MANY), rules.panic_window_s)
    if rules.panic_window_s <= 0:
        return False
    if sample.ready > 0 and mean >= rules.panic_threshold * sample.ready:
        history.panic_until = now + STABLE_WINDOW_S
    return history.panicking(now)


def _observe(history: ScaleHistory, spec: ModelSpec, now: float, coming: int) -> None:
    """Note what became of the last `Desired`, and forget what no policy asks for any more."""
    if history.at is not None:
        moved, asked = coming - history.coming, history.asked - history.coming
        if moved > 0 and asked > 0:
            history.ups.add(history.at, min(moved, asked))
        elif moved < 0 and asked < 0:
            history.downs.add(history.at, min(-moved, -asked))
    policies = (*spec.autoscale.up.policies, *spec.autoscale.down.policies)
    longest_s = max((policy.period_s for policy in policies), default=0.0)
    history.ups.prune(now, longest_s)
    history.downs.prune(now, longest_s)


def _upwards(
    spec: ModelSpec, history: ScaleHistory, now: float, coming: int, target: int, least: int,
    limit: str | None,
) -> tuple[int, str | None]:  # fmt: skip
    """Between `coming` and `target`, and what limited it."""
    replicas = max(coming, min(target, least))
    if replicas < target:
        limit = f"up: stabilization of {spec.autoscale.up.stabilization_s:g} s"
    if replicas < spec.min_replicas:
        replicas, limit = spec.min_replicas, "min_replicas"
    allowed = [_after(policy, history, now, coming, 1) for policy in spec.autoscale.up.policies]
    if allowed and replicas > max(*allowed, coming, spec.min_replicas):
        return max(*allowed, coming, spec.min_replicas), "up: policies"
    return replicas, limit


def _downwards(
    spec: ModelSpec, history: ScaleHistory, now: float, coming: int, target: int, greatest: int,
    limit: str | None,
) -> tuple[int, str | None]:  # fmt: skip
    """Between `target` and `coming`, and what limited it."""
    replicas = min(coming, max(target, greatest))
    if replicas > target:
        limit = f"down: stabilization of {spec.autoscale.down.stabilization_s:g} s"
    allowed = [_after(policy, history, now, coming, -1) for policy in spec.autoscale.down.policies]
    if allowed and replicas < min(*allowed, coming):
        return min(*allowed, coming), "down: policies"
    return replicas, limit


def _after(policy: ScalePolicy, history: ScaleHistory, now: float, coming: int, sign: int) -> int:
    """How far `policy` lets the replicas go now: `sign` 1 up, -1 down.

    Worked example, up 100 % per 30 s: 2 became 4 ten seconds ago, so the period began with 2 and 4
    is all there may be; twenty seconds later it begins with 4, and 8 are allowed.
    """
    period_s = policy.period_s
    began = coming - history.ups.within(now, period_s) + history.downs.within(now, period_s)
    change = began * policy.value / 100 if policy.type == "percent" else policy.value
    return _ceil(began + change) if sign > 0 else max(0, math.floor(began - change + ROUNDING))
