"""Checks untrusted dictionaries against msgspec structs, and says *everything* that is wrong.

msgspec stops at the first error and does not name a close spelling; operators deserve both. The
field types stay the only definition: nothing here repeats a rule.

Rules this file keeps: a problem names the field, the value and the fix; nothing is guessed.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from runtime.outside import name_problem
from runtime.wire.agent_messages import SpecProblem

S = TypeVar("S", bound=msgspec.Struct)

_UNKNOWN = 50  # unknown fields of one object that are named: the search for close ones is slow

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9,
    "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30,
    "ti": 2**40, "tib": 2**40,
}  # fmt: skip

# What msgspec calls types, for people who write YAML.
_WORDS = {
    "`array`": "a list", "`object`": "a mapping", "`str`": "text", "`int`": "a whole number",
    "`float`": "a number", "`bool`": "true or false", "`null`": "nothing",
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


def close_names(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `known` that `name` may have meant, best first.

    None of what is longer than any name: the search takes time by the square of its length.
    """
    if name_problem(name) is not None:
        return []
    lower = {k.lower(): k for k in known}
    return [lower[m] for m in difflib.get_close_matches(name.lower(), lower, limit, 0.6)]


def check(raw: object, kind: type[S], where: str = "") -> S:
    """`raw` as a `kind`, structs within it too.

    Strings are accepted for sizes (fields that end in `_bytes`). Raises SchemaError with every
    problem: unknown fields, missing ones, and each value that its type refuses.
    """
    if not isinstance(raw, Mapping):
        raise SchemaError([_no_mapping(where or "document", raw)])
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    unknown = [key for key in raw if key not in fields]
    problems = [_unknown(str(key), raw[key], fields) for key in unknown[:_UNKNOWN]]
    if len(unknown) > _UNKNOWN:
        problems.append(SpecProblem(field="…", message=f"{len(unknown)} fields are unknown"))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                problems.append(
                    SpecProblem(
                        field=name, message="is required", fix=f"add it: {_about(field.type)}"
                    )
                )
            continue
        try:
            values[name] = _value(name, raw[name], field.type)
        except SchemaError as error:
            problems.extend(error.problems)
    if problems:
        raise SchemaError(problems, where)
    return kind(**values)


def _value(name: str, raw: object, kind: Any, about: str | None = None) -> Any:
    """`raw` as a `kind`. Raises SchemaError; `about` says what is good where `kind` does not."""
    about = _about(kind) or about
    bare = _bare(kind)
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        if raw is None and _may_be_none(kind):
            return None
        return raw if isinstance(raw, bare) else _inside(name, raw, bare, about)
    try:
        if origin is tuple and args[-1] is ... and isinstance(raw, list | tuple):
            named = ((f"{name}[{index}]", item) for index, item in enumerate(raw))
            raw = _each(named, args[0], about)
        elif origin is dict and isinstance(raw, Mapping) and args[1] is not Any:
            if args[0] is not str:
                _each(((f"{name}.{key}", key) for key in raw), args[0], about)
            named = ((f"{name}.{key}", item) for key, item in raw.items())
            raw = dict(zip(raw, _each(named, args[1], about), strict=True))
        elif problems := list(_not_json(name, raw)):
            raise SchemaError(problems)
        elif isinstance(raw, str) and name.endswith("_bytes") and bare is not str:
            raw = parse_bytes(raw)
        elif isinstance(raw, bool) and "bool" not in str(kind) and kind is not Any:
            raise ValueError("Expected a number or text, got a yes/no value")
        return msgspec.convert(raw, kind)
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError([_refused(name, raw, kind, about, error)]) from None


def _inside(name: str, raw: object, kind: type[S], about: str | None) -> S:
    """A struct within a struct; its problems are named by their whole path."""
    if not isinstance(raw, Mapping):
        raise SchemaError([_no_mapping(name, raw, about)])
    try:
        return check(raw, kind)
    except SchemaError as error:
        inner = [msgspec.structs.replace(p, field=f"{name}.{p.field}") for p in error.problems]
        raise SchemaError(inner) from None


def _each(named: Iterable[tuple[str, object]], kind: Any, about: str | None) -> list[Any]:
    """Every item of a container; SchemaError with the problems of all of them."""
    found: list[Any] = []
    problems: list[SpecProblem] = []
    for name, item in named:
        try:
            found.append(_value(name, item, kind, about))
        except SchemaError as error:
            problems.extend(error.problems)
    if problems:
        raise SchemaError(problems)
    return found


def _bare(kind: Any) -> Any:
    """A type without its annotations, and without the None that it may also be."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    others = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and len(others) == 1:
        return _bare(others[0])
    return kind


def _may_be_none(kind: Any) -> bool:
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return type(None) in typing.get_args(kind)


def _not_json(name: str, raw: object) -> Iterator[SpecProblem]:
    """What YAML and TOML can say and JSON cannot: it would be stored as something else."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(key, str):
                yield from _not_json(f"{name}.{key}", value)
            else:
                yield SpecProblem(
                    field=name, message="keys must be text", value=key, fix="put it in quotes"
                )
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from _not_json(f"{name}[{index}]", value)
    elif isinstance(raw, float) and not math.isfinite(raw):
        yield SpecProblem(
            field=name, message="is not a finite number", value=raw,
            fix="write a number; to have no limit, a very large one",
        )  # fmt: skip
    elif raw is not None and not isinstance(raw, str | int | float):
        yield SpecProblem(
            field=name, message="is neither text nor a number", value=str(raw),
            fix="put it in quotes",
        )  # fmt: skip


def _no_mapping(name: str, value: object, fix: str | None = None) -> SpecProblem:
    return SpecProblem(field=name, message="must be a mapping of fields", value=value, fix=fix)


def _unknown(
    name: str, value: object, fields: Mapping[str, msgspec.structs.FieldInfo]
) -> SpecProblem:
    close = close_names(name, fields)
    fix = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(fields)}"
    return SpecProblem(field=name, message="is not a known field", value=value, fix=fix)


def _refused(
    name: str, value: object, kind: Any, about: str | None, error: ValueError
) -> SpecProblem:
    choices = _choices(kind)
    if choices and isinstance(value, str):
        close = close_names(value, choices)
        fix = f"did you mean {close[0]!r}? " if close else ""
        return SpecProblem(
            field=name, message="is not allowed", value=value,
            fix=f"{fix}choose one of: {', '.join(choices)}",
        )  # fmt: skip
    message, _, path = str(error).partition(" - at `")
    message = re.sub(r"`\w+`", lambda found: _WORDS.get(found[0], found[0]), message)
    message = message[:1].lower() + message[1:]
    inner = path.rstrip("`").removeprefix("$")
    return SpecProblem(field=f"{name}{inner}", message=message, value=value, fix=about)


def _choices(kind: Any) -> list[str]:
    bare = _bare(kind)
    is_choice = typing.get_origin(bare) is typing.Literal
    return [str(choice) for choice in typing.get_args(bare)] if is_choice else []


def _about(kind: Any) -> str | None:
    """A type's own description, which says what a good value is."""
    if typing.get_origin(kind) is not typing.Annotated:
        return None
    for meta in typing.get_args(kind)[1:]:
        if isinstance(meta, msgspec.Meta) and meta.description:
            return str(meta.description)
    return None
