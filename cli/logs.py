"""`stoker logs`: what an engine printed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from cli.cluster import ClusterAccess
from cli.text import echo_untrusted

if TYPE_CHECKING:
    from cli.client import Admin


@click.command()
@click.argument("name", metavar="REPLICA|MODEL")
@click.option("-n", "--tail", type=click.IntRange(0), default=100, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on until the replica is gone, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_obj
def logs(cluster: ClusterAccess, name: str, tail: int, follow: bool, as_json: bool) -> None:
    """Show the engine's output of a replica, or of a model's replicas."""

    async def run(admin: Admin) -> None:
        replica_ids = await _replica_ids(admin, name)
        prefixed = len(replica_ids) > 1
        async with asyncio.TaskGroup() as tasks:
            for replica_id in replica_ids:
                tasks.create_task(_print(admin, replica_id, tail, follow, prefixed, as_json))

    try:
        cluster.ask(run)
    except* click.ClickException as group:
        raise group.exceptions[0] from None


async def _replica_ids(admin: Admin, name: str) -> list[str]:
    """The replica of that name, else all replicas of the model (or alias) of that name."""
    replicas = (await admin.replicas()).value.replicas
    if any(r.replica_id == name for r in replicas):
        return [name]
    model = (await admin.model(name)).value.name
    found = [r.replica_id for r in replicas if r.model == model]
    if not found:
        raise click.ClickException(
            f"model {model} has no replica now, so no engine output; `stoker decisions --model"
            f" {model}` shows what happened to it"
        )
    return found


async def _print(
    admin: Admin, replica_id: str, tail: int, follow: bool, prefixed: bool, as_json: bool
) -> None:
    async for line in admin.logs(replica_id, tail, follow):
        text = line.decode(errors="replace").rstrip("\n")
        if as_json:
            text = msgspec.json.encode({"replica_id": replica_id, "line": text}).decode()
        elif prefixed:
            text = f"{replica_id} | {text}"
        echo_untrusted(text)
