"""`stoker up`: every part on this host, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.cluster import ClusterAccess, up_state_dir
from cli.text import waiting

if TYPE_CHECKING:
    from cli.cluster import UpFile
    from runtime.contract.config import Config
    from runtime.wire.model_spec import ModelSpec


_NO_VLLM = (
    "vLLM is not installed here, so only `engine: stub` runs: `make setup` installs it, or"
    " agent.engine_python names an interpreter that has it"
)


@click.command()
@click.option("--devices", metavar="WHAT", help="auto, nvml, cpu, cpu:SIZE or simulated:2x24GiB.")
@click.option("--port", type=click.IntRange(0, 65535), help="The router's; 0: a free one. [8080]")
@click.option("--state-dir", metavar="DIR", help="Default $STOKER_STATE_DIR, else ./.stoker.")
@click.option("--models", "model_files", metavar="FILE", multiple=True, help="Models to add.")
@click.option("--consul", metavar="URL", help="Use this Consul instead of a file in the state dir.")
@click.option("--json", "as_json", is_flag=True, help="Print the ready line as JSON.")
@click.pass_obj
def up(
    cluster: ClusterAccess,
    devices: str | None,
    port: int | None,
    state_dir: str | None,
    model_files: tuple[str, ...],
    consul: str | None,
    as_json: bool,
) -> None:
    """Run every part on this host until Ctrl-C.

    That is a scheduler, an agent and a router, each a process of its own that is started again if
    it dies. Models that were added are kept in the state dir for the next time.
    """
    from cli.models import read_specs
    from cli.stack import run_until_signal, running
    from cli.upfiles import make_config

    specs = [spec for file in model_files for spec in read_specs(file)]
    options = {"agent.devices": devices, "router.port": port, "registry.consul_url": consul}
    overrides: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    folder = Path(state_dir) if state_dir else up_state_dir()
    config = make_config(cluster, folder, overrides)

    async def main(hurry: asyncio.Event) -> None:
        async with running(config, notice, hurry) as stack:
            assert stack.urls is not None
            await _add(stack.urls, specs)
            _say_ready(stack.urls, folder, as_json)
            await _say_what_lacks(config)
            await stack.broken()

    run_until_signal(main)


async def _say_what_lacks(config: Config) -> None:
    """What a first call would fail of: an engine, what engines compile with, a key."""
    from importlib.util import find_spec

    from runtime.engine import toolchain

    if not config.agent.engine_python and find_spec("vllm") is None:
        notice(_NO_VLLM)
    elif not config.agent.devices.startswith("simulated"):
        python = config.agent.engine_python or sys.executable
        if lacks := await asyncio.to_thread(toolchain.missing, python):
            notice(lacks)
    if not config.router.lets_anonymous_in():
        notice("callers need an API key: `stoker key create TENANT` makes one")


def notice(text: str) -> None:
    """One line for whoever watches, on stderr."""
    click.echo(text, err=True)


async def _add(urls: UpFile, specs: list[ModelSpec]) -> None:
    from cli.client import open_admin
    from cli.models import how_saved

    async with open_admin(urls.admin, urls.token) as admin:
        for spec in specs:
            with waiting(f"checking {spec.name}", quiet=True):
                saved = (await admin.put(spec)).value
            notice(f"{how_saved(saved)}: model {saved.model.name}")


def _say_ready(urls: UpFile, state_dir: Path, as_json: bool) -> None:
    if as_json:
        ready = {"router": urls.router, "admin": urls.admin, "state_dir": str(state_dir.resolve())}
        click.echo(json.dumps(ready))
        return
    click.echo(f"Stoker is up: OpenAI API at {urls.router}/v1, admin API at {urls.admin}")
    elsewhere = state_dir.resolve() != up_state_dir().resolve()
    prefix = f"STOKER_STATE_DIR={state_dir} " if elsewhere else ""
    click.echo(f"Try `{prefix}stoker ps`; Ctrl-C stops everything; logs are in {state_dir}/logs")
