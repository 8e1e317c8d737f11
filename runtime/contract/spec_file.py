"""Model specs: from a YAML, TOML or JSON text to checked `ModelSpec`s, and their JSON Schema.

A file holds one model, or a list of them, or a mapping with the key `models`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from runtime import outside
from runtime.checkpoints.model_files import parse_ref
from runtime.contract.adapters import flat_name
from runtime.contract.engine_policy import env_problems
from runtime.contract.prewarm import schedule_problems
from runtime.contract.schema import SchemaError, check
from runtime.outside import OutsideError
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import ModelSpec

# Flags that Stoker sets itself: a second opinion in a spec would break routing or accounting.
OWNED_ENGINE_ARGS = {
    "model": "set `source`",
    "served_model_name": "set `name` and `aliases`",
    "tensor_parallel_size": "set `tensor_parallel_size` beside engine_args",
    "host": "Stoker picks the address",
    "port": "Stoker picks the port",
    "uds": "Stoker picks the address",
    "api_key": "engines are guarded by a per-engine secret",
    "middleware": "engines are guarded by Stoker's middleware",
    "allowed_media_domains": "set `media_domains`",
    "allowed_local_media_path": "requests may not name files of a node",
    "gpu_memory_utilization": "set `device_memory_bytes`",
    "kv_cache_memory_bytes": "set `device_memory_bytes`",
}

_ARG_NAME = re.compile(r"(--)?[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_NUMBER = re.compile(r"-\d+(\.\d+)?")
_SOURCES = "write a local folder, hf:org/name[@revision] or s3://bucket/path"
MAX_MEMORY_BYTES = 2**60  # more than any host has
MIN_MEMORY_BYTES = 2**20  # what is smaller lacks its unit


def parse_spec(raw: object, where: str = "") -> ModelSpec:
    """One model from an already parsed document. Raises SchemaError with every problem."""
    spec = check(raw, ModelSpec, where)
    problems = list(_semantic_problems(spec))
    if problems:
        raise SchemaError(problems, where)
    return spec


def parse_specs(text: str, suffix: str = ".yaml") -> list[ModelSpec]:
    """All models of a file's text. Raises SchemaError; a syntax error names line and column."""
    raw = parse_text(text, suffix)
    if isinstance(raw, Mapping) and "models" in raw:
        raw = raw["models"]
    documents = raw if isinstance(raw, list) else [raw]
    if not documents:
        problem = SpecProblem(field="document", message="holds no model", fix="list at least one")
        raise SchemaError([problem])
    specs: list[ModelSpec] = []
    problems: list[SpecProblem] = []
    for index, document in enumerate(documents):
        name = document.get("name") if isinstance(document, Mapping) else None
        where = str(name) if isinstance(name, str) else f"model {index + 1}"
        try:
            specs.append(parse_spec(document, where))
        except SchemaError as error:
            prefixed = (_prefix(p, where) for p in error.problems)
            problems.extend(prefixed if len(documents) > 1 else error.problems)
    problems.extend(name_clashes(specs))
    if problems:
        raise SchemaError(problems)
    return specs


def load_specs(path: str | Path) -> list[ModelSpec]:
    """All models of a file. Raises SchemaError, or OSError where it can't be read."""
    path = Path(path)
    return parse_specs(path.read_text(encoding="utf-8"), path.suffix or ".yaml")


def name_clashes(specs: Iterable[ModelSpec]) -> list[SpecProblem]:
    """A problem for each name or alias that more than one of `specs` answers to."""
    owner: dict[str, str] = {}
    problems = []
    for spec in specs:
        for name in (*spec.names(), *spec.adapter_names()):
            if name in owner:
                problems.append(
                    SpecProblem(
                        field=_names_field(spec, name),
                        value=name,
                        message=f"is already a name of model {owner[name]!r}",
                        fix="choose another",
                    )
                )
            owner.setdefault(name, spec.name)
    return problems


def _names_field(spec: ModelSpec, name: str) -> str:
    """Where a spec says that it answers to `name`."""
    if name == spec.name:
        return "name"
    return "aliases" if name in spec.aliases else "adapters"


def json_schema(refs: str = "#/$defs/{name}") -> dict[str, Any]:
    """The JSON Schema (2020-12) of a model spec; sizes may also be texts such as "12GiB".

    `refs` says where a document that takes the schema in keeps the parts it refers to.
    """
    (_,), components = msgspec.json.schema_components([ModelSpec], ref_template=refs)
    schema = dict(components.pop("ModelSpec"))
    properties = dict(schema["properties"])
    size = properties["device_memory_bytes"]
    text = {
        "type": "string",
        "pattern": r"^\s*\d+(\.\d+)?\s*([KMGTkmgt][Ii]?[Bb]?|[Bb])?\s*$",
        "examples": ["12GiB"],
    }
    properties["device_memory_bytes"] = {**size, "anyOf": [*size["anyOf"], text]}
    schema["properties"] = properties
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **schema, "$defs": components}


def parse_text(text: str, suffix: str) -> object:
    """A YAML, TOML or JSON document. Raises SchemaError that names line and column."""
    try:
        found: object = outside.document(text, suffix)
        return found
    except OutsideError as error:
        raise SchemaError([SpecProblem(field="document", message=str(error))]) from None


def _prefix(problem: SpecProblem, where: str) -> SpecProblem:
    return msgspec.structs.replace(problem, field=f"{where}.{problem.field}")


