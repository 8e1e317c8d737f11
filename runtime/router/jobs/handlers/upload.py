"""Files that come in: a multipart form, streamed to the store.

Rules this file keeps:
- no more than FLUSH_BYTES and one piece of a file are in memory;
- who sends hardly anything is not waited for;
- a form that breaks off, or is refused at its end, leaves no file.
"""

from __future__ import annotations

import asyncio
import secrets
import time

from aiohttp import StreamReader, web

from runtime.outside import OutsideError
from runtime.router.call.body import bad_form
from runtime.router.call.errors import CallError
from runtime.router.call.multipart import FORM_TYPE, FormReader, Part
from runtime.router.jobs.store import file_rows
from runtime.router.jobs.store.database import JobStore
from runtime.router.jobs.store.rows import FileRow
from runtime.router.jobs.store.tenants import Owner

FLUSH_BYTES = 16 * file_rows.CHUNK_BYTES
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_FIELD_BYTES = 1024
_NAME_CHARS = 255
PACE_BYTES = 64 * 1024
_FORM_BYTES = 64 * 1024  # what a form may have beside its file
KEEP_MIN_S, KEEP_MAX_S = 3600, 30 * 24 * 3600  # what OpenAI lets callers ask for


async def take_in(
    request: web.Request,
    store: JobStore,
    maker: Owner,
    *,
    max_bytes: int,
    keep_s: float,
    read_s: float,
) -> FileRow:
    """The file of a form. Raises CallError (400, 408, 413, 507)."""
    if request.content_type != FORM_TYPE:
        message = f"send the file as {FORM_TYPE} with the fields purpose and file"
        raise CallError(400, "invalid_body", message, param="file")
    if (request.content_length or 0) > max_bytes + _FORM_BYTES:
        raise _too_large(max_bytes)
    await store.check_room(maker.tenant, request.content_length or 0)
    upload = _Upload(store, maker, max_bytes, read_s)
    try:
        fields = await _read_form(request, upload)
        return await upload.end(fields, keep_s)
    except OutsideError as error:
        raise bad_form(error) from None
    except web.RequestPayloadError as error:
        raise CallError(400, "invalid_body", f"the form broke off: {error}") from None
    except TimeoutError:
        message = f"less than {PACE_BYTES} bytes of the body arrived in {read_s:g}s"
        raise CallError(408, "body_timeout", message) from None
    finally:
        await upload.abandon()


async def _read_form(request: web.Request, upload: _Upload) -> dict[str, str]:
    """The fields that count; the file goes to `upload`."""
    reader = FormReader(request.headers.get("Content-Type", ""))
    fields = _Fields()
    part = Part("", None, True, 0)
    arrived = _Arrived(request.content, upload.read_s)
    while piece := await arrived.next():
        for event in reader.feed(piece):
            if isinstance(event, Part):
                part = event
                if part.name == "file":
                    await upload.begin(part.filename or "upload.jsonl")
            elif part.name == "file":
                await upload.take(event.of[event.begin : event.end])
            else:
                fields.add(part.name, event.of[event.begin : event.end])
    reader.end()
    return fields.texts()


class _Arrived:
    """A body piece by piece, of which PACE_BYTES at least come in each `read_s` of waiting."""

    def __init__(self, content: StreamReader, read_s: float) -> None:
        self._content = content
        self._read_s = self._left_s = read_s
        self._size = 0

    async def next(self) -> bytes:
        """b"" at the end. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(self._left_s):
            piece = await self._content.readany()
        self._left_s -= loop.time() - began
        self._size += len(piece)
        if self._size >= PACE_BYTES:
            self._left_s, self._size = self._read_s, 0
        return piece


class _Fields:
    """What a form holds beside its file."""

    def __init__(self) -> None:
        self._found: dict[str, bytes] = {}
        self._left = _FORM_BYTES

    def add(self, name: str, data: bytes) -> None:
        """Some of a field. Raises CallError (400)."""
        self._left -= len(data)
        value = self._found.get(name, b"") + data if name in _FIELDS else data
        if len(value) > _FIELD_BYTES or self._left < 0:
            message = f"a field of the form has at most {_FIELD_BYTES} bytes"
            raise CallError(400, "invalid_field", message, param=name)
        if name in _FIELDS:
            self._found[name] = value

    def texts(self) -> dict[str, str]:
        """By name."""
        found = self._found.items()
        return {name: value.decode("utf-8", "replace").strip() for name, value in found}


class _Upload:
    """One file on its way into the store."""

    def __init__(self, store: JobStore, maker: Owner, max_bytes: int, read_s: float) -> None:
        self._store = store
        self._maker = maker
        self._max_bytes = max_bytes
        self.read_s = read_s
        self._file: int | None = None
        self._filename = ""
        self._buffer = bytearray()
        self._size = 0
        self._chunk = 0
        self._kept = False

    async def begin(self, filename: str) -> None:
        """The file comes now."""
        if self._file is not None:
            raise CallError(400, "invalid_field", "the form has two files", param="file")
        file_id = f"file-{secrets.token_hex(12)}"
        self._file = await self._store.write(file_rows.begin, file_id, self._maker, time.time())
        self._filename = filename[-_NAME_CHARS:]

    async def take(self, data: bytes) -> None:
        """Some of its content."""
        self._size += len(data)
        if self._size > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._buffer += data
        while len(self._buffer) >= FLUSH_BYTES:
            await self._flush(bytes(self._buffer[:FLUSH_BYTES]))
            del self._buffer[:FLUSH_BYTES]

    async def _flush(self, data: bytes) -> None:
        assert self._file is not None
        await self._store.check_room(self._maker.tenant, len(data))
        self._chunk = await self._store.write_within(
            self._maker.tenant, len(data), file_rows.add_chunks, self._file, self._chunk, data
        )

    async def end(self, fields: dict[str, str], keep_s: float) -> FileRow:
        """The file is there from now on."""
        if self._file is None:
            raise CallError(400, "missing_field", "the form has no file; add it", param="file")
        if self._buffer:
            await self._flush(bytes(self._buffer))
        if fields.get("purpose") != "batch":
            got = fields.get("purpose", "none")
            message = f"purpose must be 'batch', the only one offered here, got {got[:80]!r}"
            raise CallError(400, "invalid_field", message, param="purpose")
        until = time.time() + (_asked_keep_s(fields) or keep_s)
        file = await self._store.write(
            file_rows.end, self._file, self._filename, "batch", self._size, until
        )
        self._kept = True
        return file

    async def abandon(self) -> None:
        """Remove what is not whole."""
        if self._file is not None and not self._kept:
            await self._store.write(file_rows.delete, self._file)


def _asked_keep_s(fields: dict[str, str]) -> float | None:
    text = fields.get("expires_after[seconds]")
    if text is None:
        return None
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        message = "expires_after.anchor must be 'created_at'"
        raise CallError(400, "invalid_field", message, param="expires_after")
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        text = "0"
    if not KEEP_MIN_S <= int(text) <= KEEP_MAX_S:
        message = f"expires_after.seconds must be from {KEEP_MIN_S} to {KEEP_MAX_S}"
        raise CallError(400, "invalid_field", message, param="expires_after")
    return float(text)


def _too_large(max_bytes: int) -> CallError:
    message = f"a file may have at most {max_bytes} bytes (router.batch_file_max_bytes)"
    return CallError(413, "file_too_large", message, param="file")
