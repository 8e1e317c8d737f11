"""`stoker cordon`, `uncordon` and `drain`: taking a host out of use, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.text import json_option, show
from cli.where import Where

if TYPE_CHECKING:
    from scheduler import views


def _set(where: Where, node: str, action: str, as_json: bool) -> None:
    show(where.ask(lambda admin: admin.set_node(node, action)), as_json, _sentence)


def _sentence(node: views.NodeView) -> str:
    if node.state == "ready":
        return f"{node.node_id} takes replicas"
    left = f"; {node.replicas} replicas left on it" if node.replicas else "; nothing runs on it"
    return f"{node.node_id} is {node.state}{left}"


@click.command()
@click.argument("node")
@json_option
@click.pass_obj
def cordon(where: Where, node: str, as_json: bool) -> None:
    """Place nothing new on NODE."""
    _set(where, node, "cordon", as_json)


@click.command()
@click.argument("node")
@json_option
@click.pass_obj
def uncordon(where: Where, node: str, as_json: bool) -> None:
    """Let NODE take replicas again."""
    _set(where, node, "uncordon", as_json)


@click.command()
@click.argument("node")
@json_option
@click.pass_obj
def drain(where: Where, node: str, as_json: bool) -> None:
    """Cordon NODE and let its replicas finish and stop."""
    _set(where, node, "drain", as_json)
