"""What each rung of the warmth ladder costs. Pure policy.

A replica's rungs here: hot, asleep-1 (weights in host memory), asleep-2 (weights dropped, process
kept) and stopped. Holding a rung costs bytes; being low costs the seconds the next call waits:

    expected cost = chance of a call x (seconds to climb from the lower rung - from this one)

The chance that a model is called within the horizon H, given that its last call was t seconds ago,
is taken as H / (H + t): certain for one just called, even odds after H, and falling ever slower.
Worked example, H = 600 s: a model idle for 200 s whose wake takes 3 s and whose start takes 40 s:
stopping it instead of letting it sleep costs 600 / 800 x (40 - 3) = 27.75 s of expected waiting.

Rules this file keeps: measured times win over guesses; host memory is never over-booked.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.state import Model, Node, Replica, Stage

HORIZON_S = 600.0
GUESS_START_S = 45.0  # until a model's own start was measured
GUESS_WAKE_S = {1: 2.0, 2: 8.0}  # likewise; level 2 reads the weights again
GUESS_RESIDUE_BYTES = {"nvml": 2**30}  # a sleeping vLLM keeps about 1 GB a GPU (vLLM's docs)
EVICT_S = 3.0  # what sleeping or stopping a victim adds to a wait


@dataclass(frozen=True, slots=True)
class Descent:
    """One way down for one replica. `level` 0 is stopped."""

    replica: Replica
    level: int
    frees: int  # bytes on each of its devices
    host_bytes: int  # booked on the node for as long as it sleeps
    cost: float


def climb_s(model: Model, level: int) -> float:
    """Seconds from sleep `level` (0: stopped) to serving."""
    measured = model.measured_s(step_name(level))
    if measured is not None:
        return measured
    if level == 0:
        return GUESS_START_S
    # Waking is a part of starting: a model that starts quickly wakes more quickly still.
    return min(GUESS_WAKE_S[level], climb_s(model, 0) / 2)


def step_name(level: int) -> str:
    """The ledger's name of the climb from sleep `level` (0: stopped)."""
    return f"wake-{level}" if level else "start"


def call_chance(idle_s: float) -> float:
    """The chance of a call within the horizon, for a model last called `idle_s` ago."""
    return HORIZON_S / (HORIZON_S + max(0.0, idle_s))


def descents(model: Model, node: Node, replica: Replica, now: float) -> list[Descent]:
    """The ways down that are open to a replica, the cheapest first."""
    chance = call_chance(now - replica.used_at)
    here_s = climb_s(model, replica.sleep_level) if replica.stage is Stage.ASLEEP else 0.0
    found = []
    if model.may_stop(replica):
        cost = chance * max(0.0, climb_s(model, 0) - here_s)
        found.append(Descent(replica, 0, replica.committed, 0, cost))
    if replica.stage is Stage.READY:
        residue = expected_residue(model, node, replica)
        for level in replica.rungs():
            host_bytes = model.weights_bytes(replica) if level == 1 else 0
            if residue < replica.bytes and host_bytes <= node.host_free():
                cost = chance * climb_s(model, level)
                found.append(Descent(replica, level, replica.bytes - residue, host_bytes, cost))
    return sorted(found, key=lambda d: (d.cost, d.level))


def resting_place(model: Model, node: Node, replica: Replica, now: float) -> Descent | None:
    """One rung down from hot, for a replica nobody uses: the highest that is open to it.

    None where its floor forbids what is open.
    """
    ways = {way.level: way for way in descents(model, node, replica, now)}
    return ways.get(1) or ways.get(2) or ways.get(0)


def expected_residue(model: Model, node: Node, replica: Replica) -> int:
    """Bytes a sleeping replica will keep on each device: measured before, else by device kind."""
    if model.footprint is not None and model.footprint.residue_bytes is not None:
        return model.footprint.residue_bytes
    kinds = {node.devices[d].kind for d in replica.device_ids if d in node.devices}
    return max((GUESS_RESIDUE_BYTES.get(kind, 0) for kind in kinds), default=0)
