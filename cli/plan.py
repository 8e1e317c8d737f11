"""`stoker plan`: what would happen if …, by the scheduler's own decisions on the live state."""

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
@click.option("--add", "file", type=click.Path(exists=True, dir_okay=False), help="a spec's FILE")
@click.option("--load", help="a model, with --replicas of it")
@click.option("--replicas", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--remove-node", help="a node that would be drained and gone")
@json_option
@click.pass_obj
def plan(
    cluster: ClusterAccess, file: str | None, load: str | None, replicas: int,
    remove_node: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what would happen if …, without doing it.

    Placements with their runners-up, what would go down for them, and the expected wait.
    """
    from runtime.contract.schema import SchemaError
    from runtime.contract.spec_file import load_specs
    from scheduler.admin.views import PlanBody

    added = None
    if file is not None:
        try:
            specs = load_specs(file)
        except SchemaError as error:
            raise click.ClickException(f"{file}: {error}") from None
        if len(specs) != 1:
            raise click.UsageError(f"--add: {file} holds {len(specs)} models; give one")
        added = specs[0]
    if not (added or load or remove_node):
        raise click.UsageError("ask something: --add FILE, --load MODEL or --remove-node NODE")
    body = PlanBody(add=added, load=load, replicas=replicas, remove_node=remove_node)
    show(cluster.ask(lambda admin: admin.plan(body)), as_json, plan_table)


def plan_table(answer: views.Plan) -> Table | str:
    """One row a decision, with what a placement was chosen over; then what found no place."""
    rows = [_row(step, answer.expected_wait_s) for step in answer.steps]
    rows += [
        ("not placed", name, "", "", "", "", why, "") for name, why in answer.not_placed.items()
    ]
    if not rows:
        return "nothing would change"
    columns = (
        "ACTION",
        "MODEL",
        "NODE",
        "?DEVICE",
        ">MEMORY",
        ">READY IN",
        "~REASON",
        "?~RATHER THAN",
    )
    return table(columns, rows)


def _row(step: views.PlanStep, waits: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{step.action} to {step.goes_to}" if step.goes_to else step.action,
        step.model,
        step.node_id or "",
        ", ".join(step.device_ids),
        size(step.device_bytes),
        age(waits.get(step.replica_id or "")),
        step.reason,
        "; ".join(step.considered),
    )
