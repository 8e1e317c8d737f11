"""Turns bytes from outside into objects: the one place where that is done. Pure.

From outside is whatever a caller, another process or a model's publisher wrote: request bodies,
answers of engines and agents, documents of operators, files of a model.

Rules this file keeps:
- what is wrong with the bytes (size, depth, keys, encoding, types) is an OutsideError, and nothing
  else is raised: its words follow the name of what was read, as in f"the body {error}";
- the work is linear in the bytes and done in C; what is looked at key by key is bounded first;
- the way of good bytes has no check of its own: all of them are made once the decoder has failed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import yaml

NAME_BYTES = 256  # of a name that a caller gives: no model, alias or adapter has a longer one
SHORT_NAME = NAME_BYTES // 4  # characters that are not more bytes: UTF-8 has at most four each
KEYS = 4096  # of an object that is read key by key
DOCUMENT_BYTES = 1024 * 1024
DOCUMENT_DEPTH = 64
DOCUMENT_VALUES = 20_000
JSON_TYPE = "application/json"

_SHOWN = 300  # characters of a decoder's words
_BOM = b"\xef\xbb\xbf"
_FIELD = re.compile(r" - at `\$\.([^`]+)`$")
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# What msgspec raises; RecursionError also while it skips a field that nobody reads.
_FAILURES = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Fields of OpenAI's bodies that may hold many keys of their own.
_LARGE = (
    "messages", "prompt", "input", "tools", "functions", "documents", "text", "response_format",
    "structured_outputs", "chat_template_kwargs", "logit_bias", "metadata",
)  # fmt: skip

T = TypeVar("T")


class OutsideError(ValueError):
    """Bytes that can't be read, and why.

    `field`: the path of the one value that is wrong, such as `a.b[0]`; None: all of it is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def reader(
    kind: type[T] | Any, wanted: str = "a JSON object", levels: int | None = None
) -> Callable[[bytes], T]:
    """A decoder of JSON into `kind`, made once; `wanted` names that in its errors.

    `levels`: the limit that is told to whoever nests too deep; None: the interpreter's.
    """
    read: Callable[[bytes], T] = msgspec.json.Decoder(kind).decode

    def checked(data: bytes) -> T:
        try:
            return read(data)
        except _FAILURES as error:
            if data[:3] != _BOM:
                raise _explained(data, error, wanted, levels) from None
        return checked(data[3:])  # vLLM reads it too

    return checked


_READERS: dict[Any, Callable[[bytes], Any]] = {}  # by kind: there are as many as structs


def decode(data: bytes | str, kind: type[T]) -> T:
    """JSON into `kind`. Raises OutsideError, a ValueError."""
    read = _READERS.get(kind)
    if read is None:
        read = _READERS[kind] = reader(kind, f"a {getattr(kind, '__name__', 'JSON value')}")
    found: T = read(data.encode(errors="surrogatepass") if isinstance(data, str) else data)
    return found


_read_large: Callable[[bytes], Any] = reader(
    msgspec.defstruct("_Large", [(name, msgspec.Raw, msgspec.Raw()) for name in _LARGE])
)
_read_fields: Callable[[bytes], dict[str, msgspec.Raw]] = reader(dict[str, msgspec.Raw])


