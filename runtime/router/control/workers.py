"""Several routers on one port: a parent that starts `router.workers` children and keeps them.

Rules this file keeps:
- the parent serves nothing: it holds the port (SO_REUSEPORT, never listening), so that the
  children find it free and nobody else takes it while one restarts;
- a child that dies is started again, after RESTART_S; one that never got ready ends the parent;
- SIGTERM is passed on, and the parent ends when all its children have drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import BinaryIO

import msgspec

from runtime.contract.config import Config
from runtime.router.control.listener import given_fd, worker_environ

log = logging.getLogger("stoker.router")

RESTART_S = 0.5
READY_S = 60.0
WORKER_ENV = "STOKER_ROUTER_WORKER"  # which of the children this is, from 1 on


class _Ready(msgspec.Struct):
    url: str


def worker_index() -> int | None:
    """Which child of `run_workers` this process is; None: not one of them."""
    text = os.environ.get(WORKER_ENV, "")
    return int(text) if text.isdigit() else None


async def run_workers(
    config: Config,
    argv: Sequence[str],
    *,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
) -> None:
    """Run `router.workers` children until `stop` is set, then let them drain.

    `argv` starts one router that prints a JSON line with its `url` when it is ready, and ends at
    the end of its stdin. Raises OSError where the port cannot be bound, RuntimeError where a child
    does not start.
    """
    try:
        await _run_workers(config, argv, stop, on_ready)
    except* (OSError, RuntimeError) as group:  # each child fails of the same
        raise next(leaves(group)) from None


async def _run_workers(
    config: Config, argv: Sequence[str], stop: asyncio.Event, on_ready: Callable[[str], None]
) -> None:
    with _reserved(config.router.host, config.router.port) as port:
        loop = asyncio.get_running_loop()
        ready: list[asyncio.Future[str]] = []
        async with asyncio.TaskGroup() as tasks:
            for index in range(1, config.router.workers + 1):
                ready.append(loop.create_future())
                tasks.create_task(_keep(index, argv, port, stop, ready[-1]))
            urls = await asyncio.gather(*ready)
            on_ready(urls[0])


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, and of the groups in it."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """The port, held but not listened on."""
    if (fd := given_fd()) is not None:
        with socket.socket(fileno=os.dup(fd)) as given:
            yield given.getsockname()[1]
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
        yield holder.getsockname()[1]


async def _keep(
    index: int, argv: Sequence[str], port: int, stop: asyncio.Event, ready: asyncio.Future[str]
) -> None:
    """One child after the other, until `stop`."""
    while not stop.is_set():
        passing: asyncio.Task[None] | None = None
        async with _child(index, argv, port) as child:
            try:
                url = await _url(child)
            except RuntimeError:
                if not ready.done():
                    raise
                log.warning("router worker %d did not start; trying again", index)
            else:
                if not ready.done():
                    ready.set_result(url)
                assert child.stdout is not None
                passing = asyncio.create_task(pass_on(child.stdout, sys.stdout.buffer))
                await _until_either(child, stop)
                if not stop.is_set():
                    log.warning("router worker %d ended with %s", index, child.returncode)
        if passing is not None:
            await passing
        if not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESTART_S):
                    await stop.wait()


@contextlib.asynccontextmanager
async def _child(
    index: int, argv: Sequence[str], port: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child that is asked to end with the block, and has ended after it."""
    env = {**os.environ, WORKER_ENV: str(index), "STOKER_ROUTER_PORT": str(port)}
    fd = given_fd()
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=env if fd is None else env | worker_environ(fd),
        pass_fds=() if fd is None else (fd,),
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        await child.wait()


async def pass_on(source: asyncio.StreamReader, sink: BinaryIO) -> None:
    """What a router prints after its ready line, which is its access log, in whole lines."""
    rest = b""
    while data := await source.read(65536):
        lines, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            await asyncio.to_thread(_say, sink, lines + newline)


def _say(sink: BinaryIO, lines: bytes) -> None:
    sink.write(lines)
    sink.flush()


async def _url(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            line = await child.stdout.readline()
        return msgspec.json.decode(line, type=_Ready).url
    except (TimeoutError, ValueError):
        raise RuntimeError("a router worker did not start; its own output says why") from None


async def _until_either(child: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
    ends = [asyncio.ensure_future(child.wait()), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()


def own_argv(config_file: str | None) -> list[str]:
    """How to start one router as a child of this process."""
    argv = [sys.executable, "-m", "cli.main", "router", "--json", "--until-eof"]
    return [*argv, "--config", config_file] if config_file else argv
