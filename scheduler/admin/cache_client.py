"""The admin API's model caches: asks the agents of one or several nodes and joins their answers.

Rules this file keeps: it keeps nothing; a node that does not answer is an entry with its error,
never a failure of the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import msgspec
from msgspec import Struct

from runtime import outside
from runtime.checkpoints.model_files import CacheView, PullBody, PullView, VerifyReport
from runtime.outside import OutsideError
from runtime.places import url
from scheduler.agent_calls import AgentCalls
from scheduler.core.decisions import Core

ANSWER_S = 10.0
VERIFY_S = 3600.0  # every byte is read again


class NodeCache(Struct, frozen=True, kw_only=True):
    """One node's cache, or why it could not be asked."""

    node_id: str
    cache: CacheView | None = None
    error: str | None = None


class Caches(Struct, frozen=True, kw_only=True):
    """The answer to a look at caches: one entry a node."""

    nodes: tuple[NodeCache, ...]


class CachePullBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pull `model`, a source such as hf:org/name, to `nodes`, or to `count` of them, or to all."""

    model: str
    nodes: tuple[str, ...] = ()
    count: int | None = None
    refresh: bool = False


class NodePull(Struct, frozen=True, kw_only=True):
    """What one node answered. Neither pull nor error: it has the model already."""

    node_id: str
    pull: PullView | None = None
    error: str | None = None


class Pulls(Struct, frozen=True, kw_only=True):
    """The answer to a pull: one entry a node."""

    nodes: tuple[NodePull, ...]


class NodeRemoval(Struct, frozen=True, kw_only=True):
    """What one node removed, or why it did not."""

    node_id: str
    freed_bytes: int = 0
    error: str | None = None
    missing: bool = False  # that is the error: it does not have the model


class Removals(Struct, frozen=True, kw_only=True):
    """The answer to a removal: one entry a node."""

    nodes: tuple[NodeRemoval, ...]


class NodeVerdict(Struct, frozen=True, kw_only=True):
    """What one node's check found, or why there was none."""

    node_id: str
    report: VerifyReport | None = None
    error: str | None = None
    missing: bool = False  # that is the error: it does not have the model


class Verdicts(Struct, frozen=True, kw_only=True):
    """The answer to a check: one entry a node."""

    nodes: tuple[NodeVerdict, ...]


class _Freed(Struct):
    """An agent's answer to a removal."""

    freed_bytes: int


class _Problem(Struct):
    """Why a node did not do it; `kind` as agent/cache/errors.py has them, "" where it says none."""

    message: str
    kind: str = ""


class _Refusal(Struct):
    """An agent's answer with an error status."""

    error: _Problem


class CacheClient:
    """The caches of the nodes that `core` knows."""

    def __init__(self, core: Core, agents: AgentCalls) -> None:
        self._core = core
        self._agents = agents

    def live_nodes(self) -> list[str]:
        """The ids of the nodes that report."""
        nodes = self._core.state.nodes.values()
        return sorted(node.node_id for node in nodes if node.live)

    async def view(self, nodes: Sequence[str]) -> Caches:
        """Ask these nodes what their caches hold."""

        async def one(node_id: str) -> NodeCache:
            body, failed = await self._ask("GET", node_id)
            cache = outside.decode(body, CacheView) if body else None
            return NodeCache(node_id=node_id, cache=cache, error=_words(failed))

        return Caches(nodes=tuple(await asyncio.gather(*map(one, nodes))))

    async def pull(self, body: CachePullBody, nodes: Sequence[str]) -> Pulls:
        """Have these nodes begin to fetch a model."""
        data = msgspec.json.encode(PullBody(model=body.model, refresh=body.refresh))

        async def one(node_id: str) -> NodePull:
            answer, failed = await self._ask("POST", node_id, "pull", data=data)
            pull = outside.decode(answer, PullView) if answer else None
            return NodePull(node_id=node_id, pull=pull, error=_words(failed))

        return Pulls(nodes=tuple(await asyncio.gather(*map(one, nodes))))

    async def remove(self, model: str, nodes: Sequence[str]) -> Removals:
        """Have these nodes remove a model."""

        async def one(node_id: str) -> NodeRemoval:
            answer, failed = await self._ask("DELETE", node_id, query={"model": model})
            freed = outside.decode(answer, _Freed).freed_bytes if answer else 0
            return NodeRemoval(
                node_id=node_id,
                freed_bytes=freed,
                error=_words(failed),
                missing=_is_missing(failed),
            )

        return Removals(nodes=tuple(await asyncio.gather(*map(one, nodes))))

    async def verify(self, model: str, nodes: Sequence[str]) -> Verdicts:
        """Have these nodes read a model again and check it."""

        async def one(node_id: str) -> NodeVerdict:
            answer, failed = await self._ask(
                "POST", node_id, "verify", query={"model": model}, limit_s=VERIFY_S
            )
            report = outside.decode(answer, VerifyReport) if answer else None
            return NodeVerdict(
                node_id=node_id, report=report, error=_words(failed), missing=_is_missing(failed)
            )

        return Verdicts(nodes=tuple(await asyncio.gather(*map(one, nodes))))

    async def _ask(
        self, method: str, node_id: str, *path: str, data: bytes | None = None,
        query: dict[str, str] | None = None, limit_s: float = ANSWER_S,
    ) -> tuple[bytes, _Problem | None]:  # fmt: skip
        """(the body of a good answer, or why there is none)."""
        where = url(self._agents.address(node_id) or "", "agent", "cache", *path)
        timeout = aiohttp.ClientTimeout(total=limit_s, connect=3)
        try:
            async with self._agents.http.request(
                method, where, data=data, params=query, timeout=timeout
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as problem:
            words = f"its agent did not answer: {problem or type(problem).__name__}"
            return b"", _Problem(message=words)
        if response.status < 300:
            return body, None
        try:
            return b"", outside.decode(body, _Refusal).error
        except OutsideError:
            words = f"HTTP {response.status}: {body[:200].decode(errors='replace')}"
            return b"", _Problem(message=words)


def _words(failed: _Problem | None) -> str | None:
    return failed.message if failed else None


def _is_missing(failed: _Problem | None) -> bool:
    return failed is not None and failed.kind == "not_found"
