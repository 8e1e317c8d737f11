"""`stoker model …`, `load`, `unload`, `pin`, `unpin`: which models there are, and which run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import Group, age, json_option, print_json, show, size, waiting

if TYPE_CHECKING:
    from rich.table import Table

    from cli.client import Admin, Reply
    from runtime.wire.model_spec import ModelSpec
    from runtime.wire.names import Floor
    from scheduler.admin import views

_POLL_S = 0.3


@click.group(cls=Group)
def model() -> None:
    """Add, show and remove models."""


@model.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option("--new", is_flag=True, help="Fail where a model of that name exists already.")
@json_option
@click.pass_obj
def add(cluster: ClusterAccess, files: tuple[str, ...], new: bool, as_json: bool) -> None:
    """Add or change the models of each FILE (YAML, TOML or JSON).

    A spec that changes restarts nothing unless the engine's own arguments changed; then each
    replica is replaced when it falls idle.
    """
    specs = [spec for file in files for spec in read_specs(file)]

    async def run(admin: Admin) -> None:
        for spec in specs:
            with waiting(f"checking {spec.name}", quiet=True):  # a node's first check takes long
                saved = await _save(admin, spec, new)
            show(saved, as_json, _saved_text)

    cluster.ask(run)


async def _save(admin: Admin, spec: ModelSpec, new: bool) -> Reply[views.Saved]:
    """Raises AdminError that names the model: a file may hold several."""
    from cli.client import AdminError

    try:
        return await (admin.add(spec) if new else admin.put(spec))
    except AdminError as error:
        if error.status not in (409, 422):
            raise
        raise AdminError(f"model {spec.name}: {error.message}", error.status) from None


@model.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@json_option
def check(files: tuple[str, ...], as_json: bool) -> None:
    """Check each FILE without adding anything; needs no cluster."""
    specs = [spec for file in files for spec in read_specs(file)]
    from msgspec import json as msgspec_json

    from runtime.contract.schema import SchemaError
    from runtime.contract.spec_file import name_clashes

    clashes = name_clashes(specs)
    if clashes:
        raise click.ClickException(str(SchemaError(clashes)))
    if as_json:
        print_json(msgspec_json.encode(specs))
    else:
        names = ", ".join(spec.name for spec in specs)
        click.echo(f"ok: {names}. Engine arguments are checked by a node, when a model is added.")


def read_specs(file: str) -> list[ModelSpec]:
    """The models of a file. Raises click.ClickException that names the file and every problem."""
    from runtime.contract.schema import SchemaError
    from runtime.contract.spec_file import load_specs

    try:
        return load_specs(Path(file))
    except SchemaError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise click.ClickException(f"{file}:\n{lines}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"can't read {file}: {error}") from None


def how_saved(saved: views.Saved) -> str:
    """In one word."""
    return "added" if saved.created else "changed" if saved.changed else "unchanged"


def _saved_text(saved: views.Saved) -> str:
    done = how_saved(saved)
    checked = saved.checked_against or "nothing: no node with this engine has reported"
    lines = [
        f"{done} {saved.model.name}: {size(saved.model.device_memory_bytes)} a replica"
        f" ({saved.model.memory_from}); engine arguments checked against {checked}"
    ]
    if saved.model.estimate:
        lines.append(f"  {saved.model.estimate.explanation}")
    if saved.model.problem:
        lines.append(f"  {_says(saved.model)}: {saved.model.problem}")
    return "\n".join(lines + [f"  {note}" for note in saved.notes])


def _says(model: views.ModelView) -> str:
    """What its problem means for it now."""
    if model.warmth == "starting":
        return "it is on its way"
    return "it waits" if model.waiting else "it can't run now"


@model.command()
@json_option
@click.pass_obj
def ls(cluster: ClusterAccess, as_json: bool) -> None:
    """List the models."""
    show(cluster.ask(lambda admin: admin.models()), as_json, _models_table)


def _models_table(answer: views.Models) -> Table | str:
    if not answer.models:
        return "no models: add one with `stoker model add FILE`"
    columns = (
        "MODEL", "!WARMTH", ">MEMORY", ">READY", "?>WANTED", "?>WAITING", "?>IN FLIGHT", "?>IDLE",
        "?SOURCE", "~NOTE",
    )  # fmt: skip
    return table(columns, (_model_row(m) for m in answer.models))


def _model_row(m: views.ModelView) -> tuple[str, ...]:
    memory = size(m.device_memory_bytes) + (" est." if m.memory_from == "estimated" else "")
    notes = [
        "pinned" if m.pinned else "",
        "stub engine" if m.spec.engine == "stub" else "",
        m.problem or "",
    ]
    return (
        m.name,
        m.warmth,
        memory,
        f"{m.ready}/{m.replicas}",
        str(m.wanted),
        str(m.waiting),
        str(m.in_flight),
        age(m.idle_for_s),
        m.spec.source,
        "; ".join(filter(None, notes)),
    )


@model.command(name="show")
@click.argument("name")
@json_option
@click.pass_obj
def show_(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Show one model: its spec and where it stands."""
    show(cluster.ask(lambda admin: admin.model(name)), as_json, _model_details)