def source_problems(source: str, field: str = "source") -> Iterable[SpecProblem]:
    """What is wrong with a source as it is written, whatever is there."""
    scheme, colon, rest = source.partition(":")
    message = fix = ""
    if not source:
        message, fix = "names no source", _SOURCES
    elif source.startswith("~"):
        message, fix = "starts with '~'", "write the whole path: no shell reads it"
    elif colon and "/" not in scheme and scheme not in ("hf", "s3"):
        message = f"has the unknown scheme {scheme!r}"
        fix = _SOURCES
    elif scheme == "hf" and not rest.partition("@")[0].strip("/"):
        message, fix = "names no repository", "write hf:org/name or hf:org/name@revision"
    elif scheme == "hf" and rest.endswith("@"):
        message, fix = "names no revision", "write hf:org/name or hf:org/name@revision"
    elif scheme == "s3" and colon and not rest.startswith("//"):
        message, fix = "is no S3 address", "write s3://bucket/path"
    else:
        try:
            parse_ref(source)
        except ValueError as error:
            text = str(error).removeprefix(f"{source!r} ")
            message, _, fix = text.partition("; ")
    if message:
        yield SpecProblem(field=field, value=source, message=message, fix=fix)


def _adapter_problems(spec: ModelSpec) -> Iterable[SpecProblem]:
    for name, source in spec.adapters.items():
        yield from source_problems(source, f"adapters.{name}")
    for key, value in spec.engine_args.items() if spec.adapters else ():
        if flat_name(key) == "enable_lora" and value is not True:
            yield SpecProblem(
                field=f"engine_args.{key}", value=value, message="but there are adapters",
                fix="leave it out: Stoker sets it for a model that has adapters",
            )  # fmt: skip


def _scale_problems(spec: ModelSpec) -> Iterable[SpecProblem]:
    seen: set[str] = set()
    for index, rule in enumerate(spec.autoscale.metrics):
        where = f"autoscale.metrics[{index}]"
        if rule.metric in seen:
            yield SpecProblem(
                field=f"{where}.metric", value=rule.metric, message="is given twice",
                fix="give each metric one target",
            )  # fmt: skip
        seen.add(rule.metric)
        if rule.metric in ("gpu_utilization", "kv_cache_usage") and rule.target > 1:
            yield SpecProblem(
                field=f"{where}.target", value=rule.target, message="is a share above 1",
                fix="write e.g. 0.7 for 70 %",
            )  # fmt: skip
    for index, policy in enumerate(spec.autoscale.down.policies):
        if policy.type == "percent" and policy.value > 100:
            yield SpecProblem(
                field=f"autoscale.down.policies[{index}].value", value=policy.value,
                message="takes away more than all", fix="write at most 100 percent",
            )  # fmt: skip


def _arg_problems(key: str, value: object) -> Iterable[SpecProblem]:
    """An argument is one flag and its values: neither may be read as another flag."""
    field, message, fix = f"engine_args.{key}", "", ""
    flat = flat_name(key).partition(".")[0].removeprefix("no_")
    if not _ARG_NAME.fullmatch(key):
        message, fix = "is not an argument's name", "write e.g. max_model_len"
    elif flat in OWNED_ENGINE_ARGS:
        message, fix = "is set by Stoker", OWNED_ENGINE_ARGS[flat]
    elif any(_is_flag(word) for word in _words(value)):
        message = "holds what an engine would read as another flag"
        fix = "write each argument under its own name; only a number may begin with '-'"
    if message:
        yield SpecProblem(field=field, value=value, message=message, fix=fix)


def _words(value: object) -> Iterable[str]:
    """The words of a list, which an engine gets one by one; other values are part of one word."""
    if isinstance(value, list | tuple):
        yield from (word for word in value if isinstance(word, str))


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not _NUMBER.fullmatch(word)


def _semantic_problems(spec: ModelSpec) -> Iterable[SpecProblem]:
    if spec.max_replicas < spec.min_replicas:
        yield SpecProblem(
            field="max_replicas", value=spec.max_replicas,
            message=f"is below min_replicas ({spec.min_replicas})",
            fix=f"raise it to at least {spec.min_replicas}, or lower min_replicas",
        )  # fmt: skip
    yield from source_problems(spec.source)
    yield from _adapter_problems(spec)
    if (spec.device_memory_bytes or 0) > MAX_MEMORY_BYTES:
        yield SpecProblem(
            field="device_memory_bytes", value=spec.device_memory_bytes, message="is too large",
            fix="declare what one replica takes, e.g. 12GiB",
        )  # fmt: skip
    if spec.device_memory_bytes is not None and spec.device_memory_bytes < MIN_MEMORY_BYTES:
        yield SpecProblem(
            field="device_memory_bytes", value=spec.device_memory_bytes,
            message="is in bytes, and less than any engine takes",
            fix=f"write a unit, e.g. {spec.device_memory_bytes}GiB",
        )  # fmt: skip
    yield from schedule_problems(spec.prewarm)
    yield from _scale_problems(spec)
    names = (*spec.names(), *spec.adapter_names())
    if len(set(names)) != len(names):
        yield SpecProblem(
            field="aliases",
            value=list(spec.aliases),
            message="repeats a name",
            fix="drop the double",
        )
    yield from env_problems(spec.env)
    for key, value in spec.engine_args.items():
        yield from _arg_problems(key, value)
