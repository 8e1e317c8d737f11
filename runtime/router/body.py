"""Request bodies: the two fields routing needs, and how to set a field without touching the rest.

Rule this file keeps: bytes that need no change are not changed; values that are kept are kept as
they were written, digits and escapes included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import UNSET, Struct

from runtime.router.errors import ApiError

_FORM_FIELDS = ("model", "stream")
_SENT = ("prompt", "messages", "input")
_TARGETS = {
    "prompt": "/v1/completions",
    "messages": "/v1/chat/completions",
    "input": "/v1/embeddings",
}


class _Head(Struct):
    model: Any = UNSET
    stream: Any = None


class Invocation(NamedTuple):
    """What `/invoke/{model}` stands for in OpenAI's terms."""

    path: str
    body: bytes
    streaming: bool


_read_head = msgspec.json.Decoder(_Head).decode
_read_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_head(body: bytes) -> tuple[str, bool]:
    """`model` and `stream` of a JSON body. Raises ApiError (400) naming the field."""
    try:
        head = _read_head(body)
    except msgspec.DecodeError as error:
        raise _not_json(error) from None
    return _model(head.model), _stream(head.stream)


async def read_form(body: bytes, headers: Mapping[str, str]) -> tuple[str, bool]:
    """`model` and `stream` of a multipart form. Raises ApiError (400) naming the field."""
    found: dict[str, str] = {}
    try:
        form = MultipartReader(headers, _stream_of(body))
        while len(found) < len(_FORM_FIELDS) and (part := await form.next()) is not None:
            if isinstance(part, BodyPartReader) and part.name in _FORM_FIELDS:
                found[part.name] = (await part.text(encoding="utf-8")).strip()
    except (ValueError, AssertionError, RuntimeError, LookupError, HttpProcessingError) as error:
        message = f"the multipart body cannot be read: {error}"
        raise ApiError(400, "invalid_body", message) from None
    return _model(found.get("model", UNSET)), found.get("stream", "").lower() in ("true", "1")


def _stream_of(body: bytes) -> StreamReader:
    """The library reads forms from a stream only."""
    loop = asyncio.get_running_loop()
    stream = StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)
    stream.feed_data(body)
    stream.feed_eof()
    return stream


def with_model(body: bytes, model: str) -> tuple[bytes, bool]:
    """The body with its `model` replaced, and whether it asks for a stream."""
    fields = _fields(body)
    stream = _stream(msgspec.json.decode(fields["stream"]) if "stream" in fields else None)
    fields["model"] = _raw(model)
    return msgspec.json.encode(fields), stream


def invocation(body: bytes, model: str, stream: bool | None) -> Invocation:
    """The OpenAI call that `/invoke/{model}` with this body makes; `stream` wins over the body's.

    Raises ApiError (400) unless exactly one of prompt, messages and input is there.
    """
    fields = _fields(body)
    sent = [name for name in _SENT if name in fields]
    if len(sent) != 1:
        got = f"got {' and '.join(sent)}" if sent else "got none of them"
        message = f"send exactly one of prompt, messages or input ({got})"
        raise ApiError(400, "invalid_body", message, param=sent[1] if sent else "prompt")
    if stream is not None:
        fields["stream"] = _raw(stream)
    streaming = _stream(msgspec.json.decode(fields["stream"]) if "stream" in fields else None)
    if streaming and sent[0] == "input":
        raise ApiError(400, "invalid_body", "embeddings (input) cannot be streamed", param="stream")
    fields["model"] = _raw(model)
    return Invocation(_TARGETS[sent[0]], msgspec.json.encode(fields), streaming)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _read_fields(body)
    except msgspec.DecodeError as error:
        raise _not_json(error) from None


def _raw(value: str | bool) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _not_json(error: msgspec.DecodeError) -> ApiError:
    return ApiError(400, "invalid_json", f"the body is not a JSON object: {error}")


def _model(value: Any) -> str:
    if value is UNSET:
        raise ApiError(400, "missing_field", "the body has no model; add it", param="model")
    if not isinstance(value, str) or not value:
        message = f"model must be a model's name, got {_shown(value)}"
        raise ApiError(400, "invalid_field", message, param="model")
    return value


def _stream(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    message = f"stream must be true or false, got {_shown(value)}"
    raise ApiError(400, "invalid_field", message, param="stream")


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:80] + "…"
