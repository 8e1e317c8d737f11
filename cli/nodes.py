"""`stoker cordon`, `uncordon`, `drain`, `quarantine`, `release`: out of use, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.cluster import ClusterAccess
from cli.text import json_option, show

if TYPE_CHECKING:
    from scheduler.admin import views


def _set(cluster: ClusterAccess, node: str, action: str, as_json: bool) -> None:
    show(cluster.ask(lambda admin: admin.set_node(node, action)), as_json, _sentence)


def _sentence(node: views.NodeView) -> str:
    if node.state == "ready":
        return f"{node.node_id} takes replicas"
    left = f"; {node.replicas} replicas left on it" if node.replicas else "; nothing runs on it"
    return f"{node.node_id} is {node.state}{left}"


@click.command()
@click.argument("node")
@json_option
@click.pass_obj
def cordon(cluster: ClusterAccess, node: str, as_json: bool) -> None:
    """Place nothing new on NODE."""
    _set(cluster, node, "cordon", as_json)


@click.command()
@click.argument("node")
@json_option
@click.pass_obj
def uncordon(cluster: ClusterAccess, node: str, as_json: bool) -> None:
    """Let NODE take replicas again."""
    _set(cluster, node, "uncordon", as_json)


@click.command()
@click.argument("node")
@click.option(
    "--deadline",
    "deadline_s",
    type=click.FloatRange(0, 86400),
    default=300.0,
    show_default=True,
    help="Seconds; what could not move elsewhere by then stops.",
)
@json_option
@click.pass_obj
def drain(cluster: ClusterAccess, node: str, deadline_s: float, as_json: bool) -> None:
    """Cordon NODE and move its models off, or stop them.

    A model that is called serves elsewhere before its replica here goes.
    """
    show(cluster.ask(lambda admin: admin.drain(node, deadline_s)), as_json, _sentence)


@click.command()
@click.argument("node")
@click.argument("device")
@click.option("--reason", default="set aside by an operator", show_default=True)
@json_option
@click.pass_obj
def quarantine(cluster: ClusterAccess, node: str, device: str, reason: str, as_json: bool) -> None:
    """Use DEVICE of NODE no more.

    Its models move to other devices. `stoker devices` shows why a device is set aside.
    """
    words = f"{device} of {node} takes no replicas any more: {reason}"
    show(
        cluster.ask(lambda admin: admin.quarantine(node, device, reason)), as_json, lambda _: words
    )


@click.command()
@click.argument("node")
@click.argument("device")
@json_option
@click.pass_obj
def release(cluster: ClusterAccess, node: str, device: str, as_json: bool) -> None:
    """Use a quarantined DEVICE of NODE again."""
    words = f"{device} of {node} takes replicas again"
    show(cluster.ask(lambda admin: admin.release(node, device)), as_json, lambda _: words)
