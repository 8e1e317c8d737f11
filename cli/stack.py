"""All parts on this host as one thing: `async with running(config) as urls`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import aiohttp
import click
from msgspec.structs import replace

from cli.cluster import UpFile
from cli.log_files import bound, start_new
from cli.part_process import Died, PartProcess
from cli.text import waiting
from cli.upfiles import check_port, claim, write_config, write_up_file
from runtime import places
from runtime.places import url
from runtime.sockets import tcp_connector

if TYPE_CHECKING:
    from runtime.contract.config import Config

T = TypeVar("T")

START_ORDER = ("scheduler", "agent", "router")
STOP_ORDER = ("agent", "router", "scheduler")
_START_S = 60.0
_POLL_S = 0.1
_CONSUL_S = 5.0
_LOOK_S = 5.0  # at how large the parts' logs are

Notice = Callable[[str], None]


class Stack:
    """The running parts. `failed` ends (with an error) only if one of them can't be kept up."""

    def __init__(self, config: Config, notice: Notice, hurry: asyncio.Event) -> None:
        self._config = config
        self._state_dir = Path(config.state_dir)
        self._hurry = hurry
        config_file = write_config(config, self._state_dir)
        logs = self._state_dir / "logs"
        logs.mkdir(exist_ok=True)
        self._parts = {
            name: PartProcess(
                name, config_file, start_new(logs / f"{name}.log"), notice, self._tell
            )
            for name in START_ORDER
        }
        self._bounding: asyncio.Task[None] | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._found = asyncio.Event()  # every part has said where it serves

    @property
    def urls(self) -> UpFile | None:
        """Where the parts are; None until they have been up once."""
        admin, router = self._parts["scheduler"].url, self._parts["router"].url
        if admin is None or router is None:
            return None
        return UpFile(admin=admin, router=router, token=self._config.cluster_token, pid=os.getpid())

    async def start(self) -> UpFile:
        """Returns once a request could be served. Raises click.ClickException."""
        self._keepers = [asyncio.create_task(p.keep()) for p in self._parts.values()]
        self._bounding = asyncio.create_task(self._bound_logs())
        ready = asyncio.create_task(self._until_ready())
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.wait([ready, *self._keepers], return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                return ready.result()
            await self.broken()
            raise AssertionError("a part ended though nobody asked it to")
        except TimeoutError:
            missing = [name for name, part in self._parts.items() if part.url is None]
            what = f"not ready: {', '.join(missing)}" if missing else "no node has reported"
            raise click.ClickException(
                f"not up after {_START_S:.0f} s ({what}); see {self._state_dir / 'logs'}"
            ) from None
        finally:
            ready.cancel()

    async def broken(self) -> None:
        """Raises click.ClickException once a part can't be kept up; else never returns."""
        await asyncio.wait(self._keepers, return_when=asyncio.FIRST_COMPLETED)
        for keeper in self._keepers:
            if keeper.done():
                try:
                    keeper.result()
                except Died as error:
                    raise click.ClickException(str(error)) from None

    async def end(self) -> None:
        """Engines first, then the way to them, then who decides."""
        for name in STOP_ORDER:
            await self._parts[name].end(self._hurry)
        if self._bounding is not None:
            self._bounding.cancel()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for part in self._parts.values():
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(bound, part.log_file)

    def _tell(self) -> None:
        """A part serves: tell others, and let its next life have the same port."""
        for name, part in self._parts.items():
            if part.url is not None:
                settings = replace(getattr(self._config, name), port=urlsplit(part.url).port)
                self._config = replace(self._config, **{name: settings})
        write_config(self._config, self._state_dir)
        if self.urls is not None:
            write_up_file(self._state_dir, self.urls)
            self._found.set()

    async def _until_ready(self) -> UpFile:
        from cli.client import AdminError, open_admin

        await self._found.wait()
        urls = self.urls
        assert urls is not None
        async with (
            open_admin(urls.admin, urls.token) as admin,
            aiohttp.ClientSession(connector=tcp_connector()) as http,
        ):
            while True:
                with contextlib.suppress(AdminError, aiohttp.ClientError):
                    nodes = (await admin.nodes()).value.nodes
                    async with http.get(url(urls.router, "readyz")) as answer:
                        if answer.status == 200 and any(n.state == "ready" for n in nodes):
                            return urls
                await asyncio.sleep(_POLL_S)


async def check_consul(config: Config) -> None:
    """Raises click.ClickException within seconds where no Consul answers."""
    url = config.registry.consul_url
    if url is None:
        return
    try:
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_CONSUL_S), connector=tcp_connector()
            ) as http,
            http.get(places.url(url, "v1", "status", "leader")) as answer,
        ):
            await answer.read()
            if answer.status < 500:  # what a token may do is told by who uses it
                return
            words = f"it answers with status {answer.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        words = str(error) or f"no answer within {_CONSUL_S:g} s"
    raise click.ClickException(
        f"no Consul at {url}: {words}; start it, correct --consul (registry.consul_url), or leave"
        " that out to keep the registry in the state dir"
    )


@asynccontextmanager
async def running(config: Config, notice: Notice, hurry: asyncio.Event) -> AsyncIterator[Stack]:
    """Every part, started; on the way out each is ended and nothing is left.

    Raises click.ClickException if the state dir or the router's port is taken, or a part fails.
    """
    with claim(Path(config.state_dir)):
        check_port(config.router.host, config.router.port)
        await check_consul(config)
        stack = Stack(config, notice, hurry)
        try:
            with waiting("starting a scheduler, an agent and a router", quiet=True):
                await stack.start()
            yield stack
        finally:
            await stack.end()


def run_until_signal(main: Callable[[asyncio.Event], Awaitable[T]]) -> T | None:
    """Run `main(hurry)`; the first SIGINT or SIGTERM cancels it (and gives None), the next sets
    `hurry`."""

    async def run() -> T | None:
        hurry = asyncio.Event()
        task = asyncio.ensure_future(main(hurry))
        with _signals(task, hurry):
            try:
                return await task
            except asyncio.CancelledError:
                return None

    return asyncio.run(run())


@contextlib.contextmanager
def _signals(task: asyncio.Future[T], hurry: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            hurry.set()
            return
        asked = True
        click.echo("\nstopping: requests under way may end; once more to hurry", err=True)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
