"""`stoker ps`, `nodes`, `devices`, `queue`, `decisions`: what is going on, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import age, json_option, show, size

if TYPE_CHECKING:
    from rich.table import Table

    from scheduler.admin import views


@click.command()
@json_option
@click.pass_obj
def ps(cluster: ClusterAccess, as_json: bool) -> None:
    """List the replicas."""
    show(cluster.ask(lambda admin: admin.replicas()), as_json, replica_table)


def replica_table(answer: views.Replicas) -> Table | str:
    """Model, where it runs, and how it is doing, one row a replica."""
    if not answer.replicas:
        return "no replicas: a model starts with its first request, or with `stoker load MODEL`"
    columns = (
        "MODEL", "??REPLICA", "?NODE", "?DEVICE", ">MEMORY", "!STATE", "?>SINCE",
        "?>IN FLIGHT", "?>IDLE", "?>STARTED IN", "?>WOKE IN", "~NOTE",
    )  # fmt: skip
    return table(columns, (_replica_row(r) for r in answer.replicas))


def _replica_row(r: views.ReplicaView) -> tuple[str, ...]:
    asleep = r.state == "asleep"
    notes = [r.reason or ""]
    if r.engine == "stub":
        notes.insert(0, "stub engine")
    if r.restarts:
        why = f"; the last time it died: {r.died}" if r.died and r.died != r.reason else ""
        notes.append(f"{r.restarts} restart{'' if r.restarts == 1 else 's'}{why}")
    if r.outdated:
        notes.append("has an older spec")
    notes += [f"no {rung} any more: {why}" for rung, why in sorted(r.disabled.items())]
    return (
        r.model,
        r.replica_id,
        r.node_id,
        ", ".join(r.device_ids),
        size((r.residue_bytes if asleep else r.device_bytes) * len(r.device_ids)),
        f"{r.state}, level {r.sleep_level}" if asleep else r.state,
        age(r.since_s),
        str(r.in_flight),
        age(r.idle_for_s),
        age(r.start_s),
        age(r.wake_s),
        "; ".join(filter(None, notes)),
    )


@click.command()
@json_option
@click.pass_obj
def nodes(cluster: ClusterAccess, as_json: bool) -> None:
    """List the hosts."""
    show(cluster.ask(lambda admin: admin.nodes()), as_json, _node_table)


def _node_table(answer: views.Nodes) -> Table | str:
    if not answer.nodes:
        return "no nodes: start `stoker agent` on a host"
    columns = (
        "NODE", "!STATE", ">HEARD", ">DEVICES", ">REPLICAS", ">BOOKED", "?>DEVICE MEMORY",
        "?>HOST MEMORY FREE", "?>FOR SLEEPERS", "?~ENGINES", "?ADDRESS",
    )  # fmt: skip
    return table(
        columns,
        (
            (
                n.node_id,
                n.state,
                f"{age(n.last_heartbeat_s)} ago",
                str(n.devices),
                str(n.replicas),
                size(n.memory_booked_bytes),
                size(n.memory_total_bytes),
                size(n.host_memory_available_bytes),
                f"{size(n.host_booked_bytes)} of {size(n.host_budget_bytes)}",
                ", ".join(f"{engine} {version}" for engine, version in sorted(n.engines.items())),
                n.address,
            )
            for n in answer.nodes
        ),
    )


@click.command()
@json_option
@click.pass_obj
def devices(cluster: ClusterAccess, as_json: bool) -> None:
    """List the devices and what is booked on them."""
    show(cluster.ask(lambda admin: admin.devices()), as_json, _device_table)


def _device_table(answer: views.Devices) -> Table | str:
    if not answer.devices:
        return "no devices: no node has reported one"
    columns = (
        "NODE", "DEVICE", "?KIND", "?NAME", "?>TOTAL", ">BOOKED", ">FREE", "?>USED", "?>FOREIGN",
        "?>BUSY", "?>TEMP", "!~HEALTH", "~REPLICAS",
    )  # fmt: skip
    return table(columns, (_device_row(d) for d in answer.devices))


def _device_row(d: views.DeviceView) -> tuple[str, ...]:
    r = d.report
    return (
        d.node_id,
        r.device_id,
        r.kind,
        r.name,
        size(r.memory_total_bytes),
        size(d.booked_bytes),
        size(d.free_bytes),
        size(r.memory_used_bytes),
        size(r.foreign_bytes),
        "-" if r.utilization is None else f"{r.utilization:.0%}",
        "-" if r.temperature_c is None else f"{r.temperature_c:.0f} °C",
        _health(d),
        ", ".join(d.replicas),
    )


def _health(d: views.DeviceView) -> str:
    if d.quarantined is not None:
        return f"quarantined: {d.quarantined}"
    return "ok" if d.report.healthy else f"unhealthy: {d.report.unhealthy_reason or 'no reason'}"


@click.command()
@json_option
@click.pass_obj
def queue(cluster: ClusterAccess, as_json: bool) -> None:
    """List the requests that wait for a model."""
    show(cluster.ask(lambda admin: admin.queue()), as_json, _queue_table)


def _queue_table(answer: views.Queue) -> Table | str:
    if not answer.queue:
        return "nothing waits and nothing is in flight"
    rows = (
        (q.model, str(q.waiting), age(q.oldest_wait_s), str(q.in_flight), q.waiting_for or "")
        for q in answer.queue
    )
    return table(("MODEL", ">WAITING", ">OLDEST", ">IN FLIGHT", "~WAITING FOR"), rows)


@click.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--model", help="Only this model's.")
@json_option
@click.pass_obj
def decisions(cluster: ClusterAccess, limit: int, model: str | None, as_json: bool) -> None:
    """List what the scheduler decided, and why."""
    answer = cluster.ask(lambda admin: admin.decisions(limit, model))
    show(answer, as_json, lambda decided: _decision_table(decided, model))


def _decision_table(answer: views.Decisions, model: str | None) -> Table | str:
    if not answer.decisions:
        return f"nothing decided about {model!r} yet" if model else "nothing decided yet"
    rows = (
        (
            str(d.number),
            age(d.age_s),
            d.action,
            d.model,
            d.replica_id or "",
            d.node_id or "",
            d.reason,
            d.cause,
        )
        for d in sorted(answer.decisions, key=lambda d: d.number)
    )
    columns = (">#", ">AGO", "ACTION", "MODEL", "?REPLICA", "?NODE", "~REASON", "?~CAUSE")
    return table(columns, rows)
