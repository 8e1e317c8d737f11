"""The HTTP surface of files, batches and jobs: OpenAI's, and GET and DELETE of /jobs/{id}.

Rules this file keeps:
- everything is its caller's tenant's; another tenant's id is not found;
- what cannot be carried out is refused at once, with the field and the fix.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Annotated, Literal

from aiohttp import web
from msgspec import Meta, Struct

from runtime.config import RouterConfig
from runtime.router.body import Invocation
from runtime.router.errors import ApiError
from runtime.router.jobs import batch_rows, file_rows, job_rows, shapes, signing, upload
from runtime.router.jobs.file_rows import FileRow
from runtime.router.jobs.invokes import WINDOW_S
from runtime.router.jobs.lines import ENDPOINTS
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.requests import (
    body_of,
    caller_of,
    limit_of,
    not_found,
    shown,
    webhook_problem,
)
from runtime.router.jobs.store import Store

WEBHOOK_HEADER = "X-Stoker-Webhook"
WEBHOOK_KEY = "webhook"  # of a batch's metadata
_FILES_MAX, _BATCHES_MAX = 10_000, 100

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


class Handlers:
    """`wake`: there is work. `signs`: whether there is a secret to sign webhooks with."""

    def __init__(
        self,
        store: Store,
        settings: RouterConfig,
        metrics: JobMetrics,
        *,
        signs: bool,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._signs = signs
        self._wake = wake

    def routes(self) -> list[web.RouteDef]:
        """For the application, before its catch-all below /v1."""
        return [
            web.post("/v1/files", self._create_file),
            web.get("/v1/files", self._files),
            web.get("/v1/files/{id}", self._file),
            web.delete("/v1/files/{id}", self._delete_file),
            web.get("/v1/files/{id}/content", self._content),
            web.post("/v1/batches", self._create_batch),
            web.get("/v1/batches", self._batches),
            web.get("/v1/batches/{id}", self._batch),
            web.post("/v1/batches/{id}/cancel", self._cancel_batch),
            web.get("/jobs/{id}", self._job),
            web.delete("/jobs/{id}", self._delete_job),
        ]

    # -------------------------------------------------------------------------------- files

    async def _create_file(self, request: web.Request) -> web.Response:
        settings = self._settings
        file = await upload.take_in(
            request,
            self._store,
            caller_of(request).tenant,
            max_bytes=settings.batch_file_max_bytes,
            keep_s=settings.results_keep_s,
            read_s=settings.read_timeout_s,
        )
        return shown(shapes.file_object(file))

    async def _files(self, request: web.Request) -> web.Response:
        limit = limit_of(request, _FILES_MAX, _FILES_MAX)
        order, after = request.query.get("order", "desc"), request.query.get("after")
        if order not in ("asc", "desc"):
            message = f"order must be asc or desc, got {order[:80]!r}"
            raise ApiError(400, "invalid_field", message, param="order")
        tenant = caller_of(request).tenant
        seq = None if after is None else (await self._find_file(tenant, after)).seq
        found = await self._store.read(
            file_rows.page, tenant, request.query.get("purpose"), seq, limit + 1, order == "desc"
        )
        objects = [shapes.file_object(file) for file in found[:limit]]
        return shown(shapes.listing(objects, len(found) > limit))

    async def _file(self, request: web.Request) -> web.Response:
        return shown(shapes.file_object(await self._asked_file(request)))

    async def _delete_file(self, request: web.Request) -> web.Response:
        file = await self._asked_file(request)
        batch = await self._store.write(file_rows.delete_unused, file)
        if batch is not None:
            message = f"batch {batch} still reads this file; cancel the batch first"
            raise ApiError(409, "file_in_use", message, param="file_id")
        return shown({"id": file.id, "object": "file", "deleted": True})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        file = await self._asked_file(request)
        response = web.StreamResponse()
        response.content_type = "application/octet-stream"
        response.content_length = file.size_bytes
        position: int | None = 0
        left = file.size_bytes
        while position is not None:
            try:
                data, position = await self._store.read(file_rows.content, file, position)
            except ApiError:
                if not response.prepared:
                    raise
                break
            if not response.prepared:
                await response.prepare(request)
            left -= len(data)
            await response.write(data)
        if left and request.transport is not None:  # it was deleted: it must not look whole
            request.transport.close()
        return response

    async def _asked_file(self, request: web.Request) -> FileRow:
        return await self._find_file(caller_of(request).tenant, request.match_info["id"])

    async def _find_file(self, tenant: str, file_id: str) -> FileRow:
        file = await self._store.read(file_rows.get, tenant, file_id)
        if file is None:
            raise not_found("file", file_id)
        return file

    # -------------------------------------------------------------------------------- batches

    async def _create_batch(self, request: web.Request) -> web.Response:
        asked = await body_of(request, _NewBatch, self._settings.read_timeout_s)
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint must be one of {', '.join(ENDPOINTS)}, got {asked.endpoint[:80]!r}"
            raise ApiError(400, "invalid_field", message, param="endpoint")
        caller = caller_of(request)
        file = await self._find_file(caller.tenant, asked.input_file_id)
        if file.purpose != "batch":
            message = f"file {file.id} has purpose {file.purpose!r}, not 'batch'"
            raise ApiError(400, "invalid_field", message, param="input_file_id")
        webhook = (asked.metadata or {}).get(WEBHOOK_KEY)
        self._check_webhook(f"metadata.{WEBHOOK_KEY}", webhook)
        await self._store.check_room()
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
        limit, after = limit_of(request, 20, _BATCHES_MAX), request.query.get("after")
        tenant = caller_of(request).tenant
        seq = None if after is None else (await self._find_batch(tenant, after)).seq
        found = await self._store.read(batch_rows.page, tenant, seq, limit + 1)
        objects = [shapes.batch_object(row) for row in found[:limit]]
        return shown(shapes.listing(objects, len(found) > limit))

    async def _batch(self, request: web.Request) -> web.Response:
        tenant = caller_of(request).tenant
        return shown(shapes.batch_object(await self._find_batch(tenant, request.match_info["id"])))

    async def _cancel_batch(self, request: web.Request) -> web.Response:
        tenant, batch_id = caller_of(request).tenant, request.match_info["id"]
        row = await self._store.write(batch_rows.cancel, tenant, batch_id, time.time())
        if row is None:
            raise not_found("batch", batch_id)
        if row.status in shapes.FINAL and row.status != "cancelled":
            message = f"batch {row.id} is {row.status} already"
            raise ApiError(409, "batch_ended", message, param="batch_id")
        self._wake()
        return shown(shapes.batch_object(row))

    async def _find_batch(self, tenant: str, batch_id: str) -> batch_rows.BatchRow:
        row = await self._store.read(batch_rows.get, tenant, batch_id)
        if row is None:
            raise not_found("batch", batch_id)
        return row

    # -------------------------------------------------------------------------------- jobs

    def wanted(self, request: web.Request) -> bool:
        """Whether a call is to be answered later. Raises ApiError (400) for a webhook it may not
        have."""
        webhook = request.headers.get(WEBHOOK_HEADER)
        if not _prefers_async(request):
            if webhook is not None:
                raise webhook_problem(WEBHOOK_HEADER, "needs the header Prefer: respond-async")
            return False
        self._check_webhook(WEBHOOK_HEADER, webhook)
        return True

    async def accept(self, request: web.Request, call: Invocation) -> web.Response:
        """202 and the job that makes `call`."""
        await self._store.check_room(len(call.body))
        caller = caller_of(request)
        row = await self._store.write(
            job_rows.insert, f"job_{secrets.token_hex(12)}", caller.tenant, caller.key_id,
            caller.priority, call.head.model, call.path, call.body,
            request.headers.get(WEBHOOK_HEADER), time.time(), WINDOW_S,
        )  # fmt: skip
        self._metrics.job("created")
        self._wake()
        headers = {"Location": f"/jobs/{row.id}", "Preference-Applied": "respond-async"}
        return shown(shapes.job_object(row, None), 202, headers)

    async def _job(self, request: web.Request) -> web.Response:
        tenant, job_id = caller_of(request).tenant, request.match_info["id"]
        found = await self._store.read(job_rows.with_answer, tenant, job_id)
        if found is None:
            raise not_found("job", job_id)
        return shown(shapes.job_object(*found))

    async def _delete_job(self, request: web.Request) -> web.Response:
        """Cancel it, or forget its answer."""
        tenant, job_id = caller_of(request).tenant, request.match_info["id"]
        row = await self._store.read(job_rows.get, tenant, job_id)
        if row is None:
            raise not_found("job", job_id)
        keep_s = self._settings.results_keep_s
        if await self._store.write(
            job_rows.end, row.seq, "cancelled", None, None, time.time(), keep_s
        ):
            self._metrics.job("cancelled")
            self._wake()
            return await self._job(request)
        await self._store.write(job_rows.delete, row.seq)
        return shown({"id": row.id, "object": "job", "deleted": True})

    def _check_webhook(self, name: str, url: str | None) -> None:
        if url is None:
            return
        if not self._signs:
            raise webhook_problem(name, "cannot be used: this router has no router.webhook_secret")
        problem = signing.url_problem(url, self._settings.webhook_private)
        if problem is not None:
            raise webhook_problem(name, problem)


def _prefers_async(request: web.Request) -> bool:
    wishes = ",".join(request.headers.getall("Prefer", ())).split(",")
    return any(wish.partition(";")[0].strip().lower() == "respond-async" for wish in wishes)
