"""Request bodies: the two fields routing needs, and how to set a field without touching the rest.

Rule this file keeps: bytes that need no change are not changed; values that are kept are kept as
they were written, digits and escapes included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from runtime import outside
from runtime.outside import SHORT_NAME, OutsideError
from runtime.router.call import multipart
from runtime.router.call.errors import CallError
from runtime.router.call.multipart import FORM_TYPE, Form
from runtime.router.call.paths import FORM_PATHS, JSON_PATHS

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
    previous_response_id: str | None = None
    request_id: str | None = None  # what a response is to be called
    stream_options: msgspec.Raw = msgspec.Raw()  # as it was written; empty: it was not


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
    "previous_response_id": outside.reader(str),
    "request_id": outside.reader(str),
}


def read_head(body: bytes) -> Head:
    """The head of a JSON body. Raises CallError (400) naming `model` or `stream`."""
    try:
        head = _read_head(body)
    except OutsideError as error:
        if error.field is None:
            raise _not_json(error) from None
        head = _odd_head(body)
    return head if 0 < len(head.model) <= SHORT_NAME else checked(head)


def checked(head: Head) -> Head:
    """`head`, if it names a model. Raises CallError (400)."""
    if not head.model:
        raise CallError(400, "missing_field", "the body has no model; add it", param="model")
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
    head.stream_options = raw.stream_options
    if raw.model and bytes(raw.model) != b"null":
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
        raise CallError(400, "invalid_field", message, param=name) from None


def check_model(name: str) -> None:
    """Raises CallError (400) for what can be no model's name, before anything looks for it."""
    problem = outside.name_problem(name)
    if problem is not None:
        raise CallError(400, "invalid_field", f"model {problem}", param="model")


def takes_form(types: Sequence[str], path: str) -> bool:
    """Whether a body with these Content-Type headers, for the engine's `path`, is a form; else it
    is JSON. Raises CallError (400) for what the engine would refuse: the sentence is vLLM's."""
    bare, got = path.partition("?")[0], ", ".join(types)[:80]
    if len(types) > 1:
        message = f"the request has {len(types)} Content-Type headers ({got!r}): send one"
        raise CallError(400, "invalid_content_type", message)
    if bare not in FORM_PATHS and outside.is_json_type(got):
        return False
    if bare not in JSON_PATHS and got.lower().startswith("multipart/"):
        return True
    wanted = FORM_TYPE if bare in FORM_PATHS else outside.JSON_TYPE
    message = f"Unsupported Media Type: Only {wanted!r} is allowed, got {got or 'none'!r}"
    raise CallError(400, "invalid_content_type", message)


def check_json(types: Sequence[str]) -> None:
    """As `takes_form` does, where nothing but JSON is taken."""
    takes_form(types, "/v1/completions")


def read_form(body: bytes, content_type: str) -> tuple[Form, Head]:
    """A multipart form and its head, in which the model may be missing. Raises CallError (400)."""
    try:
        form = multipart.read_form(body, content_type)
    except OutsideError as error:
        raise bad_form(error) from None
    return form, Head(model=form.model, stream=form.stream)


def bad_form(error: OutsideError) -> CallError:
    """What is told of a form that is refused."""
    return CallError(400, "invalid_body", f"the form {error}")


def with_model(body: bytes, model: str) -> tuple[bytes, Head]:
    """The body with its `model` replaced, and its head. Raises as `read_head` does."""
    fields = _fields(body)
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    return changed, read_head(changed)


def invocation(body: bytes, model: str, stream: bool | None) -> Invocation:
    """The OpenAI call that `/invoke/{model}` with this body makes; `stream` wins over the body's.

    Raises CallError (400) unless exactly one of prompt, messages and input is there.
    """
    fields = _fields(body)
    sent = [name for name in _SENT if name in fields]
    if len(sent) != 1:
        got = f"got {' and '.join(sent)}" if sent else "got none of them"
        message = f"send exactly one of prompt, messages or input ({got})"
        raise CallError(400, "invalid_body", message, param=sent[1] if sent else "prompt")
    if stream is not None:
        fields["stream"] = _raw(stream)
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    head = read_head(changed)
    if head.stream and sent[0] == "input":
        raise CallError(
            400, "invalid_body", "embeddings (input) cannot be streamed", param="stream"
        )
    return Invocation(_TARGETS[sent[0]], changed, head)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return outside.fields(body)
    except OutsideError as error:
        raise _not_json(error) from None


def _raw(value: str | bool) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _not_json(error: OutsideError) -> CallError:
    return CallError(400, "invalid_json", f"the body {error}")


def _shown(value: bytes) -> str:
    return value[:80].decode(errors="replace") + ("…" if len(value) > 80 else "")