def fields(data: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, each as it was written. Raises OutsideError."""
    if data.count(b":") > KEYS:
        large = _read_large(data)
        values = (bytes(getattr(large, name)) for name in _LARGE)
        if data.count(b":") - sum(value.count(b":") for value in values) > KEYS:
            raise OutsideError(f"has more than {KEYS} keys")
    return _read_fields(data)


def one_line(data: bytes) -> msgspec.Raw:
    """JSON without line breaks, its numbers as they were written. Raises OutsideError."""
    try:
        data.decode()  # within strings the next line takes any bytes
        return msgspec.Raw(msgspec.json.format(data, indent=-1))
    except _FAILURES as error:
        raise _explained(data, error, "JSON") from None


def name_problem(name: str) -> str | None:
    """What is wrong with the length of a name; None: nothing is."""
    if len(name) <= SHORT_NAME:
        return None
    size = len(name) if name.isascii() else len(name.encode(errors="surrogatepass"))
    return None if size <= NAME_BYTES else f"may have at most {NAME_BYTES} bytes, got {size}"


def header(value: str) -> bytes:
    """The bytes of a header that aiohttp has read: it keeps what is not in UTF-8 as surrogates."""
    return value.encode(errors="surrogateescape")


def is_json_type(content_type: str) -> bool:
    """Whether a body of that Content-Type is JSON, exactly as vLLM sees it."""
    return content_type.lower().split(";", 1)[0] == JSON_TYPE


# ------------------------------------------------------------------------- documents


def model_json(data: bytes) -> Any:
    """A JSON file of a model, as Python's own library reads it: with NaN and Infinity, which
    such files hold. Raises OutsideError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise _too_deep(sys.getrecursionlimit()) from None
    except ValueError as error:
        raise OutsideError(f"is not valid JSON: {str(error)[:_SHOWN]}") from None


def json_document(data: bytes) -> Any:
    """Any JSON value, small enough to be looked at piece by piece. Raises OutsideError."""
    _check_size(len(data))
    return _bounded(_read_any(data))


def document(text: str, suffix: str = ".yaml") -> Any:
    """A YAML, TOML (".toml") or JSON document, as `json_document`. Raises OutsideError, which
    names line and column."""
    _check_size(len(text))
    try:
        # JSON is YAML, so one parser reads both.
        found = tomllib.loads(text) if suffix == ".toml" else yaml.load(text, _StrictLoader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise OutsideError(f"cannot be read: {error}") from None
    except RecursionError:
        raise _too_deep(DOCUMENT_DEPTH) from None
    except (ValueError, TypeError, OverflowError) as error:  # a date, a number or a key that isn't
        raise OutsideError(f"cannot be read: {str(error)[:_SHOWN]}") from None
    return _bounded(found)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which no key may stand twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_read_any: Callable[[bytes], Any] = reader(Any, "JSON", DOCUMENT_DEPTH)


def _check_size(size: int) -> None:
    if size > DOCUMENT_BYTES:
        raise OutsideError(f"may have at most {DOCUMENT_BYTES} bytes, got {size}")


def _bounded(found: Any) -> Any:
    """`found`, if it is small and flat. What a YAML alias repeats counts each time."""
    level, depth, count = [found], 0, 0
    while level:
        count += len(level)
        if depth >= DOCUMENT_DEPTH and any(isinstance(value, dict | list) for value in level):
            raise _too_deep(DOCUMENT_DEPTH)
        if count > DOCUMENT_VALUES:
            raise OutsideError(f"has more than {DOCUMENT_VALUES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    if isinstance(key, str) and (problem := name_problem(key)):
                        raise OutsideError(f"has a key that is too long: it {problem}")
                below += value.values()
            elif isinstance(value, list):
                below += value
            if len(below) > DOCUMENT_VALUES:
                break
        level, depth = below, depth + 1
    return found


# ------------------------------------------------------------------------- what went wrong


def _too_deep(most: int) -> OutsideError:
    return OutsideError(f"is nested too deep: at most {most} lists and objects within each other")


def _explained(
    data: bytes, error: Exception, wanted: str, levels: int | None = None
) -> OutsideError:
    words = str(error)[:_SHOWN]
    if isinstance(error, RecursionError):
        return _too_deep(levels or sys.getrecursionlimit())
    if isinstance(error, UnicodeDecodeError) or b"\0" in data[:4] or data[:1] in (b"\xfe", b"\xff"):
        return OutsideError("is not in UTF-8")
    if isinstance(error, msgspec.ValidationError):
        at = _FIELD.search(words)
        return OutsideError(f"is not {wanted}: {words}", at[1] if at else None)
    # msgspec takes half of a pair near the end for an end that comes too early.
    if "surrogate" in words or ("truncated" in words and _HALF_PAIR.search(data[-16:])):
        return OutsideError(
            r"has half of a surrogate pair (\ud800 to \udfff alone): write both halves, or \ufffd"
        )
    return OutsideError(f"is not {wanted}: {words}")
