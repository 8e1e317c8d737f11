"""`stoker key`, `tenant`, `token`, `usage`: who may call, how much, and what they used."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.cluster import ClusterAccess
from cli.tables import table
from cli.text import Group, age, json_option, show

if TYPE_CHECKING:
    from rich.table import Table

    from cli.client import Admin
    from runtime.contract.access import Limits, Scope, Tenant
    from scheduler.admin.handlers import access_api

F = TypeVar("F", bound=Callable[..., Any])

_LIMITS = ("requests_per_min", "tokens_per_min", "concurrent", "tokens_per_day", "gpu_s_per_day")
_SHORT = ("req/min", "tok/min", "at once", "tok/day", "GPU s/day")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType[float]):
    """`90s`, `15m`, `24h` or `30d`, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Seconds of a duration such as 90s, 15m, 24h or 30d."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
        if not found:
            self.fail(f"{value!r} is not a duration; write e.g. 90s, 15m, 24h or 30d", param, ctx)
        return float(found[1]) * _UNITS_S[found[2]]


def _limit_options(command: F) -> F:
    """What keys and tenants are both held to; 0 takes a limit away."""
    whole, number = click.IntRange(0), click.FloatRange(0)
    options = [
        click.option("--model", "models", metavar="PATTERN", multiple=True, help="e.g. 'llama-*'."),
        click.option("--endpoint", "endpoints", metavar="PATTERN", multiple=True,
                     help="e.g. '/v1/chat/*'."),
        click.option("--priority", type=click.Choice(["high", "normal", "low"]),
                     help="Who waits for whom."),
        click.option("--rpm", "requests_per_min", type=whole, help="Requests a minute."),
        click.option("--tpm", "tokens_per_min", type=whole, help="Tokens a minute."),
        click.option("--concurrent", type=whole, help="Requests at one time."),
        click.option("--tokens-per-day", type=whole, help="Tokens a day (UTC)."),
        click.option("--gpu-s-per-day", type=number, help="GPU-seconds a day (UTC)."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _changed(limits: Limits, scope: Scope, options: dict[str, Any]) -> dict[str, Any]:
    """Limits and scope with what the options say; those that are not given stay."""
    import msgspec

    given = {n: options[n] or None for n in _LIMITS if options[n] is not None}
    reach = {n: options[n] for n in ("models", "endpoints") if options[n]}
    return {
        "limits": msgspec.structs.replace(limits, **given),
        "scope": msgspec.structs.replace(scope, **reach),
    }


# ------------------------------------------------------------------------------------- keys


@click.group(cls=Group)
def key() -> None:
    """Make, list, change, rotate and revoke API keys."""


@key.command()
@click.argument("tenant")
@click.option("--note", default="", help="What it is for.")
@click.option("--expires", metavar="IN", type=Duration(), help="e.g. 30d; left out: never.")
@_limit_options
@json_option
@click.pass_obj
def create(
    cluster: ClusterAccess,
    /,
    tenant: str,
    note: str,
    expires: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a key for TENANT and print its secret, this once."""
    from runtime.contract.access import ANY, NO_LIMITS, KeySpec

    spec = KeySpec(
        tenant=tenant, note=note, priority=options["priority"],
        expires_at=time.time() + expires if expires else None,
        **_changed(NO_LIMITS, ANY, options),
    )  # fmt: skip
    show(cluster.ask(lambda admin: admin.create_key(spec)), as_json, _secret)


def _secret(made: access_api.NewKey) -> str:
    if made.first:
        click.echo(
            "it is the first key: calls without one are refused from now on, also from this host"
            ' (router.anonymous = "on" lets them in)',
            err=True,
        )
    click.echo(f"key {made.key.key_id} of tenant {made.key.tenant}; this is shown once:", err=True)
    return made.token


@key.command(name="ls")
@json_option
@click.pass_obj
def key_ls(cluster: ClusterAccess, as_json: bool) -> None:
    """List the keys."""
    show(cluster.ask(lambda admin: admin.keys()), as_json, _keys_table)


def _keys_table(answer: access_api.Keys) -> Table | str:
    if not answer.keys:
        return "no API keys: make one with `stoker key create TENANT`"
    now = time.time()
    columns = (
        "KEY",
        "TENANT",
        "?PRIORITY",
        "~MAY CALL",
        "~LIMITS",
        "?>AGE",
        "?EXPIRES IN",
        "?~NOTE",
    )
    return table(columns, (
        (
            k.key_id, k.tenant, k.priority or "its tenant's", _scope_text(k.scope),
            _limits_text(k.limits), age(now - k.created_at),
            age(max(0.0, k.expires_at - now)) if k.expires_at else "never", k.note,
        )
        for k in answer.keys
    ))  # fmt: skip


def _limits_text(limits: Limits) -> str:
    pairs = zip(_LIMITS, _SHORT, strict=True)
    texts = [f"{value:g} {short}" for n, short in pairs if (value := getattr(limits, n))]
    return ", ".join(texts) or "none"


def _scope_text(scope: Scope) -> str:
    return " ".join([*scope.models, *scope.endpoints]) or "everything"


@key.command(name="set")
@click.argument("key_id", metavar="KEY")
@click.option("--note", help="What it is for.")
@click.option("--expires", metavar="IN", type=Duration(), help="e.g. 30d, from now.")
@_limit_options
@json_option
@click.pass_obj
def key_set(
    cluster: ClusterAccess,
    /,
    key_id: str,
    note: str | None,
    expires: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Change what KEY may; what is not named stays. A limit of 0 is none."""
    from runtime.contract.access import KeySpec

    async def run(admin: Admin) -> Any:
        old = (await admin.key(key_id)).value
        spec = KeySpec(
            tenant=old.tenant, note=old.note if note is None else note,
            priority=options["priority"] or old.priority,
            expires_at=time.time() + expires if expires else old.expires_at,
            **_changed(old.limits, old.scope, options),
        )  # fmt: skip
        return await admin.put_key(key_id, spec)

    show(cluster.ask(run), as_json, lambda k: f"key {k.key_id}: limits {_limits_text(k.limits)}")


@key.command()
@click.argument("key_id", metavar="KEY")
@click.option("--grace", default="24h", show_default=True, type=Duration(),
              help="How long the old secret still opens; 0s: not at all.")  # fmt: skip
@json_option
@click.pass_obj
def rotate(cluster: ClusterAccess, key_id: str, grace: float, as_json: bool) -> None:
    """Give KEY a new secret and print it, this once."""
    show(cluster.ask(lambda admin: admin.rotate_key(key_id, grace)), as_json, _secret)


@key.command(name="rm")
@click.argument("key_ids", metavar="KEY...", nargs=-1, required=True)
@json_option
@click.pass_obj
def key_rm(cluster: ClusterAccess, key_ids: tuple[str, ...], as_json: bool) -> None:
    """Revoke keys; they open nothing from the next request on."""
    _remove(cluster, key_ids, as_json, "revoked", lambda admin: admin.revoke_key)


def _remove(
    cluster: ClusterAccess,
    names: tuple[str, ...],
    as_json: bool,
    word: str,
    how: Callable[[Admin], Any],
) -> None:
    async def run(admin: Admin) -> None:
        for name in names:
            await how(admin)(name)
            click.echo(json.dumps({word: name}) if as_json else f"{word} {name}")

    cluster.ask(run)


# ------------------------------------------------------------------------------------- tenants


@click.group(cls=Group)
def tenant() -> None:
    """List tenants, set their limits, and print a webhook key."""


@tenant.command(name="ls")
@json_option
@click.pass_obj
def tenant_ls(cluster: ClusterAccess, as_json: bool) -> None:
    """List the tenants."""
    show(cluster.ask(lambda admin: admin.tenants()), as_json, _tenants_table)


def _tenants_table(answer: access_api.Tenants) -> Table | str:
    if not answer.tenants:
        return "no tenants: the first key of one makes it"
    columns = ("TENANT", ">WEIGHT", "PRIORITY", "~MAY CALL", "~LIMITS")
    return table(columns, (
        (t.name, f"{t.weight:g}", t.priority, _scope_text(t.scope), _limits_text(t.limits))
        for t in answer.tenants
    ))  # fmt: skip


@tenant.command(name="set")
@click.argument("name")
@click.option("--weight", type=click.FloatRange(0, 1000, min_open=True),
              help="Its share of a busy model, against the others'.")  # fmt: skip
@_limit_options
@json_option
@click.pass_obj
def tenant_set(
    cluster: ClusterAccess, /, name: str, weight: float | None, as_json: bool, **options: Any
) -> None:
    """Set what all keys of tenant NAME may together; what is not named stays."""
    from runtime.contract.access import Tenant

    async def run(admin: Admin) -> Any:
        known = {t.name: t for t in (await admin.tenants()).value.tenants}
        old = known.get(name) or Tenant(name=name)
        changed = Tenant(
            name=name, weight=weight or old.weight, priority=options["priority"] or old.priority,
            **_changed(old.limits, old.scope, options),
        )  # fmt: skip
        return await admin.put_tenant(changed)

    show(cluster.ask(run), as_json, _tenant_text)


def _tenant_text(t: Tenant) -> str:
    return f"tenant {t.name}: weight {t.weight:g}, {t.priority}, limits {_limits_text(t.limits)}"


@tenant.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
@click.pass_obj
def tenant_rm(cluster: ClusterAccess, names: tuple[str, ...], as_json: bool) -> None:
    """Forget tenants that have no keys."""
    _remove(cluster, names, as_json, "removed", lambda admin: admin.remove_tenant)


@tenant.command(name="webhook-key")
@click.argument("name", metavar="TENANT")
@json_option
@click.pass_obj
def tenant_webhook_key(cluster: ClusterAccess, name: str, as_json: bool) -> None:
    """Print the secret that TENANT's receivers verify its webhooks with.

    It is computed from router.webhook_secret of the config, so run it where that is set, e.g. on
    a router's host. Callers without a key are the tenant "anonymous".
    """
    import msgspec

    from runtime.contract.access import TenantName
    from runtime.router.jobs import signing

    try:
        msgspec.convert(name, TenantName)
    except msgspec.ValidationError as error:
        raise click.BadParameter(f"{name!r} is not a tenant's name: {error}") from None
    secret = cluster.load_config().router.webhook_secret
    if not secret:
        raise click.ClickException(
            "the config has no router.webhook_secret, so no webhooks are sent; name the router's"
            " config with --config, or set it to what `openssl rand -base64 32` prints"
        )
    try:
        master = signing.key_of(secret)
    except ValueError as error:
        raise click.ClickException(f"router.webhook_secret {error}") from None
    made = signing.secret_of(signing.tenant_key(master, name))
    shown = {"tenant": name, "secret": made}
    click.echo(msgspec.json.encode(shown).decode() if as_json else made)


# ------------------------------------------------------------------------------------- tokens


@click.group(cls=Group)
def token() -> None:
    """Make, list and revoke tokens for the admin API."""


@token.command(name="create")
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator", "admin"]), default="viewer",
              show_default=True, help="Reads; steers what runs; does all.")  # fmt: skip
@click.option("--expires", metavar="IN", type=Duration(), help="e.g. 30d; left out: never.")
@json_option
@click.pass_obj
def token_create(
    cluster: ClusterAccess, name: str, role: Any, expires: float | None, as_json: bool
) -> None:
    """Make a token for NAME (a person or a program) and print it, this once."""
    from scheduler.admin.handlers.access_api import TokenBody

    expires_at = time.time() + expires if expires else None
    body = TokenBody(name=name, role=role, expires_at=expires_at)
    show(cluster.ask(lambda admin: admin.create_token(body)), as_json, lambda made: made.token)


@token.command(name="ls")
@json_option
@click.pass_obj
def token_ls(cluster: ClusterAccess, as_json: bool) -> None:
    """List the tokens."""
    show(cluster.ask(lambda admin: admin.tokens()), as_json, _tokens_table)


def _tokens_table(answer: access_api.Tokens) -> Table | str:
    if not answer.tokens:
        return "no admin tokens: the cluster token alone opens the admin API"
    now = time.time()
    return table(("TOKEN", "NAME", "ROLE", ">AGE", "EXPIRES IN"), (
        (
            t.token_id, t.name, t.role, age(now - t.created_at),
            age(max(0.0, t.expires_at - now)) if t.expires_at else "never",
        )
        for t in answer.tokens
    ))  # fmt: skip


@token.command(name="rm")
@click.argument("token_ids", metavar="TOKEN...", nargs=-1, required=True)
@json_option
@click.pass_obj
def token_rm(cluster: ClusterAccess, token_ids: tuple[str, ...], as_json: bool) -> None:
    """Revoke tokens."""
    _remove(cluster, token_ids, as_json, "revoked", lambda admin: admin.revoke_token)


# ------------------------------------------------------------------------------------- use


@click.command()
@click.option("--day", metavar="DATE", help="As in 2026-11-25 (UTC); left out: today.")
@json_option
@click.pass_obj
def usage(cluster: ClusterAccess, day: str | None, as_json: bool) -> None:
    """List what keys and tenants used of a day."""
    show(cluster.ask(lambda admin: admin.use(day)), as_json, _use_table)


def _use_table(answer: access_api.Use) -> Table | str:
    if not answer.accounts:
        return f"no key was used on {answer.day}"
    columns = ("ACCOUNT", ">REQUESTS", ">TOKENS", ">GPU SECONDS", ">IN FLIGHT")
    return table(columns, (
        (a.account, str(a.requests), str(a.tokens), f"{a.gpu_s:.1f}", str(a.in_flight))
        for a in answer.accounts
    ))  # fmt: skip
