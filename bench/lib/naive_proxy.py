"""The proxy one writes in ten minutes: aiohttp's server and aiohttp's client, on uvloop, with no
queue, keys, limits or metrics. `python naive_proxy.py ORIGIN_PORT` prints its port.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping

import aiohttp
import uvloop
from aiohttp import web

_HOP = {"connection", "transfer-encoding", "keep-alive", "host", "content-length"}


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in headers.items() if n.lower() not in _HOP}


async def main() -> None:
    origin = f"http://127.0.0.1:{sys.argv[1]}"
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
    )  # fmt: skip

    async def proxy(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with session.post(
            origin + request.path_qs, data=body, headers=_passed(request.headers)
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers))
            if answer.content_length is not None:
                response.content_length = answer.content_length
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=32 * 2**20)
    app.router.add_post("/{path:.*}", proxy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
