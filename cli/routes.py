"""`stoker route …` and `stoker audit`: names that stand for versions of a model."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import Group, age, json_option, show

if TYPE_CHECKING:
    from rich.table import Table

    from cli.client import Admin, Reply
    from runtime.wire.routes import RouteRule
    from scheduler.admin import route_views as views

_POLL_S = 0.3
_reason = click.option(
    "--reason", default="asked by an operator", show_default=True, help="For the audit trail."
)


@click.group(cls=Group)
def route() -> None:
    """Send a name's requests to versions of a model: by weight, canary, switch."""


@route.command()
@json_option
@click.pass_obj
def ls(cluster: ClusterAccess, as_json: bool) -> None:
    """List the routes."""
    show(cluster.ask(lambda admin: admin.routes()), as_json, _routes_table)


def _routes_table(answer: views.Routes) -> Table | str:
    if not answer.routes:
        return "no routes: add one with `stoker route set NAME --to MODEL`"
    columns = ("ROUTE", "~TARGETS", "?STICKY", "?~FALLBACK", "?MIRROR", "~UNDER WAY")
    return table(columns, (_route_row(r) for r in answer.routes))


def _route_row(r: views.RouteView) -> tuple[str, ...]:
    mirror = r.rule.mirror
    return (
        r.name,
        ", ".join(f"{t.model} {t.share:g} %" for t in r.targets),
        r.rule.sticky,
        ", ".join(r.rule.fallback),
        f"{mirror.model} {mirror.share:.0%}" if mirror else "",
        _under_way(r),
    )


def _under_way(r: views.RouteView) -> str:
    if r.switch is not None:
        why = f" ({r.switch.problem})" if r.switch.problem else ""
        return (
            f"switch to {r.switch.to}: {r.switch.ready}/{r.switch.replicas} ready{why},"
            f" given up in {age(r.switch.deadline_s)}"
        )
    if r.canary is not None:
        c = r.canary
        return f"canary {c.model} {c.share:g} %, step {c.step} of {c.steps}: {c.waits_for}"
    return ""


