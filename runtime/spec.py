"""Model specs: from a YAML, TOML or JSON text to checked `ModelSpec`s, and their JSON Schema.

A file holds one model, or a list of them, or a mapping with the key `models`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from runtime.prewarm import schedule_problems
from runtime.schema import SchemaError, check
from runtime.wire import ModelSpec, SpecProblem

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
    "gpu_memory_utilization": "set `device_memory_bytes`",
    "kv_cache_memory_bytes": "set `device_memory_bytes`",
}


def parse_spec(raw: object, where: str = "") -> ModelSpec:
    """One model from an already parsed document. Raises SchemaError with every problem."""
    spec = check(raw, ModelSpec, where)
    problems = list(_semantic_problems(spec))
    if problems:
        raise SchemaError(problems, where)
    return spec


def parse_specs(text: str, suffix: str = ".yaml") -> list[ModelSpec]:
    """All models of a file's text. Raises SchemaError; a syntax error names line and column."""
    raw = _parse_text(text, suffix)
    if isinstance(raw, Mapping) and "models" in raw:
        raw = raw["models"]
    documents = raw if isinstance(raw, list) else [raw]
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
        for name in spec.names():
            if name in owner:
                problems.append(
                    SpecProblem(
                        field="aliases" if name != spec.name else "name",
                        value=name,
                        message=f"is already a name of model {owner[name]!r}",
                        fix="choose another",
                    )
                )
            owner.setdefault(name, spec.name)
    return problems


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


def _parse_text(text: str, suffix: str) -> object:
    try:
        # JSON is YAML, so one parser reads both.
        return tomllib.loads(text) if suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        problem = SpecProblem(field="document", message=f"cannot be read: {error}")
        raise SchemaError([problem]) from None


def _prefix(problem: SpecProblem, where: str) -> SpecProblem:
    return msgspec.structs.replace(problem, field=f"{where}.{problem.field}")


def _semantic_problems(spec: ModelSpec) -> Iterable[SpecProblem]:
    if spec.max_replicas < spec.min_replicas:
        yield SpecProblem(
            field="max_replicas", value=spec.max_replicas,
            message=f"is below min_replicas ({spec.min_replicas})",
            fix=f"raise it to at least {spec.min_replicas}, or lower min_replicas",
        )  # fmt: skip
    scheme, colon, rest = spec.source.partition(":")
    if colon and "/" not in scheme:
        if scheme not in ("hf", "s3"):
            yield SpecProblem(
                field="source", value=spec.source, message=f"has the unknown scheme {scheme!r}",
                fix="use a local folder, hf:org/name[@revision] or s3://bucket/path",
            )  # fmt: skip
        elif scheme == "hf" and not rest.partition("@")[0].strip("/"):
            yield SpecProblem(
                field="source", value=spec.source, message="names no repository",
                fix="write hf:org/name or hf:org/name@revision",
            )  # fmt: skip
    yield from schedule_problems(spec.prewarm)
    if len(set(spec.names())) != len(spec.names()):
        yield SpecProblem(
            field="aliases",
            value=list(spec.aliases),
            message="repeats a name",
            fix="drop the double",
        )
    for key in spec.engine_args:
        flat = key.lstrip("-").replace("-", "_")
        if flat in OWNED_ENGINE_ARGS:
            yield SpecProblem(
                field=f"engine_args.{key}", value=spec.engine_args[key],
                message="is set by Stoker", fix=OWNED_ENGINE_ARGS[flat],
            )  # fmt: skip
