"""Request bodies: the two fields routing needs, and how to set a field without touching the rest.

Rule this file keeps: bytes that need no change are not changed; values that are kept are kept as
they were written, digits and escapes included.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Struct

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.errors import ApiError

_FORM_FIELDS = ("model", "stream")
_SENT = ("prompt", "messages", "input")
_TARGETS = {
    "prompt": "/v1/completions",
    "messages": "/v1/chat/completions",
    "input": "/v1/embeddings",
}
_HINT_BYTES = 1024  # of a value that is not of the type that is expected of it


class Head(Struct):
    """What the router reads of a JSON body; after `read_head` the first two are checked.

    The others are hints, None where they are of another type: the engine judges them. All other
    fields are skipped.
    """

    model: str = ""
    stream: bool | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: int | float | bool | None = None
    seed: int | None = None


class Invocation(NamedTuple):
    """What `/invoke/{model}` stands for in OpenAI's terms."""

    path: str
    body: bytes
    head: Head


_read_head: Callable[[bytes], Head] = outside.reader(Head)
_read_odd: Any = outside.reader(
    msgspec.defstruct(
        "_Odd", [(name, msgspec.Raw, msgspec.Raw()) for name in Head.__struct_fields__]
    )
)
_read_model: Any = outside.reader(str)
_read_stream: Any = outside.reader(bool | None)
_HINTS: Any = {
    "user": outside.reader(str),
    "prompt_cache_key": outside.reader(str),
    "max_tokens": outside.reader(int),
    "max_completion_tokens": outside.reader(int),
    "temperature": outside.reader(int | float | bool),
    "seed": outside.reader(int),
}


def read_head(body: bytes) -> Head:
    """The head of a JSON body. Raises ApiError (400) naming `model` or `stream`."""
    try:
        head = _read_head(body)
    except OutsideError as error:
        if error.field is None:
            raise _not_json(error) from None
        head = _odd_head(body)
    return checked(head)


def checked(head: Head) -> Head:
    """`head`, if it names a model. Raises ApiError (400)."""
    if not head.model:
        raise ApiError(400, "missing_field", "the body has no model; add it", param="model")
    check_model(head.model)
    return head


def _odd_head(body: bytes) -> Head:
    """The head of a body in which a value has another type than is expected."""
    try:
        raw = _read_odd(body)
    except OutsideError as error:
        raise _not_json(error) from None
    head = Head()
    for name, read in _HINTS.items():
        value = bytes(getattr(raw, name))
        if 0 < len(value) <= _HINT_BYTES:
            with contextlib.suppress(OutsideError):
                setattr(head, name, read(value))
    if raw.model:
        head.model = _field(raw.model, _read_model, "model", "a model's name")
    if raw.stream:
        head.stream = _field(raw.stream, _read_stream, "stream", "true or false")
    return head


def _field(raw: msgspec.Raw, read: Any, name: str, wanted: str) -> Any:
    value = bytes(raw)
    try:
        return read(value)
    except OutsideError:
        message = f"{name} must be {wanted}, got {_shown(value)}"
        raise ApiError(400, "invalid_field", message, param=name) from None


def check_model(name: str) -> None:
    """Raises ApiError (400) for what can be no model's name, before anything looks for it."""
    problem = outside.name_problem(name)
    if problem is not None:
        raise ApiError(400, "invalid_field", f"model {problem}", param="model")


async def read_form(body: bytes, headers: Mapping[str, str]) -> Head:
    """The head of a multipart form. Raises ApiError (400) naming the field."""
    found: dict[str, str] = {}
    try:
        form = MultipartReader(headers, _stream_of(body))
        while len(found) < len(_FORM_FIELDS) and (part := await form.next()) is not None:
            if isinstance(part, BodyPartReader) and part.name in _FORM_FIELDS:
                found[part.name] = (await part.text(encoding="utf-8")).strip()
    except (ValueError, AssertionError, RuntimeError, LookupError, HttpProcessingError) as error:
        message = f"the multipart body cannot be read: {error}"
        raise ApiError(400, "invalid_body", message) from None
    stream = found.get("stream", "").lower() in ("true", "1")
    return checked(Head(model=found.get("model", ""), stream=stream))


def _stream_of(body: bytes) -> StreamReader:
    """The library reads forms from a stream only."""
    loop = asyncio.get_running_loop()
    stream = StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)
    stream.feed_data(body)
    stream.feed_eof()
    return stream


def with_model(body: bytes, model: str) -> tuple[bytes, Head]:
    """The body with its `model` replaced, and its head. Raises as `read_head` does."""
    fields = _fields(body)
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    return changed, read_head(changed)


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
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    head = read_head(changed)
    if head.stream and sent[0] == "input":
        raise ApiError(400, "invalid_body", "embeddings (input) cannot be streamed", param="stream")
    return Invocation(_TARGETS[sent[0]], changed, head)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return outside.fields(body)
    except OutsideError as error:
        raise _not_json(error) from None


def _raw(value: str | bool) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _not_json(error: OutsideError) -> ApiError:
    return ApiError(400, "invalid_json", f"the body {error}")


def _shown(value: bytes) -> str:
    return value[:80].decode(errors="replace") + ("…" if len(value) > 80 else "")
