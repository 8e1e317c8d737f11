"""OpenAI's files over HTTP.

Rules this file keeps:
- a file is its caller's tenant's; the id of one that the caller may not see is not found;
- an upload is a request of its caller's, within its scope and limits, like any other.
"""

from __future__ import annotations

from aiohttp import web

from runtime.contract.config import RouterConfig
from runtime.router.call.errors import CallError
from runtime.router.callers.keys import Keys
from runtime.router.callers.memory import Memory
from runtime.router.jobs.handlers import upload
from runtime.router.jobs.handlers.requests import (
    check_path,
    counted,
    limit_of,
    maker_of,
    not_found,
    owner_of,
    shown,
)
from runtime.router.jobs.store import file_rows, shapes
from runtime.router.jobs.store.database import JobStore
from runtime.router.jobs.store.rows import FileRow
from runtime.router.jobs.store.tenants import Owner

_FILES_MAX = 10_000


class FileHandlers:
    """`/v1/files`."""

    def __init__(self, store: JobStore, settings: RouterConfig, keys: Keys, memory: Memory) -> None:
        self._store = store
        self._settings = settings
        self._keys = keys
        self._memory = memory

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
        check_path(request)
        with self._memory.taken(2 * upload.FLUSH_BYTES):
            file = await self._take_in(request)
        return shown(shapes.file_object(file))

    async def _take_in(self, request: web.Request) -> FileRow:
        settings = self._settings
        async with counted(request, self._keys):
            return await upload.take_in(
                request,
                self._store,
                maker_of(request),
                max_bytes=settings.batch_file_max_bytes,
                keep_s=settings.results_keep_s,
                read_s=settings.read_timeout_s,
            )

    async def _files(self, request: web.Request) -> web.Response:
        check_path(request)
        limit = limit_of(request, _FILES_MAX, _FILES_MAX)
        order, after = request.query.get("order", "desc"), request.query.get("after")
        if order not in ("asc", "desc"):
            message = f"order must be asc or desc, got {order[:80]!r}"
            raise CallError(400, "invalid_field", message, param="order")
        owner = owner_of(request)
        seq = None if after is None else (await find_file(self._store, owner, after)).seq
        found = await self._store.read(
            file_rows.page, owner, request.query.get("purpose"), seq, limit + 1, order == "desc"
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
            raise CallError(409, "file_in_use", message, param="file_id")
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
            except CallError:
                if not response.prepared:
                    raise
                break
            if not response.prepared:
                if left and not data:  # it was deleted since it was found
                    raise not_found("file", file.id)
                await response.prepare(request)
            left -= len(data)
            await response.write(data)
        if left and request.transport is not None:  # it was deleted: it must not look whole
            request.transport.close()
        return response

    async def _asked_file(self, request: web.Request) -> FileRow:
        check_path(request)
        return await find_file(self._store, owner_of(request), request.match_info["id"])


async def find_file(store: JobStore, owner: Owner, file_id: str) -> FileRow:
    """The owner's file. Raises CallError (404)."""
    file = await store.read(file_rows.get, owner, file_id)
    if file is None:
        raise not_found("file", file_id)
    return file
