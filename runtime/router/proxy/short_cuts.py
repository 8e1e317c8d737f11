"""Answers without a request of their own to a replica: kept ones, and those of a shared request."""

from __future__ import annotations

from runtime.router.call.token_meter import Meter
from runtime.router.proxy.batcher import Batcher
from runtime.router.proxy.exchange import CACHE_HEADER, Exchange
from runtime.router.proxy.headers import own_headers
from runtime.router.proxy.response_cache import ResponseCache, wanted


class ShortCuts:
    """The two ways, in the order in which they are tried."""

    def __init__(self, cache: ResponseCache, batcher: Batcher) -> None:
        self._cache = cache
        self._batcher = batcher

    def offered(self, exchange: Exchange) -> bool:
        """Whether answers of its model are kept, or its calls share requests."""
        return exchange.cache_rule is not None or exchange.batch_rule is not None

    async def taken(self, exchange: Exchange) -> bool:
        """Whether the answer was there already, or came by a request that others shared."""
        return await self._replay(exchange) or await self._share(exchange)

    async def _replay(self, exchange: Exchange) -> bool:
        """Whether the answer was one that is kept."""
        call, client = exchange.call, exchange.client
        if exchange.cache_rule is None or client.begun:
            return False
        exchange.wanted = asked = wanted(
            exchange.cache_rule, call.caller.tenant, call.path, call.headers, call.body, call.head
        )
        if asked is None:
            return False
        kept = self._cache.look(exchange.outcome.model, asked, exchange.began_at)
        if kept is None:
            return False
        exchange.status = 200
        exchange.outcome.cached = True
        headers = [
            (b"Content-Type", kept.content_type),
            (b"Content-Length", b"%d" % len(kept.body)),
            (b"Age", b"%d" % (exchange.began_at - kept.kept_at)),
            (CACHE_HEADER, b"hit"),
            *own_headers(call),
        ]
        await client.begin(200, headers + exchange.rate_headers())
        await client.write(kept.body)
        return True

    async def _share(self, exchange: Exchange) -> bool:
        """Whether the answer came by a request that others shared."""
        rule, call, client = exchange.batch_rule, exchange.call, exchange.client
        if rule is None or call.streams:
            return False
        answer = await self._batcher.ask(rule, call)
        if answer is None:
            return False
        exchange.answered_by(answer.replica_id, answer.status, answer.held_s, answer.gpu_s)
        outcome = exchange.outcome
        outcome.meter = Meter()
        outcome.meter.feed(answer.body)
        if exchange.wanted is not None and answer.status == 200:
            exchange.keep(b"application/json", answer.body, exchange.wanted)
        headers = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(answer.body)),
            *own_headers(call),
        ]
        await client.begin(answer.status, headers + exchange.rate_headers())
        await client.write(answer.body)
        return True
