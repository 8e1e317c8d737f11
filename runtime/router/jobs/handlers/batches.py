"""OpenAI's batches over HTTP.

Rules this file keeps:
- a batch is its caller's tenant's; the id of one that the caller may not see is not found;
- a batch is a request of its caller's, within its scope and limits, like any other; its lines are
  checked as they are sent, each for its model;
- what cannot be carried out is refused at once, with the field and the fix.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta, Struct

from runtime.contract.config import RouterConfig
from runtime.router.call.errors import CallError
from runtime.router.callers.keys import Keys, reaches
from runtime.router.jobs.handlers import upload
from runtime.router.jobs.handlers.files import find_file
from runtime.router.jobs.handlers.requests import (
    body_of,
    caller_of,
    check_path,
    check_webhook,
    counted,
    limit_of,
    not_found,
    owner_of,
    shown,
    too_many,
)
from runtime.router.jobs.invokes import WINDOW_S
from runtime.router.jobs.lines import ENDPOINTS
from runtime.router.jobs.store import batch_rows, shapes
from runtime.router.jobs.store.database import JobStore
from runtime.router.jobs.store.rows import BatchRow
from runtime.router.jobs.store.tenants import Owner

WEBHOOK_KEY = "webhook"  # of a batch's metadata
_BATCHES_MAX = 100

_Key = Annotated[str, Meta(min_length=1, max_length=64)]
_Value = Annotated[str, Meta(max_length=512)]


class _Expiry(Struct):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=upload.KEEP_MIN_S, le=upload.KEEP_MAX_S)]


class _NewBatch(Struct):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[_Key, _Value], Meta(max_length=16)] | None = None
    output_expires_after: _Expiry | None = None


class BatchHandlers:
    """`/v1/batches`. `wake`: there is work."""

    def __init__(
        self, store: JobStore, settings: RouterConfig, keys: Keys, wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._settings = settings
        self._keys = keys
        self._wake = wake

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        return [
            web.post("/v1/batches", self._create_batch),
            web.get("/v1/batches", self._batches),
            web.get("/v1/batches/{id}", self._batch),
            web.post("/v1/batches/{id}/cancel", self._cancel_batch),
        ]

    async def _create_batch(self, request: web.Request) -> web.Response:
        check_path(request)
        async with counted(request, self._keys):
            return await self._take_in(request)

    async def _take_in(self, request: web.Request) -> web.Response:
        asked = await body_of(request, _NewBatch, self._settings.read_timeout_s)
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint must be one of {', '.join(ENDPOINTS)}, got {asked.endpoint[:80]!r}"
            raise CallError(400, "invalid_field", message, param="endpoint")
        caller, most = caller_of(request), self._settings.batches_per_tenant
        if not reaches(caller, asked.endpoint):
            message = f"this API key may not call {asked.endpoint}; its scope lists its endpoints"
            raise CallError(403, "not_allowed", message, param="endpoint")
        file = await find_file(self._store, owner_of(request), asked.input_file_id)
        if file.purpose != "batch":
            message = f"file {file.id} has purpose {file.purpose!r}, not 'batch'"
            raise CallError(400, "invalid_field", message, param="input_file_id")
        webhook = (asked.metadata or {}).get(WEBHOOK_KEY)
        check_webhook(f"metadata.{WEBHOOK_KEY}", webhook, self._settings)
        await self._store.check_room(caller.tenant)
        if await self._store.read(batch_rows.waiting, caller.tenant) >= most:
            raise too_many("batches", most)
        expiry = asked.output_expires_after
        row = await self._store.write(
            batch_rows.insert, f"batch_{secrets.token_hex(12)}", caller.tenant, caller.key_id,
            asked.endpoint, file, asked.metadata, time.time(), WINDOW_S,
            float(expiry.seconds) if expiry else self._settings.results_keep_s, webhook,
        )  # fmt: skip
        if row is None:
            raise not_found("file", file.id)
        self._wake()
        return shown(shapes.batch_object(row))

    async def _batches(self, request: web.Request) -> web.Response:
        check_path(request)
        limit, after = limit_of(request, 20, _BATCHES_MAX), request.query.get("after")
        owner = owner_of(request)
        seq = None if after is None else (await self._find_batch(owner, after)).seq
        found = await self._store.read(batch_rows.page, owner, seq, limit + 1)
        objects = [shapes.batch_object(row) for row in found[:limit]]
        return shown(shapes.listing(objects, len(found) > limit))

    async def _batch(self, request: web.Request) -> web.Response:
        check_path(request)
        row = await self._find_batch(owner_of(request), request.match_info["id"])
        return shown(shapes.batch_object(row))

    async def _cancel_batch(self, request: web.Request) -> web.Response:
        check_path(request)
        owner, batch_id = owner_of(request), request.match_info["id"]
        row = await self._store.write(batch_rows.cancel, owner, batch_id, time.time())
        if row is None:
            raise not_found("batch", batch_id)
        if row.status in shapes.FINAL and row.status != "cancelled":
            message = f"batch {row.id} is {row.status} already"
            raise CallError(409, "batch_ended", message, param="batch_id")
        self._wake()
        return shown(shapes.batch_object(row))

    async def _find_batch(self, owner: Owner, batch_id: str) -> BatchRow:
        row = await self._store.read(batch_rows.get, owner, batch_id)
        if row is None:
            raise not_found("batch", batch_id)
        return row
