"""`stoker coldstarts` and `stoker footprint`: what was measured, and where the waiting went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import age, json_option, show, size

if TYPE_CHECKING:
    from rich.table import Table

    from scheduler.admin import views

SHOWN_PHASES = 4  # the longest ones; --json has them all


@click.command()
@click.option("-n", "limit", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--model", help="Only this model's.")
@json_option
@click.pass_obj
def coldstarts(cluster: ClusterAccess, limit: int, model: str | None, as_json: bool) -> None:
    """List cold starts and wakes: why, what moved down for them, where the time went."""
    answer = cluster.ask(lambda admin: admin.cold_starts(limit, model))
    show(answer, as_json, lambda started: cold_start_table(started, model))


def cold_start_table(answer: views.ColdStarts, model: str | None = None) -> Table | str:
    """The newest last, so that it stands above the prompt."""
    if not answer.cold_starts:
        which = f" of {model!r}" if model else ""
        return f"no cold starts{which} since this scheduler leads"
    columns = (
        "#",
        ">AGO",
        "MODEL",
        "FROM",
        "?NODE",
        ">TOTAL",
        "~LONGEST PHASES",
        "?~WHY",
        "?~MOVED DOWN",
    )
    return table(columns, (_cold_start_row(c) for c in reversed(answer.cold_starts)))


def _cold_start_row(c: views.ColdStartView) -> tuple[str, ...]:
    longest = sorted(c.phases.items(), key=lambda item: -item[1])[:SHOWN_PHASES]
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in longest if seconds >= 0.005)
    after = ", ".join(f"{name} {seconds:.2f}" for name, seconds in c.after.items())
    return (
        str(c.number),
        age(c.age_s),
        c.model,
        c.rung if c.outcome == "ready" else f"{c.rung}, {c.outcome}",
        c.node_id,
        age(c.total_s),
        f"{spent}; then {after}" if after else spent,
        c.cause,
        ", ".join(c.moved_down) or "nothing",
    )


@click.command()
@click.argument("model")
@json_option
@click.pass_obj
def footprint(cluster: ClusterAccess, model: str, as_json: bool) -> None:
    """Show what MODEL was declared, estimated and measured to take, and its times."""
    show(cluster.ask(lambda admin: admin.footprint(model)), as_json, footprint_table)


def footprint_table(answer: views.Footprints) -> Table | str:
    """Declared, estimated and measured sizes, then the steps' times."""
    estimated = answer.estimate.total_bytes if answer.estimate else None
    rows: list[tuple[str, ...]] = [
        ("declared", size(answer.declared_bytes), "", "", "", ""),
        (
            "estimated",
            size(estimated),
            "",
            "",
            "",
            answer.estimate.explanation if answer.estimate else "",
        ),
        ("booked", size(answer.booked_bytes), "", "", "", f"as {answer.booked_from}"),
    ]
    for kind in sorted(answer.measured, key=lambda kind: not kind.current):
        about = f"{kind.engine} {kind.engine_version} on {kind.device_kind}"
        about += "" if kind.current else ", of an older spec"
        rows.append(("measured on each device", size(kind.device_bytes), "", "", "", about))
        rows.append(("asleep on each device", size(kind.residue_bytes), "", "", "", about))
        rows.append(("host memory", size(kind.host_bytes), "", "", "", about))
        rows.append(("host memory asleep", size(kind.host_asleep_bytes), "", "", "", about))
        for step, times in sorted(kind.times.items()):
            seconds = (age(times.p50_s), age(times.p95_s), age(times.last_s))
            note = f"{times.count} times" + ("" if kind.current else ", of an older spec")
            rows.append((step, "", *seconds, note))
    return table(("WHAT", ">BYTES", ">P50", ">P95", ">LAST", "~NOTE"), rows)
