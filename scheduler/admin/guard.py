"""What comes before and after each handler of the HTTP face: who asks, and who changed what.

Rules this file keeps: a caller is known, and the scheduler leads, before a handler runs; a change
whose operation says so (`Operation.audit`) is in the audit trail after it, also where its caller
hung up.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from runtime import bearer, outside
from runtime.contract.access import ROLES, Role
from scheduler.access import Access
from scheduler.admin.http import SUBJECT, WHO, WHY, AdminError, not_leading
from scheduler.admin.route_table import Operation
from scheduler.driver import Driver
from scheduler.leadership import Leadership
from scheduler.route_book import RuleBook

HUNG_UP = "the caller hung up before the answer: it may not have been made"


class AdminGuard:
    """Looks at each request; what is not in `operations` only the cluster's own token opens."""

    def __init__(
        self,
        operations: Iterable[Operation],
        cluster_token: str,
        metrics_token: str,
        driver: Driver,
        access: Access,
        book: RuleBook,
        leadership: Leadership,
    ) -> None:
        self._operations = {(o.method, o.path): o for o in operations}
        self._cluster_token = cluster_token
        self._metrics_token = metrics_token
        self._driver = driver
        self._access = access
        self._book = book
        self._leadership = leadership

    @web.middleware
    async def around(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Let a request through to its handler, and note the change it made."""
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else ""
        operation = self._operations.get((request.method, path))
        if resource is not None:
            await self._check(request, operation)
        try:
            response: web.StreamResponse = await handler(request)
        except asyncio.CancelledError:
            if operation is not None and operation.audit == "guard":
                await self._note(request, operation, HUNG_UP)
            raise
        if operation is not None and operation.audit == "guard" and response.status < 400:
            why = request.get(WHY, "by the admin API")
            await self._note(request, operation, why)
        return response

    async def _check(self, request: web.Request, operation: Operation | None) -> None:
        """Raises AdminError: 401 and 403 for the caller, 503 where another scheduler leads."""
        if operation is not None and operation.open:
            return
        if not (operation is not None and operation.scraped and self._is_scraper(request)):
            await self._check_token(request, operation.needs if operation else None)
        if not self._driver.leads and not (operation is not None and operation.standby):
            await not_leading(self._leadership)

    async def _note(self, request: web.Request, operation: Operation, why: str) -> None:
        """Enter a change into the audit trail; secrets and bodies are left out."""
        action = operation.handler.rpartition(".")[2]
        async with self._book.lock:
            subject = request.get(SUBJECT, request.path)
            await self._book.audit.note(request[WHO], action, subject, why)

    def _is_scraper(self, request: web.Request) -> bool:
        token = self._metrics_token
        return bool(token) and hmac.compare_digest(_token(request), token.encode())

    async def _check_token(self, request: web.Request, needs: Role | None) -> None:
        """`needs`: the least role; None where only the cluster's own token counts."""
        token, given = self._cluster_token, _token(request)
        if not token or hmac.compare_digest(given, token.encode()):
            request[WHO] = "cluster"
            return
        word = given.decode(errors="surrogateescape")
        known = await self._access.admin(word, self._driver.leads) if needs else None
        if known is None or needs is None:
            raise AdminError(
                401, "the token is missing or wrong: send Authorization: Bearer <token>"
            )
        if ROLES[known.role] < ROLES[needs]:
            message = f"this takes the role {needs}; token {known.name!r} is {known.role}"
            raise AdminError(403, message)
        request[WHO] = known.name


def _token(request: web.Request) -> bytes:
    return bearer.token_of(outside.header(request.headers.get("Authorization", "")))
