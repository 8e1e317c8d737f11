"""Sends ranges of files with sendfile(2), from threads: the agent's event loop (uvloop) has none.

aiohttp's FileResponse then falls back to reading blocks in a thread and writing them from the loop:
two copies more of every byte, in the thread that also answers everything else.

Rules this file keeps: the thread writes to a duplicate of the socket, so that a connection that
ends meanwhile can not give its number to another one.
"""

from __future__ import annotations

import asyncio
import os
import select
from concurrent.futures import Executor
from pathlib import Path

from aiohttp import web

_POLL_S = 0.001
_STALLED_S = 30.0  # a reader that takes nothing for so long is gone


async def send_file(request: web.Request, path: Path, threads: Executor) -> web.StreamResponse:
    """Answer with the file, or the range of it that is asked for. Raises FileNotFoundError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        try:
            start, stop, _ = request.http_range.indices(size)
        except ValueError as error:
            raise web.HTTPRequestRangeNotSatisfiable(text=str(error)) from None
        if start >= stop and size:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200)
        response.content_type = "application/octet-stream"
        response.content_length = stop - start
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        await response.prepare(request)
        await _send(request, file, start, stop, threads)
        await response.write_eof()
        return response
    finally:
        os.close(file)


async def _send(request: web.Request, file: int, start: int, stop: int, threads: Executor) -> None:
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the reader is gone")
    await _headers_out(transport)
    sock = os.dup(transport.get_extra_info("socket").fileno())
    sending = asyncio.get_running_loop().run_in_executor(
        threads, _send_range, sock, file, start, stop
    )
    try:
        # The file and the socket stay open until the thread is done, even if this is cancelled.
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait([sending])
        raise
    except OSError:
        transport.abort()
        raise ConnectionResetError("the reader is gone") from None
    finally:
        os.close(sock)


async def _headers_out(transport: asyncio.Transport) -> None:
    """What the transport holds must go out before anybody else writes to its socket."""
    for pause_s in (0.0, 0.0, *[_POLL_S] * round(_STALLED_S / _POLL_S)):
        if not transport.get_write_buffer_size():
            return
        await asyncio.sleep(pause_s)
    raise ConnectionResetError("the reader takes nothing")


def _send_range(sock: int, file: int, start: int, stop: int) -> None:
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while start < stop:
        try:
            sent = os.sendfile(sock, file, start, stop - start)
            if not sent:
                raise OSError("the file became shorter")
            start += sent
        except BlockingIOError:
            if not writable.poll(_STALLED_S * 1000):
                raise TimeoutError("the reader takes nothing") from None
