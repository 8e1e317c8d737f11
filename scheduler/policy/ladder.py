"""What each rung of the warmth ladder costs. Pure policy.

A replica's rungs here: hot, asleep-1 (weights in host memory), asleep-2 (weights dropped, process
kept) and stopped; a start then begins from where the weights are: staged (page cache), cached
(disk) or remote. Holding a rung costs bytes; being low costs the seconds the next call waits:

    expected cost = chance of a call x (seconds to climb from the lower rung - from this one)

The chance that a model is called within the horizon H, given that its last call was t seconds ago,
is what its history says, or while that is short H / (H + t): certain for one just called, even odds
after H, and falling ever slower.
Worked example, H = 600 s: a model idle for 200 s whose wake takes 3 s and whose start takes 40 s:
stopping it instead of letting it sleep costs 600 / 800 x (40 - 3) = 27.75 s of expected waiting.

Rules this file keeps: a model's own measured times win over those of others of its size, and these
over guesses; host memory is never over-booked.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.state.cluster import ClusterState, Hold, Model, Node, Replica, Stage

HORIZON_S = 600.0
# Of a start from staged weights, by device kind, until some were measured: on a GPU with compiling;
# vLLM on a CPU is forked and eager; what is simulated runs the stub.
GUESS_START_S = {"nvml": 45.0, "cpu": 6.0, "simulated": 2.0}
GUESS_WAKE_S = {1: 2.0, 2: 8.0}  # likewise; level 2 reads the weights again
GUESS_DISK_BPS = 2e9  # an NVMe disk, read by one loader
GUESS_PULL_BPS = 0.25e9  # from a shared store, a peer or a hub over 10 Gbit/s with other traffic
GUESS_RESIDUE_BYTES = {"nvml": 2**30}  # a sleeping vLLM keeps about 1 GB a GPU (vLLM's docs)
FRESH_S = 1.0  # a chance worked out so long ago still holds
EVICT_S = 3.0  # what sleeping or stopping a victim adds to a wait
START_RUNGS = ("staged", "cached", "remote")
REPOINT = "repoint"  # the ledger's name of a climb in another model's engine


@dataclass(frozen=True, slots=True)
class Descent:
    """One way down for one replica. `level` 0 is stopped."""

    replica: Replica
    level: int
    frees: int  # bytes on each of its devices
    host_bytes: int  # booked on the node for as long as it sleeps
    cost: float  # expected seconds of waiting
    busy: bool = False  # it has requests, which it ends first
    elsewhere: tuple[str, tuple[str, ...]] | None = None  # (node, devices) it starts on instead


def climb_s(model: Model, level: int, rung: str = "cached") -> float:
    """Seconds from sleep `level` (0: stopped, its weights on `rung`) to serving."""
    if level:
        measured = model.measured_s(step_name(level))
        if measured is not None:
            return measured
        pooled = model.expected_s(step_name(level))
        start_s = climb_s(model, 0, "staged")
        # Waking is a part of starting: a model that starts quickly wakes more quickly still.
        return min(GUESS_WAKE_S[level], start_s / 2) if pooled is None else min(pooled, start_s)
    measured = model.measured_s(step_name(0, rung))
    if measured is not None:
        return measured
    for other in START_RUNGS:
        known = model.measured_s(step_name(0, other))
        if known is not None:
            return known * _guess_s(model, rung) / _guess_s(model, other)
    return _guess_s(model, rung)


def repoint_s(model: Model, rung: str) -> float:
    """Seconds to point an engine at the model, its weights on `rung`, until it serves.

    As long as waking from level 2, which reads the weights too, until some were measured.
    """
    measured = model.measured_s(REPOINT)
    if measured is None:
        measured = model.expected_s(REPOINT)
    return min(measured or climb_s(model, 2), climb_s(model, 0, rung))


def _guess_s(model: Model, rung: str) -> float:
    """Seconds of a start from `rung` where nothing was measured of this model: as others took.

    Of one that was measured from another rung only the ratio of two guesses counts: their
    difference may be more than all it took. Worked example, 16 GB: pulled and started in 25 s where
    45 + 64 = 109 s were guessed, so from staged weights 25 x 45 / 109 = 10.3 s, and not 25 - 64.
    """
    pooled = model.expected_s(step_name(0, rung))
    if pooled is not None:
        return pooled
    return GUESS_START_S[model.climb_times.kind] + _fetch_s(model, rung)


def _fetch_s(model: Model, rung: str) -> float:
    """Seconds to bring the weights from `rung` to the page cache, as guessed."""
    estimate = model.stored.estimate
    weights = estimate.weights_bytes if estimate else model.spec.device_memory_bytes or 0
    if rung == "cached":
        return weights / GUESS_DISK_BPS
    return weights / GUESS_PULL_BPS if rung == "remote" else 0.0


def step_name(level: int, rung: str = "cached") -> str:
    """The ledger's name of the climb from sleep `level` (0: a start, from `rung`)."""
    return f"wake-{level}" if level else f"start-{rung}"


