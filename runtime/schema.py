"""Checks untrusted dictionaries against msgspec structs, and says *everything* that is wrong.

msgspec stops at the first error and does not name a close spelling; operators deserve both. The
field types stay the only definition: nothing here repeats a rule.

Rules this file keeps: a problem names the field, the value and the fix; nothing is guessed.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from runtime.wire import SpecProblem

S = TypeVar("S", bound=msgspec.Struct)

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9,
    "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30,
    "ti": 2**40, "tib": 2**40,
}  # fmt: skip


class SchemaError(ValueError):
    """Raised with every problem found; `str()` has one a line."""

    def __init__(self, problems: list[SpecProblem], where: str = "") -> None:
        self.problems = tuple(problems)
        self.where = where
        head = f"{where}: " if where else ""
        super().__init__("\n".join(f"{head}{p}" for p in problems))


def parse_bytes(text: str) -> int:
    """`"12GiB"` -> 12884901888, `"1.5 GB"` -> 1500000000, `"4096"` -> 4096.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write bytes or e.g. 12GiB, 500MB")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def close_names(name: str, known: typing.Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `known` that `name` may have meant, best first."""
    lower = {k.lower(): k for k in known}
    return [lower[m] for m in difflib.get_close_matches(name.lower(), lower, limit, 0.6)]


def check(raw: object, kind: type[S], where: str = "") -> S:
    """`raw` as a `kind`.

    Strings are accepted for sizes (fields that end in `_bytes`). Raises SchemaError with every
    problem: unknown fields, missing ones, and each value that its type refuses.
    """
    if not isinstance(raw, Mapping):
        problem = SpecProblem(
            field=where or "document", message="must be a mapping of fields", value=raw
        )
        raise SchemaError([problem])
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    problems = [_unknown(str(key), raw[key], fields) for key in raw if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                problems.append(
                    SpecProblem(field=name, message="is required", fix=f"add it: {_about(field)}")
                )
            continue
        try:
            values[name] = _value(name, raw[name], field.type)
        except ValueError as error:
            problems.append(_refused(name, raw[name], field, error))
    if problems:
        raise SchemaError(problems, where)
    return kind(**values)


def _value(name: str, raw: object, kind: Any) -> Any:
    if name.endswith("_bytes") and isinstance(raw, str):
        raw = parse_bytes(raw)
    if isinstance(raw, bool) and kind is not bool and "bool" not in str(kind) and kind is not Any:
        raise ValueError("Expected a number or text, got a yes/no value")
    return msgspec.convert(raw, kind)


def _unknown(
    name: str, value: object, fields: Mapping[str, msgspec.structs.FieldInfo]
) -> SpecProblem:
    close = close_names(name, fields)
    fix = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(fields)}"
    return SpecProblem(field=name, message="is not a known field", value=value, fix=fix)


def _refused(
    name: str, value: object, field: msgspec.structs.FieldInfo, error: ValueError
) -> SpecProblem:
    message, _, path = str(error).partition(" - at `$")
    inner = path.rstrip("`")
    message = message[:1].lower() + message[1:]
    choices = _choices(field.type)
    if choices and isinstance(value, str):
        close = close_names(value, choices)
        fix = f"did you mean {close[0]!r}? " if close else ""
        return SpecProblem(
            field=name, message="is not allowed", value=value,
            fix=f"{fix}choose one of: {', '.join(choices)}",
        )  # fmt: skip
    return SpecProblem(field=f"{name}{inner}", message=message, value=value, fix=_about(field))


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return []


def _about(field: msgspec.structs.FieldInfo) -> str | None:
    """The field's own description, which says what a good value is."""
    if typing.get_origin(field.type) is not typing.Annotated:
        return None
    for meta in typing.get_args(field.type)[1:]:
        if isinstance(meta, msgspec.Meta) and meta.description:
            return str(meta.description)
    return None
