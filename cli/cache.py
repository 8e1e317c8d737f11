"""`stoker cache`: the models on the nodes' disks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import Group, age, json_option, show, size

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.checkpoints.model_files import PullView
    from scheduler.admin import cache_client

node_option = click.option("--node", help="Only this node's; otherwise every node's.")


@click.group(cls=Group)
def cache() -> None:
    """List, fetch, remove and check the models on the nodes' disks."""


@cache.command()
@node_option
@json_option
@click.pass_obj
def ls(cluster: ClusterAccess, node: str | None, as_json: bool) -> None:
    """List cached models and running pulls, with their progress."""
    show(cluster.ask(lambda admin: admin.caches(node)), as_json, _cache_table)


def _cache_table(answer: cache_client.Caches) -> Table | str:
    columns = (
        "NODE",
        "MODEL",
        "?REVISION",
        ">SIZE",
        "?>IN MEMORY",
        "!STATE",
        "?>LAST USED",
        "~NOTE",
    )
    rows = [row for entry in answer.nodes for row in _rows(entry)]
    return table(columns, rows) if rows else "no models are cached and none is being fetched"


def _rows(entry: cache_client.NodeCache) -> Iterable[tuple[str, ...]]:
    if entry.cache is None:
        yield (entry.node_id, "-", "", "", "", "unknown", "", entry.error or "")
        return
    for model in entry.cache.models:
        used_by = f"used by {', '.join(model.held_by)}" if model.held_by else ""
        sizes = (size(model.size_bytes), size(model.resident_bytes))
        about = (model.model, model.revision[:12], *sizes)
        yield (entry.node_id, *about, "cached", age(model.idle_s), used_by)
    for pull in entry.cache.pulls:
        if pull.state != "ready":
            revision = (pull.revision or "")[:12]
            done = f"{size(pull.done_bytes)} of {size(pull.total_bytes)}"
            yield (entry.node_id, pull.model, revision, done, "", pull.state, "", _progress(pull))


def _progress(pull: PullView) -> str:
    if pull.error:
        return pull.error
    left = f", {age(pull.eta_s)} left" if pull.eta_s is not None else ""
    return f"from {pull.origin} at {size(pull.rate_bytes_per_s)}/s{left}"


@cache.command()
@click.argument("model")
@click.option("--node", "nodes", multiple=True, help="To this node; may be given several times.")
@click.option("--count", type=click.IntRange(min=1), help="To so many nodes. Default: all.")
@click.option("--refresh", is_flag=True, help="Ask the hub again what the revision means.")
@json_option
@click.pass_obj
def pull(
    cluster: ClusterAccess, model: str, nodes: tuple[str, ...], count: int | None, refresh: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Fetch MODEL (hf:org/name[@revision] or s3://…) before it is needed."""
    from scheduler.admin.cache_client import CachePullBody

    body = CachePullBody(model=model, nodes=nodes, count=count, refresh=refresh)
    answer = cluster.ask(lambda admin: admin.cache_pull(body))
    show(answer, as_json, _pull_text)
    _fail_if(not answer.value.nodes or any(n.error for n in answer.value.nodes))


def _pull_text(answer: cache_client.Pulls) -> str:
    return "\n".join(f"{n.node_id}: {_pull_state(n)}" for n in answer.nodes) or "no node is up"


def _pull_state(node: cache_client.NodePull) -> str:
    if node.error:
        return node.error
    return "has it already" if node.pull is None else f"{node.pull.state}; see `stoker cache ls`"


@cache.command()
@click.argument("model")
@node_option
@json_option
@click.pass_obj
def rm(cluster: ClusterAccess, model: str, node: str | None, as_json: bool) -> None:
    """Remove MODEL from caches; one in use is kept."""
    answer = cluster.ask(lambda admin: admin.cache_remove(model, node))
    show(answer, as_json, _removal_text)
    _fail_if(_undone(answer.value.nodes))


def _removal_text(answer: cache_client.Removals) -> str:
    return "\n".join(
        f"{n.node_id}: {n.error or f'freed {size(n.freed_bytes)}'}" for n in answer.nodes
    )


@cache.command()
@click.argument("model")
@node_option
@json_option
@click.pass_obj
def verify(cluster: ClusterAccess, model: str, node: str | None, as_json: bool) -> None:
    """Read every file of MODEL again and compare it with its hash."""
    answer = cluster.ask(lambda admin: admin.cache_verify(model, node))
    show(answer, as_json, _verdict_text)
    bad = any(n.report and n.report.bad_files for n in answer.value.nodes)
    _fail_if(bad or _undone(answer.value.nodes))


def _verdict_text(answer: cache_client.Verdicts) -> str:
    return "\n".join(f"{n.node_id}: {_verdict(n)}" for n in answer.nodes)


def _verdict(node: cache_client.NodeVerdict) -> str:
    if node.report is None:
        return node.error or "no answer"
    bad = node.report.bad_files
    checked = f"{size(node.report.checked_bytes)} checked"
    return f"{checked}, BAD: {', '.join(bad)} {node.report.note}" if bad else f"{checked}, all good"


def _undone(nodes: Sequence[cache_client.NodeRemoval | cache_client.NodeVerdict]) -> bool:
    """Whether a node that has the model failed, or none has it."""
    return all(n.missing for n in nodes) or any(n.error and not n.missing for n in nodes)


def _fail_if(failed: bool) -> None:
    """Status 1 where a node did not do it; the answer says which, and why."""
    if failed:
        raise click.exceptions.Exit(1)
