"""The OpenAPI 3.1 document of the admin API, made from its route table and message structs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.contract.spec_file import json_schema
from runtime.wire.model_spec import ModelSpec
from scheduler.admin.route_table import Operation
from scheduler.admin.views import Error

_REF = "#/components/schemas/{name}"


def document(routes: Sequence[Operation], version: str) -> dict[str, Any]:
    """The document as a dict ready for JSON."""
    structs: list[Any] = [Error]
    for route in routes:
        structs += [kind for kind in (route.body, route.reply) if isinstance(kind, type)]
    structs = [s for s in dict.fromkeys(structs) if s is not str]
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
    schemas["ModelSpec"] = {
        k: v for k, v in json_schema(_REF).items() if k not in ("$schema", "$defs")
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stoker admin API",
            "version": version,
            "description": "Models, replicas, nodes and the scheduler's decisions.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Operation) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.rpartition(".")[2],
        "summary": route.summary,
        "responses": _responses(route),
    }
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(route.body)}
    if route.open:
        operation["security"] = []
    return operation


def _parameters(route: Operation) -> list[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    in_query = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in route.query.items()
    ]
    return in_path + in_query


def _responses(route: Operation) -> dict[str, Any]:
    """The good answers and the errors, with those of the guard where it is not open."""
    good = [route.status] + ([route.also_status] if route.also_status else [])
    errors = [*route.errors, *(() if route.open else _GUARDS)]
    return {str(status): _response(route) for status in good} | {
        str(status): {"description": _ERRORS[status], "content": _content(Error)}
        for status in errors
    }


_ERRORS = {
    400: "the request is not understood",
    401: "the token is missing or wrong",
    403: "the token's role is not enough; the one that is needed is named",
    404: "no such thing; close names are listed",
    409: "it does not fit the present state",
    422: "the body has problems, each named with its fix",
    502: "the node's agent did not answer",
    503: "this scheduler is not the leader; its URL is in the error where known",
}
_GUARDS = (401, 403, 503)  # of guard.py


def _response(route: Operation) -> dict[str, Any]:
    if route.reply is None:
        return {"description": route.says}
    return {"description": route.says, "content": _content(route.reply)}


def _content(kind: Any) -> dict[str, Any]:
    if kind is str:
        return {"text/plain": {"schema": {"type": "string"}}}
    if kind is dict:
        return {"application/json": {"schema": {"type": "object"}}}
    name = "ModelSpec" if kind is ModelSpec else kind.__name__
    return {"application/json": {"schema": {"$ref": _REF.format(name=name)}}}
