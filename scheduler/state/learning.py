"""What the core learns: footprints of models, and post-mortems of their cold starts. Pure."""

from __future__ import annotations

from runtime.contract.footprint_ledger import Footprint, Key
from scheduler.state.cluster import Climb, ClusterState, Model, Replica
from scheduler.state.messages import ColdStart

ROUNDING_S = 0.0001  # of each figure of a record


def footprint_key(state: ClusterState, replica: Replica) -> Key | None:
    """The ledger entry a replica's measurements belong to; None before it has reported."""
    report = replica.report
    if report is None:
        return None
    devices = state.nodes[replica.node_id].devices
    kind = next((devices[d].kind for d in replica.device_ids if d in devices), None)
    if kind is None:
        return None
    version = report.engine_version or "unknown"
    return Key(replica.model, replica.launch_key, report.engine, version, kind)


def remember(model: Model, footprint: Footprint) -> None:
    """Keep an entry with its model; the policies use the latest one of the present launch key."""
    model.footprints[footprint.key] = footprint
    if footprint.key.launch_key == model.launch_key:
        model.footprint = footprint


def finished(
    number: int, replica: Replica, climb: Climb, outcome: str, now: float,
    first_token_s: float | None = None,
) -> ColdStart:  # fmt: skip
    """The post-mortem of a climb that ended at `now`.

    What comes after it serves is no phase of it, but in `after`: the canary of a start, and
    `first_token`, the seconds from there to the first byte of a held request, as a router told.

    Worked example: a request had waited 0.1 s when the replica was planned at 100.0; what was
    moved down for it had left its memory at 101.5; another start on the device ended at 102.0; its
    agent reports weights 1.0 s and kv 0.5 s; it serves at 104.0. Then total_s is 4.1 and the
    phases are queue 0.1, evict 1.5, turn 0.5, weights 1.0, kv 0.5, other 0.5.
    """
    sent_at = climb.sent_at if climb.sent_at is not None else now
    reported = dict(replica.report.phases) if replica.report else {}
    after = {n: s for n, s in reported.items() if n == "canary" and climb.rung == "stopped"}
    if first_token_s is not None:
        after["first_token"] = first_token_s
    reported = {name: seconds for name, seconds in reported.items() if name not in after}
    known_s = sum(reported.values())
    # The agent's clock is another one: what it reports never exceeds what was seen from here.
    seen_s = max(now - sent_at, 0.0)
    scale = min(1.0, seen_s / known_s) if known_s > 0 else 1.0
    free_at = climb.planned_at
    if climb.moved_down:
        free_at = sent_at if climb.room_at is None else min(climb.room_at, sent_at)
    phases = {
        "queue": climb.waited_s, "evict": free_at - climb.planned_at, "turn": sent_at - free_at,
    }  # fmt: skip
    phases |= {name: seconds * scale for name, seconds in reported.items() if name != "other"}
    rung = climb.rung
    if rung == "stopped":  # what it began from is its agent's to tell
        rung = replica.report.started_from if replica.report else "cached"
    total_s = climb.waited_s + now - climb.planned_at
    phases["other"] = max(0.0, total_s - sum(phases.values()))
    return ColdStart(
        number=number, at=now, model=replica.model, replica_id=replica.replica_id,
        node_id=replica.node_id, rung=rung, outcome=outcome, cause=climb.cause,
        reason=climb.reason, moved_down=climb.moved_down, total_s=round(total_s, 4),
        phases={name: round(seconds, 4) for name, seconds in phases.items()},
        after={name: round(seconds, 4) for name, seconds in after.items()},
        expected_s=climb.expected_s, considered=climb.considered,
    )  # fmt: skip


def mismatch(record: ColdStart) -> str | None:
    """Why a record can't be true: its phases do not add up to its total, or one is negative."""
    negative = [name for name, seconds in record.phases.items() if seconds < 0]
    if negative:
        return f"cold start {record.number} of {record.model}: {', '.join(negative)} below 0 s"
    known_s = sum(record.phases.values())
    if abs(known_s - record.total_s) > ROUNDING_S * (len(record.phases) + 1):
        return (
            f"cold start {record.number} of {record.model}: its phases add up to {known_s:.4f} s,"
            f" its total is {record.total_s:.4f} s"
        )
    return None
