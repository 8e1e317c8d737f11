"""OpenAI's files over HTTP.

Rule this file keeps: a file is its caller's tenant's; another tenant's id is not found.
"""

from __future__ import annotations

from aiohttp import web

from runtime.config import RouterConfig
from runtime.router.errors import ApiError
from runtime.router.jobs import file_rows, shapes, upload
from runtime.router.jobs.file_rows import FileRow
from runtime.router.jobs.requests import caller_of, limit_of, not_found, shown
from runtime.router.jobs.store import Store

_FILES_MAX = 10_000


class FileHandlers:
    """`/v1/files`."""

    def __init__(self, store: Store, settings: RouterConfig) -> None:
        self._store = store
        self._settings = settings

    def routes(self) -> list[web.RouteDef]:
        """For the application."""
        return [
            web.post("/v1/files", self._create_file),
            web.get("/v1/files", self._files),
            web.get("/v1/files/{id}", self._file),
            web.delete("/v1/files/{id}", self._delete_file),
            web.get("/v1/files/{id}/content", self._content, allow_head=False),
        ]

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
        seq = None if after is None else (await find_file(self._store, tenant, after)).seq
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
        tenant = caller_of(request).tenant
        return await find_file(self._store, tenant, request.match_info["id"])


async def find_file(store: Store, tenant: str, file_id: str) -> FileRow:
    """The tenant's file. Raises ApiError (404)."""
    file = await store.read(file_rows.get, tenant, file_id)
    if file is None:
        raise not_found("file", file_id)
    return file
