"""What a worker of a port asks the others: their figures, as a scrape of /metrics reaches any one
of them, and what only one of them may know.

Rule this file keeps: a figure is the sum over the workers that answer; one that is just being
started again is left out, and its counters begin again, as after any restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from runtime import outside, places
from runtime.router.call.made_responses import Made, is_id
from runtime.router.proxy.responder import REQUEST_ID, cut_off

log = logging.getLogger("stoker.router")

TIMEOUT_S = 2.0
_OF_HOP = {
    "connection", "content-length", "content-encoding", "transfer-encoding", "expect",
    "x-request-id",
}  # fmt: skip
# Those that every answer gets where it goes out.
_NOT_PASSED_ON = {
    "connection", "transfer-encoding", "date", "server", "vary",
    "access-control-allow-origin", "access-control-expose-headers",
}  # fmt: skip
OWN = {"worker": "own"}  # the query that asks for one worker's own figures
MADE = "/internal/made"  # ?id=: who made a response; only workers are told


_PATH_BYTES = 107  # what fits into a Unix socket's address, on Linux


def socket_folder(state_dir: Path) -> Path:
    """Where the workers' sockets are: the state dir, or a folder with a short name in its place.

    Raises ValueError where neither is short enough, OSError where the second belongs to another.
    """
    if len(os.fsencode(state_dir / "router-9999.sock")) <= _PATH_BYTES:
        return state_dir
    name = hashlib.sha256(os.fsencode(state_dir.absolute())).hexdigest()[:16]
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = places.below(Path(base), f"stoker-{os.getuid()}-{name}")
    if len(os.fsencode(folder / "router-9999.sock")) > _PATH_BYTES:
        raise ValueError(
            f"state_dir = {str(state_dir)!r} is too long for its workers' Unix sockets (at most"
            f" {_PATH_BYTES} bytes a path), and so is {base}; choose a shorter state_dir or TMPDIR,"
            " or router.workers = 1"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone; remove it")
    return folder


class Siblings:
    """The Unix sockets `router-N.sock` of one state dir, of which `index` is ours."""

    def __init__(self, state_dir: Path, index: int, count: int) -> None:
        folder = socket_folder(state_dir)
        self.socket = folder / f"router-{index}.sock"
        self._others = [folder / f"router-{n}.sock" for n in range(1, count + 1) if n != index]

    async def ask(self, request: web.Request) -> web.StreamResponse | None:
        """The answer of the first other worker that has one; None: none of them knows it.

        One that came from a worker is asked no further: it came by a Unix socket.
        """
        for path in () if is_sibling(request) else self._others:
            if (answer := await _passed_on(path, request)) is not None:
                return answer
        return None

    async def metrics(self, own: bytes) -> bytes:
        """Our own exposition and everybody else's, summed."""
        url = places.url("http://worker", "metrics", **OWN)
        texts = await asyncio.gather(*(_fetch(path, url) for path in self._others))
        return summed([own.decode(), *filter(None, texts)])

    async def made(self, response_id: str) -> Made | None:
        """Who made a response that another worker has seen."""
        if not is_id(response_id):
            return None
        url = places.url("http://worker", *MADE.strip("/").split("/"), id=response_id)
        asked = (_fetch(path, url) for path in self._others)
        found = next(filter(None, await asyncio.gather(*asked)), None)
        return None if found is None else outside.decode(found.encode(), Made)


async def _fetch(path: Path, url: str) -> str | None:
    """What the worker at `path` answers with 200."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)), timeout=timeout
            ) as session,
            session.get(url) as response,
        ):
            text = await response.text()
            return text if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        log.warning("%s without the worker at %s: %s", url, path, error)
        return None


def is_sibling(request: web.Request) -> bool:
    """Whether another worker asks: by the Unix socket."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return not isinstance(peer, tuple)


async def _passed_on(path: Path, request: web.Request) -> web.StreamResponse | None:
    """What the worker at `path` answers to the same request; None: 404, or no answer."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S)
    headers = [(n, v) for n, v in request.headers.items() if n.lower() not in _OF_HOP]
    headers.append(("X-Request-ID", request[REQUEST_ID]))
    url = places.url("http://worker", *request.path.strip("/").split("/"))
    response = web.StreamResponse()
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)), timeout=timeout, auto_decompress=False
            ) as session,
            session.request(request.method, url, params=request.query, headers=headers) as reply,
        ):
            if reply.status in (401, 404):  # its keys may be a little older
                return None
            kept = [(n, v) for n, v in reply.headers.items() if n.lower() not in _NOT_PASSED_ON]
            response = web.StreamResponse(status=reply.status, headers=CIMultiDict(kept))
            await response.prepare(request)
            async for data in reply.content.iter_any():
                await response.write(data)
            return response
    except (aiohttp.ClientError, TimeoutError) as error:
        log.warning("the worker at %s did not answer: %s", path, error)
        if not response.prepared:
            return None
        cut_off(request, response)
        return response


class _Ready(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def summed(texts: list[str]) -> bytes:
    """Expositions added up, sample by sample.

    Example: `a_total{m="x"} 1.0` in one text and `a_total{m="x"} 2.0` in another give 3.0.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            families.setdefault(family.name, family)
            sums = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                sums[key] = sums.get(key, 0.0) + sample.value
    for name, family in families.items():
        family.samples = []
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Ready(list(families.values())))
    return generate_latest(registry)