def _model_details(m: views.ModelView) -> str:
    import msgspec
    import yaml

    facts = {
        "warmth": m.warmth,
        "memory": f"{size(m.device_memory_bytes)} a replica ({m.memory_from})",
        "estimate": m.estimate.explanation if m.estimate else None,
        "replicas": f"{m.ready} ready of {m.replicas}, {m.wanted} wanted",
        "requests": f"{m.in_flight} in flight, {m.waiting} waiting",
        "idle": age(m.idle_for_s),
        "pinned": "yes" if m.pinned else "no",
        "problem": m.problem,
        "retry in": age(m.retry_after_s) if m.retry_after_s else None,
    }
    lines = [f"{key + ':':10}{value}" for key, value in facts.items() if value is not None]
    spec = yaml.safe_dump(msgspec.to_builtins(m.spec), sort_keys=False).rstrip()
    return "\n".join([m.name, *(f"  {line}" for line in lines), "spec:", _indented(spec)])


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


@model.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
@click.pass_obj
def rm(cluster: ClusterAccess, names: tuple[str, ...], as_json: bool) -> None:
    """Remove models; their replicas finish what is in flight first."""

    async def run(admin: Admin) -> None:
        for name in names:
            await admin.remove(name)
            click.echo(json.dumps({"removed": name}) if as_json else f"removed {name}")

    cluster.ask(run)


@model.command()
@click.option("--json", "as_json", is_flag=True, help="It is JSON anyway.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a spec, for editors; needs no cluster."""
    from runtime.contract.spec_file import json_schema

    click.echo(json.dumps(json_schema(), indent=None if as_json else 2))


@click.command()
@click.argument("name", metavar="MODEL")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option("--no-wait", is_flag=True, help="Return once the scheduler has accepted it.")
@json_option
@click.pass_obj
def load(cluster: ClusterAccess, name: str, replicas: int, no_wait: bool, as_json: bool) -> None:
    """Start MODEL now and wait until it serves."""

    async def run(admin: Admin) -> Reply[views.ModelView]:
        reply = await admin.load(name, replicas)
        return reply if no_wait else await _until_ready(admin, reply, replicas)

    show(cluster.ask(run), as_json, _load_text)


def _load_text(m: views.ModelView) -> str:
    return f"{m.name}: {m.ready} ready of {m.replicas} replicas, {m.wanted} wanted"


async def _until_ready(
    admin: Admin, reply: Reply[views.ModelView], replicas: int
) -> Reply[views.ModelView]:
    """Polls until enough replicas are ready. Raises click.ClickException if it can't be."""

    wanted = min(replicas, reply.value.spec.max_replicas)
    with waiting(f"{reply.value.name}: asked for {wanted}") as status:
        while reply.value.ready < wanted:
            problem = reply.value.problem
            if reply.value.warmth == "failed" or (problem and not reply.value.replicas):
                raise click.ClickException(f"{reply.value.name} can't be started: {problem}")
            status(await _progress(admin, reply.value))
            await asyncio.sleep(_POLL_S)
            reply = await admin.model(reply.value.name)
    return reply


async def _progress(admin: Admin, m: views.ModelView) -> str:
    mine = [r for r in (await admin.replicas()).value.replicas if r.model == m.name]
    parts = [
        f"{r.replica_id} {r.state} on {r.node_id}" + (f" ({r.reason})" if r.reason else "")
        for r in mine
    ]
    return f"{m.name}: " + ("; ".join(parts) or m.problem or "waiting for the scheduler")


@click.command()
@click.argument("name", metavar="MODEL")
@json_option
@click.pass_obj
def unload(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Stop every replica of MODEL; the next request starts it again."""
    show(cluster.ask(lambda admin: admin.unload(name)), as_json, _load_text)


def _pin(cluster: ClusterAccess, name: str, pinned: bool, as_json: bool) -> None:
    show(cluster.ask(lambda admin: admin.pin(name, pinned)), as_json, _pin_text)


def _pin_text(m: views.ModelView) -> str:
    return f"{m.name} is {'pinned' if m.pinned else 'not pinned'}"


@click.command()
@click.argument("name", metavar="MODEL")
@json_option
@click.pass_obj
def pin(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Keep MODEL from being evicted or stopped when idle."""
    _pin(cluster, name, True, as_json)


@click.command()
@click.argument("name", metavar="MODEL")
@json_option
@click.pass_obj
def unpin(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Let MODEL be evicted and stopped when idle again."""
    _pin(cluster, name, False, as_json)


@click.command()
@click.argument("name", metavar="MODEL")
@click.option("--rung", type=click.Choice(["hot", "asleep"]), default="hot", show_default=True)
@click.option("--by", help="ISO 8601 with a time zone, e.g. 2026-11-24T08:00+01:00; default now.")
@click.option("--for", "for_s", type=float, default=3600.0, show_default=True, help="Seconds.")
@json_option
@click.pass_obj
def prewarm(
    cluster: ClusterAccess, name: str, rung: Floor, by: str | None, for_s: float, as_json: bool
) -> None:
    """Have MODEL warm by a time, and for a while.

    The schedule of its spec goes on beside it.
    """
    from scheduler.admin.views import PrewarmBody

    body = PrewarmBody(rung=rung, by=by, for_s=for_s)
    show(cluster.ask(lambda admin: admin.prewarm(name, body)), as_json, _prewarm_text)


def _prewarm_text(m: views.ModelView) -> str:
    now = f"at least {m.floor} from now on" if m.floor else "not before its time"
    return f"{m.name} is asked to be warm: {now}"
