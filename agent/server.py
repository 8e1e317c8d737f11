"""The node agent's HTTP endpoints. They decide nothing.

Every route but /healthz needs `Authorization: Bearer <cluster_token>`, where there is one; for
/metrics, metrics_token will do.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Middleware
from msgspec.structs import replace
from prometheus_client import CONTENT_TYPE_LATEST

from agent.cache.errors import PASSING, CacheError, SourceError
from agent.cache.http import cache_routes
from agent.cache.model_cache import ModelCache
from agent.core.messages import CommandReceived
from agent.engines.launch_plan import Place
from agent.engines.supervisor import read_more
from agent.node import Node
from agent.weights import skeleton
from runtime import outside
from runtime.answers import json_answer
from runtime.bearer import token_of
from runtime.contract.adapters import with_lora_args
from runtime.contract.engine_policy import node_problems
from runtime.engine.select import get_engine
from runtime.engine.vllm import lora, memory_estimate
from runtime.leftovers import drop_packed
from runtime.wire.agent_messages import (
    AgentCommand,
    CommandReply,
    Inspection,
    MemoryEstimate,
    SpecProblem,
)
from runtime.wire.model_spec import ModelSpec

_read_command: Callable[[bytes], AgentCommand] = outside.reader(AgentCommand, "a command")
_TAIL_LINES = 200
_FOLLOW_POLL_S = 0.2
_BLOCK_BYTES = 64 * 1024
ADAPTER_FETCH_S = 60.0  # whoever adds a model waits for its answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(node: Node, token: str, metrics_token: str = "") -> web.Application:
    """The agent's HTTP application."""
    endpoints = _Endpoints(node)
    app = web.Application(middlewares=[_guard(token, metrics_token)], client_max_size=2**20)
    app.on_response_prepare.append(drop_packed)
    app.add_routes(
        [
            web.get("/healthz", endpoints.healthz),
            web.get("/metrics", endpoints.metrics),
            web.post("/agent/commands", endpoints.command),
            web.post("/agent/inspect", endpoints.inspect),
            web.get("/agent/replicas/{replica_id}/logs", endpoints.logs),
            *cache_routes(node.host.cache, node.host.on_disk.resident_bytes),
        ]
    )
    return app


def _guard(token: str, metrics_token: str) -> Middleware:

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = token_of(outside.header(request.headers.get("Authorization", "")))
        # Without a token the agent listens on loopback only: the driver sees to it.
        allowed = not token or hmac.compare_digest(given, token.encode())
        if metrics_token and request.path == "/metrics":
            allowed = allowed or hmac.compare_digest(given, metrics_token.encode())
        if not allowed and request.path != "/healthz":
            return _refusal(401, "this route needs 'Authorization: Bearer <cluster_token>'")
        return await handler(request)

    return guard


class _Endpoints:
    def __init__(self, node: Node) -> None:
        self._node = node

    async def healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"draining": self._node.core.shutting_down})

    async def metrics(self, request: web.Request) -> web.Response:
        node = self._node
        body = node.host.metrics.render(
            node.host.devices.last(), [r.phase for r in node.core.replicas.values()]
        )
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def command(self, request: web.Request) -> web.Response:
        try:
            command = _read_command(await request.read())
        except ValueError as error:
            return _refusal(400, f"the body {error}")
        refused = self._node.apply(CommandReceived(now=time.monotonic(), command=command))
        reply = CommandReply(
            ok=refused is None,
            boot_id=self._node.heartbeats.boot_id,
            seq=self._node.heartbeats.next_seq,
            error=refused.error if refused else None,
        )
        return json_answer(reply, status=409 if refused and refused.stale else 200)

    async def inspect(self, request: web.Request) -> web.Response:
        try:
            spec = outside.decode(await request.read(), ModelSpec)
        except ValueError as error:
            return _refusal(400, f"the body {error}")
        fetch = request.query.get("fetch", "1") != "0"  # a plan changes nothing here
        if fetch:
            self._node.host.on_disk.name(spec.source)
        adapters, problems = await (fetch_adapters if fetch else adapters_here)(
            self._node.host.cache, spec
        )
        async with _files_of(self._node.host.cache, spec, fetch) as files:
            found = await asyncio.to_thread(inspect, spec, self._node.host.place, files, adapters)
        return json_answer(replace(found, problems=(*found.problems, *problems)))

    async def logs(self, request: web.Request) -> web.StreamResponse:
        replica_id = request.match_info["replica_id"]
        try:
            lines = int(request.query.get("tail", _TAIL_LINES))
        except ValueError:
            return _refusal(400, f"tail must be a number of lines (got {request.query['tail']!r})")
        path = self._node.log_path(replica_id)
        if path is None:
            return _refusal(404, f"this node has no log of a replica {replica_id!r}")
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        text, position = await asyncio.to_thread(_tail, path, max(0, lines))
        await response.write(text)
        if request.query.get("follow", "0") == "1":
            await self._follow(request, response, path, position, replica_id)
        await response.write_eof()
        return response

    async def _follow(
        self,
        request: web.Request,
        response: web.StreamResponse,
        path: Path,
        position: int,
        replica_id: str,
    ) -> None:
        """Until the replica ends or the reader leaves."""
        while request.transport is not None and not request.transport.is_closing():
            may_grow = self._node.runs(replica_id)
            text, position = await asyncio.to_thread(read_more, path, position, _BLOCK_BYTES)
            if text:
                await response.write(text)
            elif may_grow:
                await asyncio.sleep(_FOLLOW_POLL_S)
            else:
                return


