"""A router with several workers, as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT


@contextlib.asynccontextmanager
async def workers(
    state_dir: Path, count: int, access_log: str = "", output: list[bytes] | None = None
) -> AsyncIterator[tuple[psutil.Process, str]]:
    """`stoker router` with so many workers, and no scheduler: it serves by its last table.

    `output` gets what it printed after its ready line, at the end.
    """
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "STOKER_STATE_DIR": str(state_dir),
        "STOKER_CLUSTER_TOKEN": kit.TOKEN, "STOKER_ROUTER_WORKERS": str(count),
        "STOKER_ROUTER_PORT": "0", "STOKER_ROUTER_ACCESS_LOG": access_log,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cli.main", "router", "--json",
        stdout=asyncio.subprocess.PIPE, env=env, cwd=ROOT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            url = json.loads(await process.stdout.readline())["url"]
        yield psutil.Process(process.pid), url
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                assert await process.wait() == 0
        if output is not None:
            output.append(await process.stdout.read())
