"""`stoker`: the commands by name, each imported only when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from typing import cast

import click
from click.core import ParameterSource

from cli.text import plain, wrapped

# command -> where it is, and its line in `stoker --help` (a test compares it with the command's)
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "This host": {
        "up": ("cli.up:up", "Run every part on this host until Ctrl-C."),
        "demo": ("cli.demo:demo", "Show a cold start, a warm call and an eviction, for real."),
        "version": (
            "cli.parts:version",
            "Print the versions of Stoker, Python and the engines here.",
        ),
    },
    "Models and calls": {
        "invoke": ("cli.invoke:invoke", "Ask MODEL one thing and stream its answer."),
        "model": ("cli.models:model", "Add, show and remove models."),
        "load": ("cli.models:load", "Start MODEL now and wait until it serves."),
        "unload": (
            "cli.models:unload",
            "Stop every replica of MODEL; the next request starts it again.",
        ),
        "pin": ("cli.models:pin", "Keep MODEL from being evicted or stopped when idle."),
        "unpin": ("cli.models:unpin", "Let MODEL be evicted and stopped when idle again."),
        "prewarm": ("cli.models:prewarm", "Have MODEL warm by a time, and for a while."),
        "route": (
            "cli.routes:route",
            "Send a name's requests to versions of a model: by weight, canary, switch.",
        ),
        "plan": ("cli.plan:plan", "Say what would happen if …, without doing it."),
    },
    "What is going on": {
        "ps": ("cli.status:ps", "List the replicas."),
        "nodes": ("cli.status:nodes", "List the hosts."),
        "devices": ("cli.status:devices", "List the devices and what is booked on them."),
        "queue": ("cli.status:queue", "List the requests that wait for a model."),
        "decisions": ("cli.status:decisions", "List what the scheduler decided, and why."),
        "coldstarts": (
            "cli.measurements:coldstarts",
            "List cold starts and wakes: why, what moved down for them, where the time went.",
        ),
        "footprint": (
            "cli.measurements:footprint",
            "Show what MODEL was declared, estimated and measured to take, and its times.",
        ),
        "logs": (
            "cli.logs:logs",
            "Show the engine's output of a replica, or of a model's replicas.",
        ),
        "audit": ("cli.routes:audit", "List who changed what, when and why."),
    },
    "Hosts and disks": {
        "cordon": ("cli.nodes:cordon", "Place nothing new on NODE."),
        "uncordon": ("cli.nodes:uncordon", "Let NODE take replicas again."),
        "drain": ("cli.nodes:drain", "Cordon NODE and move its models off, or stop them."),
        "quarantine": ("cli.nodes:quarantine", "Use DEVICE of NODE no more."),
        "release": ("cli.nodes:release", "Use a quarantined DEVICE of NODE again."),
        "cache": (
            "cli.cache:cache",
            "List, fetch, remove and check the models on the nodes' disks.",
        ),
    },
    "Who may call": {
        "key": ("cli.keys:key", "Make, list, change, rotate and revoke API keys."),
        "tenant": ("cli.keys:tenant", "List tenants, set their limits, and print a webhook key."),
        "token": ("cli.keys:token", "Make, list and revoke tokens for the admin API."),
        "usage": ("cli.keys:usage", "List what keys and tenants used of a day."),
    },
    "The scheduler in virtual time": {
        "simulate": (
            "cli.simulate:simulate",
            "Run a cluster in virtual time with the production scheduler, agents and router.",
        ),
    },
    "One part, as systemd runs it": {
        "agent": ("cli.parts:agent", "Run the agent of this host."),
        "scheduler": ("cli.parts:scheduler", "Run the scheduler and its admin API."),
        "router": ("cli.parts:router", "Run a router: the OpenAI API."),
    },
}
COMMANDS = {name: where for group in GROUPS.values() for name, where in group.items()}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None: there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return cast(click.Command, getattr(importlib.import_module(module), attribute))

    def invoke(self, ctx: click.Context) -> object:
        """An error may quote a model or an engine: nothing of it may steer the terminal."""
        try:
            return super().invoke(ctx)
        except click.UsageError:
            raise  # of what was typed
        except click.ClickException as error:
            raise click.ClickException(wrapped(plain(error.message), len("Error: "))) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of `stoker --help`, by group."""
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])


def _url(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """An address as it was given. Raises click.BadParameter."""
    if value and not value.lower().startswith(("http://", "https://")):
        raise click.BadParameter(f"{value!r} is not a URL; write http://HOST:PORT")
    return value


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE", help="TOML settings; default /etc/stoker/stoker.toml.")
@click.option(
    "--admin",
    metavar="URL",
    envvar="STOKER_ADMIN",
    callback=_url,
    help="The scheduler's admin API.",
)
@click.option(
    "--router", metavar="URL", envvar="STOKER_ROUTER", callback=_url, help="A router's address."
)
@click.option(
    "--token",
    envvar="STOKER_CLUSTER_TOKEN",
    help="The cluster's or an admin token; others on this host can read it: use --token-file.",
)
@click.option(
    "--token-file",
    metavar="FILE",
    envvar="STOKER_TOKEN_FILE",
    help="A file that holds the token; '-' reads it from standard input.",
)
@click.version_option(package_name="stoker-serve", prog_name="stoker")
@click.pass_context
def stoker(ctx: click.Context, /, token_file: str | None, **options: str | None) -> None:
    """Serverless LLM inference on bare GPU hosts.

    Which cluster a command talks to: --admin, --router and --token-file (or STOKER_CLUSTER_TOKEN);
    else the one --config names; else the one that `stoker up` runs in this folder (its state is in
    .stoker, or $STOKER_STATE_DIR); else the one /etc/stoker/stoker.toml names.
    """
    from cli.cluster import ClusterAccess, read_token

    given = ctx.get_parameter_source("token")
    if given is ParameterSource.COMMANDLINE:
        click.echo(
            "Warning: others on this host can read --token in the list of processes: use"
            " --token-file FILE, or set STOKER_CLUSTER_TOKEN",
            err=True,
        )
    elif token_file:
        options["token"] = read_token(token_file)
    ctx.obj = ClusterAccess(**options)


def main(argv: list[str] | None = None) -> None:
    """The entry point: errors in words on stderr, status 1, or 2 for a usage error."""
    try:
        stoker.main(args=argv, prog_name="stoker")
    except BrokenPipeError:  # e.g. `stoker logs … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("STOKER_DEBUG"):
            raise
        kind = type(error).__name__
        click.echo(f"Error: {kind}: {error} (STOKER_DEBUG=1 shows where)", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