class ModelFiles(NamedTuple):
    """The folder of a spec's model, or of what its origin says of it; or why there is none."""

    folder: Path | None = None
    unknown: str | None = None
    missing: bool = False  # a folder of this node that is not there: it can't be started


@asynccontextmanager
async def _files_of(cache: ModelCache, spec: ModelSpec, fetch: bool) -> AsyncIterator[ModelFiles]:
    """Unless `fetch`, no origin is asked, and only the node's model folders are looked at."""
    async with AsyncExitStack() as stack:
        files = ModelFiles()
        try:
            if spec.engine != "stub":
                files = await _found_files(cache, spec, fetch, stack)
        except (SourceError, ValueError) as error:
            files = ModelFiles(unknown=str(error))
        except CacheError as error:
            files = ModelFiles(unknown=str(error), missing=error.kind == "not_found")
        yield files


async def _found_files(
    cache: ModelCache, spec: ModelSpec, fetch: bool, stack: AsyncExitStack
) -> ModelFiles:
    if folder := await cache.where(spec.source, anywhere=fetch):
        return ModelFiles(folder)
    if not fetch:
        return ModelFiles(unknown="it is not on this node, and a plan asks nobody for it")
    origin = await cache.origin(spec.source)
    if origin is None:
        return ModelFiles()
    return ModelFiles(await stack.enter_async_context(skeleton.fetched(origin)))


def inspect(
    spec: ModelSpec, place: Place, files: ModelFiles, adapters: dict[str, Path] | None = None
) -> Inspection:
    """What this node thinks of a spec. `adapters`: the folders of those that are here.

    Blocks, on an engine's argument parser for a while.
    """
    problems, checked_against = get_engine(spec.engine).check_args(
        spec, place.python, place.cache_dir
    )
    problems = [*problems, *node_problems(spec, place.engine_env, place.media_domains)]
    estimate: MemoryEstimate | None = None
    estimate_error: str | None = None
    rank, warnings = 0, list[str]()
    if files.missing:
        estimate_error = files.unknown or ""
        problem = SpecProblem(field="source", message=estimate_error, value=spec.source)
        problems = [*problems, problem]
    else:
        try:
            found, rank = lora.check(spec, files.folder, adapters or {})
            problems = [*problems, *found]
            try:
                whole = with_lora_args(spec, rank)
                estimate = memory_estimate.estimate(
                    whole, files.folder, place.device_kind, files.unknown
                )
            except ValueError as error:
                estimate_error = str(error)
            warnings = memory_estimate.warnings(spec, files.folder, estimate)
        except OSError as error:
            estimate_error = f"the model's files on this node cannot be read: {error}"
    return Inspection(
        problems=tuple(problems),
        estimate=estimate,
        estimate_error=estimate_error,
        checked_against=checked_against,
        lora_rank=rank,
        warnings=tuple(warnings),
    )


async def fetch_adapters(
    cache: ModelCache, spec: ModelSpec
) -> tuple[dict[str, Path], list[SpecProblem]]:
    """The folders of a spec's adapters, fetched first if need be, and what is wrong with others.

    One that can't be had for now is a problem only where its rank must be known.
    """
    folders: dict[str, Path] = {}
    problems: list[SpecProblem] = []

    async def fetch(name: str, source: str) -> None:
        try:
            async with asyncio.timeout(ADAPTER_FETCH_S):
                folders[name] = await cache.ensure(source)
            return
        except TimeoutError:
            passes, words = True, f"is still being fetched after {ADAPTER_FETCH_S:g} s"
        except CacheError as error:
            passes, words = error.kind in PASSING, str(error)
        except ValueError as error:
            passes, words = False, str(error)
        if not passes or lora.declared_rank(spec) is None:
            fix = "try again later, or declare engine_args.max_lora_rank" if passes else None
            problem = SpecProblem(field=f"adapters.{name}", value=source, message=words, fix=fix)
            problems.append(problem)

    await asyncio.gather(*(fetch(name, source) for name, source in spec.adapters.items()))
    return folders, problems


async def adapters_here(
    cache: ModelCache, spec: ModelSpec
) -> tuple[dict[str, Path], list[SpecProblem]]:
    """The folders of a spec's adapters that are on this node; what is not here is no problem."""
    folders: dict[str, Path] = {}
    for name, source in spec.adapters.items():
        with suppress(CacheError, ValueError):
            if folder := await cache.where(source, anywhere=False):
                folders[name] = folder
    return folders, []


def _tail(path: Path, lines: int) -> tuple[bytes, int]:
    """The last `lines` lines, and where the file ended."""
    try:
        with path.open("rb") as file:
            text = b"".join(deque(file, maxlen=lines))
            return text, file.tell()
    except FileNotFoundError:
        return b"", 0


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)