def call_chance(idle_s: float) -> float:
    """The chance of a call within the horizon, for a model last called `idle_s` ago."""
    return HORIZON_S / (HORIZON_S + max(0.0, idle_s))


def chance(state: ClusterState, model: Model, used_at: float, now: float) -> float:
    """The chance that `model`, last called at `used_at` as far as is known, is called soon.

    By its history (scheduler/signals/forecast.py) where that has a say; else by its idle time.
    """
    if model.arrivals is None or not model.arrivals.known(now):
        return call_chance(now - max(used_at, model.active_at or used_at))
    asked_at, odds = model.odds
    if not 0 <= now - asked_at <= FRESH_S:
        odds = model.arrivals.chance(now, now + state.wall_offset_s, HORIZON_S)
        model.odds = (now, odds)
    return odds


def descents(
    state: ClusterState, model: Model, node: Node, replica: Replica, now: float
) -> list[Descent]:
    """The ways down that are open to a replica, the cheapest first."""
    odds = chance(state, model, replica.used_at, now)
    here_s = climb_s(model, replica.sleep_level) if replica.stage is Stage.ASLEEP else 0.0
    found = []
    if model.may_stop(replica):
        stopped_s = climb_s(model, 0, node.start_rung(model.spec.source))
        cost = odds * max(0.0, stopped_s - here_s)
        found.append(Descent(replica, 0, replica.committed, 0, cost))
    if replica.stage is Stage.READY:
        residue = expected_residue(model, node, replica)
        for level in replica.rungs():
            host_bytes = model.weights_bytes(replica) if level == 1 else 0
            cost = odds * climb_s(model, level)
            saved = odds * climb_s(model, 0) - cost
            room = host_bytes <= node.host_free() or (
                yielding(state, node, host_bytes, saved, now) is not None
            )
            if residue < replica.bytes and room:
                found.append(Descent(replica, level, replica.bytes - residue, host_bytes, cost))
    return sorted(found, key=lambda d: (d.cost, d.level))


def hold_value(state: ClusterState, hold: Hold, now: float) -> float:
    """Expected seconds of waiting that a staged model's weights save."""
    model = state.models.get(hold.model)
    if model is None:
        return 0.0
    if model.floor == "staged":
        return float("inf")
    saved = climb_s(model, 0, "cached") - climb_s(model, 0, "staged")
    return chance(state, model, hold.since, now) * max(0.0, saved)


def yielding(
    state: ClusterState, node: Node, need: int, value: float, now: float
) -> list[Hold] | None:
    """The staged models to let go for `need` host bytes worth `value` seconds; [] if none need go.

    None where what they save together is worth as much, or where it would not be enough.
    """
    missing = need - node.host_free()
    if missing <= 0:
        return []
    gone: list[Hold] = []
    held = [(hold_value(state, hold, now), hold) for hold in node.holds.values()]
    for worth, hold in sorted(held, key=lambda one: one[0] / max(1, one[1].bytes)):
        if missing <= 0 or worth == float("inf"):
            break
        gone.append(hold)
        missing -= hold.bytes
        value -= worth
    return None if missing > 0 or value < 0 else gone


def resting_place(
    state: ClusterState, model: Model, node: Node, replica: Replica, now: float
) -> Descent | None:
    """One rung down from hot, for a replica nobody uses: the highest that is open to it.

    None where its floor forbids what is open.
    """
    ways = {way.level: way for way in descents(state, model, node, replica, now)}
    return ways.get(1) or ways.get(2) or ways.get(0)


def expected_residue(model: Model, node: Node, replica: Replica) -> int:
    """Bytes a sleeping replica will keep on each device: measured before, else by device kind."""
    if model.footprint is not None and model.footprint.residue_bytes is not None:
        return model.footprint.residue_bytes
    kinds = {node.devices[d].kind for d in replica.device_ids if d in node.devices}
    return max((GUESS_RESIDUE_BYTES.get(kind, 0) for kind in kinds), default=0)
