"""One part as a child process: started, watched, started again when it dies, ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential

from cli.text import age

_STEADY_S = 60.0  # a part that lived this long starts again at once
_HURRY_S = 12.0  # how long a part told to hurry may still take, before it is killed
_TAIL_LINES = 5


class Died(Exception):
    """The part ended by itself; the message says how, and the end of what it printed."""


class PartProcess:
    """One of the parts. `url` is where it serves, None while it does not."""

    def __init__(
        self,
        name: str,
        config_file: Path,
        log_file: Path,
        notice: Callable[[str], None],
        on_url: Callable[[], None],
    ) -> None:
        self.name = name
        self.url: str | None = None
        self._argv = (
            sys.executable, "-m", "cli.main",
            name, "--config", str(config_file), "--json", "--until-eof",
        )  # fmt: skip
        self.log_file = log_file
        self._notice = notice
        self._on_url = on_url
        self._process: Process | None = None
        self._passing: asyncio.Task[None] | None = None
        self._served = False  # at least once
        self._ending = asyncio.Event()
        self._spawning = asyncio.Lock()  # so that `end` never misses a process just being made

    async def keep(self) -> None:
        """Run it until `end`. Raises Died if its very first start fails: a retry would not help."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, Died) and self._served),
            wait=wait_exponential(multiplier=0.5, max=10),
            reraise=True,
        )
        while not self._ending.is_set():
            await retrying(self._live)

    async def end(self, hurry: asyncio.Event) -> None:
        """Stop it gently and wait; once `hurry` is set, firmly. Nothing of it is left after."""
        async with self._spawning:
            self._ending.set()
        await self._end_process(hurry)
        if self.name == "agent" and self._served and self._process and self._process.returncode:
            # It died instead of ending. Its engines outlive it, and an agent ends them best.
            await self._spawn()
            with contextlib.suppress(Died, TimeoutError):
                async with asyncio.timeout(_HURRY_S):
                    await self._wait_url()
            await self._end_process(hurry)

    async def _end_process(self, hurry: asyncio.Event) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        exited = asyncio.create_task(process.wait())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait([exited, hurried], return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not exited.done():
            process.terminate()
            await asyncio.wait([exited], timeout=_HURRY_S)
        if not exited.done():
            self._notice(f"the {self.name} did not end in time: killing it and all it started")
            _kill_tree(process.pid)
        await exited

    async def _live(self) -> None:
        """One life. Raises Died if it was short; returns after a long one, or when told to end."""
        began = time.monotonic()
        async with self._spawning:
            if self._ending.is_set():
                return
            await self._spawn()
        assert self._process is not None
        with contextlib.suppress(Died):
            await self._wait_url()
        status = await self._process.wait()
        self.url = None
        if self._ending.is_set():
            return
        lived_s = time.monotonic() - began
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if self._served:
            self._notice(
                f"the {self.name} ended with {how} after {age(lived_s)}: starting it again"
            )
        if lived_s < _STEADY_S:
            raise Died(f"the {self.name} ended with {how}:\n{self._tail()}")

    async def _spawn(self) -> None:
        # A session of its own: Ctrl-C reaches only us, and we end the parts in order. Its stdin
        # stays open as long as we live. Everything to know is in the config file, so that no
        # STOKER_ variable of this shell overrides it.
        env = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, stdin=PIPE, stdout=PIPE, stderr=log, env=env, start_new_session=True
            )

    async def _wait_url(self) -> None:
        """Reads its ready line. Raises Died if it ends before."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise Died(f"the {self.name} ended before it was ready")
        self.url = str(msgspec.json.decode(line)["url"])
        self._served = True
        self._passing = asyncio.create_task(self._keep_output(self._process.stdout))
        self._on_url()

    async def _keep_output(self, source: asyncio.StreamReader) -> None:
        """What it still prints, an access log for one, goes to its log."""
        from runtime.router.control.workers import pass_on

        with self.log_file.open("ab") as log:
            await pass_on(source, log)

    def _tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines)


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