@route.command(name="show")
@click.argument("name")
@json_option
@click.pass_obj
def show_(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Show one route: its targets, and what they answered since it was changed."""
    show(cluster.ask(lambda admin: admin.route(name)), as_json, _targets_table)


def _targets_table(r: views.RouteView) -> Table | str:
    rows = (
        (
            t.model,
            t.version or "",
            f"{t.share:g} %",
            t.warmth,
            str(t.ready),
            str(t.requests),
            str(t.errors),
            "-" if t.mean_ttft_s is None else f"{t.mean_ttft_s:.3f}s",
        )
        for t in r.targets
    )
    columns = (
        "TARGET",
        "?VERSION",
        ">SHARE",
        "!WARMTH",
        ">READY",
        ">REQUESTS",
        ">ERRORS",
        "?>TTFT",
    )
    made = table(columns, rows)
    made.title = f"{r.name}, since {age(r.since_s)}" + (f"; {w}" if (w := _under_way(r)) else "")
    made.title_justify = "left"
    return made


@route.command(name="set")
@click.argument("what", metavar="NAME|FILE")
@click.option("--to", "targets", multiple=True, metavar="MODEL[=WEIGHT][@VERSION]")
@click.option("--sticky", default="off", show_default=True, help="off, user or header:NAME.")
@click.option("--fallback", multiple=True, metavar="MODEL", help="May be given several times.")
@click.option("--mirror", metavar="MODEL[=SHARE]", help="SHARE is 0 to 1.")
@click.option("--canary", metavar="MODEL", help="Its share grows by itself, or goes to 0.")
@click.option("--steps", metavar="PERCENT,…", help="The canary's shares.  [default: 5,25,50]")
@click.option("--interval", "interval_s", type=float, help="Seconds of each step.")
@click.option("--min-requests", type=int, help="Of the canary in each step.")
@click.option("--max-error-rate", type=float, help="E.g. 0.02.")
@click.option("--max-ttft-ratio", type=float, help="Its mean TTFT by the others'.")
@json_option
@click.pass_obj
def set_(cluster: ClusterAccess, /, what: str, as_json: bool, **flags: Any) -> None:
    """Add or change a route, whole: NAME with --to, or those of a FILE.

    What is left out is not kept of an older rule. FILE is YAML, TOML or JSON: one route or a list.
    """
    raw = [_from_flags(what, **flags)] if flags["targets"] else _from_file(what)
    rules = [_parsed(what, one) for one in raw]

    async def run(admin: Admin) -> None:
        for rule in rules:
            show(await admin.put_route(rule), as_json, _sentence)

    cluster.ask(run)


def _parsed(what: str, raw: object) -> RouteRule:
    from runtime.contract.route_rules import parse_rule
    from runtime.contract.schema import SchemaError

    try:
        return parse_rule(raw)
    except SchemaError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise click.ClickException(f"route {what}:\n{lines}") from None


def _from_file(file: str) -> list[object]:
    from runtime.contract.schema import SchemaError
    from runtime.contract.spec_file import parse_text

    path = Path(file)
    try:
        raw = parse_text(path.read_text(encoding="utf-8"), path.suffix or ".yaml")
    except SchemaError as error:
        raise click.ClickException(f"{file}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        hint = "; to set a route by its name, give it --to"
        raise click.ClickException(f"can't read {file}: {error}{hint}") from None
    if isinstance(raw, dict) and "routes" in raw:
        raw = raw["routes"]
    return list(raw) if isinstance(raw, list) else [raw]


def _from_flags(
    name: str,
    targets: tuple[str, ...],
    sticky: str,
    fallback: tuple[str, ...],
    mirror: str | None,
    canary: str | None,
    **plan: Any,
) -> dict[str, Any]:
    """The rule as a file would have it. A canary that is no --to is one with weight 0."""
    raw: dict[str, Any] = {"name": name, "targets": [_target(t) for t in targets]}
    raw |= {"sticky": sticky, "fallback": list(fallback)}
    if mirror is not None:
        model, _, share = mirror.partition("=")
        raw["mirror"] = {"model": model, "share": _number("--mirror", share or "1")}
    given = {key: value for key, value in plan.items() if value is not None}
    if canary is not None:
        if "steps" in given:
            given["steps"] = [_number("--steps", part) for part in given["steps"].split(",")]
        raw["canary"] = {"model": canary, **given}
        if all(t["model"] != canary for t in raw["targets"]):
            raw["targets"].append({"model": canary, "weight": 0})
    elif given:
        raise click.UsageError("--steps, --interval and the limits belong to a --canary")
    return raw


def _target(text: str) -> dict[str, Any]:
    text, _, version = text.partition("@")
    model, _, weight = text.partition("=")
    found: dict[str, Any] = {"model": model, "weight": _number("--to", weight or "1")}
    return found | ({"version": version} if version else {})


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"{option}: {text!r} is not a number") from None


def _sentence(r: views.RouteView) -> str:
    shares = ", ".join(f"{t.model} {t.share:g} %" for t in r.targets)
    under_way = _under_way(r)
    return f"{r.name}: {shares}" + (f"; {under_way}" if under_way else "")


@route.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
@click.pass_obj
def rm(cluster: ClusterAccess, names: tuple[str, ...], as_json: bool) -> None:
    """Remove routes; the models they lead to stay."""

    async def run(admin: Admin) -> None:
        for name in names:
            await admin.remove_route(name)
            click.echo(json.dumps({"removed": name}) if as_json else f"removed {name}")

    cluster.ask(run)


@route.command()
@click.argument("name")
@click.argument("to", metavar="MODEL")
@click.option("--deadline", "deadline_s", type=float, default=600.0, show_default=True)
@click.option("--no-wait", is_flag=True, help="Return once the scheduler has accepted it.")
@json_option
@click.pass_obj
def switch(
    cluster: ClusterAccess, name: str, to: str, deadline_s: float, no_wait: bool, as_json: bool
) -> None:
    """Warm MODEL, one of the route's targets, then send it everything.

    Nothing changes until as many of its replicas are ready as serve the route now; if they are not
    within --deadline seconds, nothing changes at all.
    """
    from scheduler.admin.route_views import SwitchBody

    async def run(admin: Admin) -> Reply[views.RouteView]:
        body = SwitchBody(to=to, deadline_s=deadline_s)
        reply = await admin.change_route(name, "switch", body)
        return reply if no_wait else await _until_switched(admin, reply, to)

    show(cluster.ask(run), as_json, _sentence)


async def _until_switched(
    admin: Admin, reply: Reply[views.RouteView], to: str
) -> Reply[views.RouteView]:
    """Polls until it is done. Raises click.ClickException with the reason if it was given up."""
    from cli.text import waiting

    name = reply.value.name
    with waiting(_sentence(reply.value)) as status:
        while reply.value.switch is not None and reply.value.switch.to == to:
            status(_sentence(reply.value))
            await asyncio.sleep(_POLL_S)
            reply = await admin.route(name)
    if all(t.share == 0 or t.model == to for t in reply.value.targets):
        return reply
    last = (await admin.audit(1, name)).value.audit
    raise click.ClickException(f"{name} was not switched: {last[0].reason if last else 'no entry'}")


@route.command()
@click.argument("name")
@_reason
@json_option
@click.pass_obj
def promote(cluster: ClusterAccess, name: str, reason: str, as_json: bool) -> None:
    """Send everything to the route's canary."""
    _end(cluster, name, "promote", reason, as_json)


@route.command()
@click.argument("name")
@_reason
@json_option
@click.pass_obj
def rollback(cluster: ClusterAccess, name: str, reason: str, as_json: bool) -> None:
    """Send nothing to the route's canary any more, or call a pending switch off."""
    _end(cluster, name, "rollback", reason, as_json)


def _end(cluster: ClusterAccess, name: str, action: str, reason: str, as_json: bool) -> None:
    from scheduler.admin.route_views import ReasonBody

    body = ReasonBody(reason=reason)
    show(cluster.ask(lambda admin: admin.change_route(name, action, body)), as_json, _sentence)


@click.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--route", "name", help="Only this route's.")
@json_option
@click.pass_obj
def audit(cluster: ClusterAccess, limit: int, name: str | None, as_json: bool) -> None:
    """List who changed what, when and why."""
    show(cluster.ask(lambda admin: admin.audit(limit, name)), as_json, _audit_table)


def _audit_table(answer: views.Audit) -> Table | str:
    if not answer.audit:
        return "nothing changed yet"
    rows = (
        (
            str(e.number),
            _to_the_second(e.at),
            e.who,
            e.action,
            e.subject,
            _weights(e.old),
            _weights(e.new),
            e.reason,
        )
        for e in sorted(answer.audit, key=lambda e: e.number)
    )
    return table((">#", "AT", "WHO", "ACTION", "~WHAT", "?~FROM", "?~TO", "?~REASON"), rows)


def _to_the_second(at: str) -> str:
    """A time of the audit trail, short enough for a column; --json has all of it."""
    try:
        moment = datetime.fromisoformat(at).astimezone(UTC)
    except ValueError:
        return at
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _weights(rule: dict[str, Any] | None) -> str:
    if rule is None:
        return ""
    return ", ".join(f"{t['model']} {t['weight']:g}" for t in rule.get("targets", ()))
