"""`stoker demo`: a cold start, a warm call, and a cold start that evicts, all for real."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.cluster import ClusterAccess, up_state_dir

if TYPE_CHECKING:
    from cli.cluster import UpFile
    from cli.showcase import Row
    from cli.stack import Stack
    from runtime.contract.config import Config

CPU_DEVICE = "cpu:6GiB"  # room for two of three tiny models; vLLM itself takes 2 GiB each
SIMULATED_DEVICE = "simulated:1x24GiB"
STUB_LABEL = "STUB engine on a SIMULATED device: no model was run, the timings are modelled"


@click.command()
@click.option("--engine", type=click.Choice(["vllm", "stub"]), default="vllm", show_default=True)
@click.option("--exit", "leave", is_flag=True, help="Stop after the table.")
@click.option(
    "--devices", metavar="WHAT", help="As for `stoker up`; default: what fits the engine."
)
@click.option("--port", type=click.IntRange(0, 65535), help="The router's; 0: a free one. [8080]")
@click.option("--state-dir", metavar="DIR", help="Default $STOKER_STATE_DIR, else ./.stoker.")
@click.option("--json", "as_json", is_flag=True, help="Print what happened as JSON.")
@click.pass_obj
def demo(
    cluster: ClusterAccess,
    engine: str,
    leave: bool,
    devices: str | None,
    port: int | None,
    state_dir: str | None,
    as_json: bool,
) -> None:
    """Show a cold start, a warm call and an eviction, for real.

    Runs every part on this host with tiny random models, one more than fit, and asks each. With
    --engine stub nothing is computed, and the table says so. Status 0 only if every answer came
    from the engine, and one model went down to make room for the last.
    """
    from cli.stack import run_until_signal, running

    folder = Path(state_dir) if state_dir else up_state_dir()
    config = _make_config(cluster, engine, devices, port, folder)

    async def main(hurry: asyncio.Event) -> bool:
        async with running(config, _notice, hurry) as stack:
            rows, problems = await _play(stack, config, engine)
            _print(rows, problems, engine, as_json)
            if not leave:
                assert stack.urls is not None
                _invite(stack.urls, [row.model for row in rows])
                await stack.broken()
            return not problems

    good = run_until_signal(main)
    if leave and not good:
        sys.exit(1 if good is False else 130)


def _make_config(
    cluster: ClusterAccess, engine: str, devices: str | None, port: int | None, folder: Path
) -> Config:
    from cli.upfiles import make_config

    if engine == "stub":
        cluster = ClusterAccess()  # never a real cluster's settings
    overrides: dict[str, Any] = {
        "agent.devices": devices or _default_devices(engine),
        "scheduler.min_dwell_s": 1.0,  # five seconds would only make the demo longer
    }
    if port is not None:
        overrides["router.port"] = port
    return make_config(cluster, folder, overrides)


async def _play(stack: Stack, config: Config, engine: str) -> tuple[list[Row], list[str]]:
    """Add the models, ask them; what happened, and what should have but did not."""
    from cli.client import open_admin
    from cli.showcase import Showcase, add_models

    assert stack.urls is not None
    async with open_admin(stack.urls.admin, stack.urls.token) as admin:
        folder = Path(config.state_dir) / "models"
        models = await add_models(admin, stack.urls.router, engine, folder)
        showcase = Showcase(admin, stack.urls.router, engine, config.scheduler.min_dwell_s)
        return await showcase.play(models)


def has_nvidia_gpu() -> bool:
    """Whether this host seems to have an NVIDIA GPU; scripts/setup.sh asks the same."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _default_devices(engine: str) -> str:
    if engine == "stub":
        return SIMULATED_DEVICE
    return "auto" if has_nvidia_gpu() else CPU_DEVICE


def _notice(text: str) -> None:
    click.echo(text, err=True)


def _print(rows: list[Row], problems: list[str], engine: str, as_json: bool) -> None:
    import msgspec

    from cli.tables import table
    from cli.text import console

    if as_json:
        done = {"engine": engine, "rows": rows, "problems": problems}
        click.echo(msgspec.json.encode(done).decode())
    else:
        title = STUB_LABEL if engine == "stub" else f"{rows[0].engine} on {rows[0].device}"
        click.echo(f"\n{title}\n")
        columns = ("MODEL", "WHAT HAPPENED", ">FIRST TOKEN", ">TOTAL", "?REPLY")
        cells = (
            (r.model, r.what, f"{r.first_token_s:.2f} s", f"{r.total_s:.2f} s", r.reply)
            for r in rows
        )
        console().print(table(columns, cells))
        click.echo()
        if engine == "vllm":
            click.echo("The models have random weights: gibberish is the right answer.")
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)


def _invite(urls: UpFile, models: list[str]) -> None:
    """What to try next."""
    chat = json.dumps({"model": models[1], "messages": [{"role": "user", "content": "Hello"}]})
    prompt = json.dumps({"prompt": "Once upon a time", "max_tokens": 20, "stream": True})
    post = "-H 'Content-Type: application/json' -d"
    click.echo("It stays up until Ctrl-C. Try, in another terminal:\n")
    click.echo(f"  curl {urls.router}/v1/models")
    click.echo(f"  curl {urls.router}/v1/chat/completions {post} '{chat}'")
    click.echo(f"  curl -N {urls.router}/invoke/{models[0]} {post} '{prompt}'")
    click.echo("\nor `stoker ps`, `stoker decisions`, `stoker invoke MODEL PROMPT`.")
