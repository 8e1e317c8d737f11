"""The OpenAPI 3.1 document of what the router itself promises, and a page that shows it.

Rule this file keeps: bodies and answers of inference belong to the engine, so only the fields that
the router reads are described; all others pass.
"""

from __future__ import annotations

import html
from typing import Any

from runtime.router.call.error_shapes import shape_of
from runtime.router.call.paths import RESPONSES, ROOT_PATHS, STREAMS
from runtime.router.jobs.handlers import openapi as jobs

_Json = dict[str, Any]

_TITLE = "Stoker router"
# path -> what it does
_INFERENCE = {
    "/v1/chat/completions": "OpenAI chat completions",
    "/v1/completions": "OpenAI completions",
    "/v1/responses": "OpenAI responses",
    "/v1/messages": "Anthropic messages",
    "/v1/messages/count_tokens": "Anthropic token count",
    "/v1/embeddings": "OpenAI embeddings",
    "/v1/score": "Scores of text pairs",
    "/v1/rerank": "Documents by relevance",
    **{path: f"vLLM's {path}" for path in ROOT_PATHS},
}
_OWN = ("/chat/completions", "/completions", "/responses", "/messages", "/embeddings")
_FORMS = {
    "/v1/audio/transcriptions": "OpenAI audio transcriptions",
    "/v1/audio/translations": "OpenAI audio translations",
}
_ERRORS = {
    "400": "the request is not understood; the field is named",
    "401": "this router wants an API key, and got none or a wrong one",
    "403": "the API key may not do this",
    "404": "there is no such model or path; close names are listed",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "too many requests wait for this model, or the key's limit is reached; see Retry-After",
    "502": "the engine failed before it answered",
    "503": "the model cannot be served now; see Retry-After",
    "504": "the model was not ready, or the engine not done, in time",
    **jobs.ERRORS,
}
_CALL_ERRORS = ("400", "404", "408", "413", "429", "502", "503", "504")
_NO_BRACES = dict.fromkeys(map(ord, "{}"))
_MODEL: _Json = {"type": "string", "minLength": 1, "description": "a model's name or alias"}
_STREAM: _Json = {"type": ["boolean", "null"], "description": "answer with server-sent events"}


def document(version: str) -> _Json:
    """The document as a dict ready for JSON."""
    paths: dict[str, _Json] = {}
    for path, summary in _INFERENCE.items():
        paths[path] = {"post": _call(path, summary, _json_body([]), path in STREAMS)}
    for path, summary in _FORMS.items():
        paths[path] = {"post": _call(path, summary, _form_body(), True)}
    for tail in _OWN:
        path = f"/models/{{model}}/v1{tail}"
        summary = f"{_INFERENCE['/v1' + tail]}, the model in the path"
        paths[path] = {"post": _call(path, summary, _json_body([]), f"/v1{tail}" in STREAMS)}
    paths["/invoke/{model}"] = {"post": _invoke()}
    paths |= {path: {"get": operation} for path, operation in _reads().items()}
    paths |= _jobs() | _responses()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": _TITLE,
            "version": version,
            "description": "OpenAI's and Anthropic's APIs for every model of the cluster. What the"
            " router does not read goes to the engine as it came.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {"x-api-key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _error_schema(),
                "AnthropicError": _anthropic_error_schema(),
                "Model": _model_schema(),
                **jobs.schemas(),
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def page(shown: _Json) -> bytes:
    """The document for people: one static page, no script, nothing loaded from elsewhere."""
    rows = []
    for path, methods in shown["paths"].items():
        for method, operation in methods.items():
            answers = "".join(
                f"<li><b>{status}</b> {html.escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            rows.append(
                f"<details><summary><code>{method.upper()} {html.escape(path)}</code> "
                f"{html.escape(operation['summary'])}</summary><ul>{answers}</ul></details>"
            )
    info = shown["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_TITLE}</title><style>"
        "body{font:16px system-ui;max-width:50em;margin:2em auto;padding:0 1em}"
        "summary{cursor:pointer;padding:.3em 0}</style>"
        f"<h1>{_TITLE} {html.escape(info['version'])}</h1><p>{html.escape(info['description'])}"
        f'<p><a href="openapi.json">openapi.json</a>{"".join(rows)}</html>'
    ).encode()


def _call(path: str, summary: str, body: _Json, streams: bool) -> _Json:
    good: _Json = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        good["text/event-stream"] = {"schema": {"type": "string"}}
    operation: _Json = {
        "operationId": "post" + path.replace("/", "_").replace("{", "").replace("}", ""),
        "summary": summary,
        "requestBody": body,
        "responses": {
            "200": {"description": "the engine's answer", "content": good},
            **_errors(*_CALL_ERRORS, shape=_shape(path)),
        },
    }
    if "{model}" in path:
        operation["parameters"] = [_model_in_path("model")]
    return operation


def _invoke() -> _Json:
    operation = _call(
        "/invoke/{model}", "One call: prompt, messages or input decides which", _json_body([]), True
    )
    wish = {"type": "boolean"}
    operation["parameters"].append({"name": "stream", "in": "query", "schema": wish})
    operation["parameters"] += jobs.invoke_headers()
    operation["responses"] |= {"202": jobs.accepted(), **_errors("507")}
    return operation


def _jobs() -> dict[str, _Json]:
    paths: dict[str, _Json] = jobs.operations()
    for path, methods in paths.items():
        for method, operation in methods.items():
            operation["operationId"] = method + path.translate({ord("/"): "_", **_NO_BRACES})
            operation["responses"] |= _errors(*operation.pop("errors"))
            if "{id}" in path:
                operation["parameters"] = [{**_model_in_path("id"), "schema": {"type": "string"}}]
    return paths


def _reads() -> dict[str, _Json]:
    """What a GET tells: the models, and how this process is."""
    return _models() | {
        "/healthz": _read("healthz", "Whether the process is alive", "text/plain"),
        "/readyz": _readyz(),
        "/health": _probe("health", "200 while requests are served, as vLLM has it"),
        "/ping": _probe("ping", "The same, as SageMaker asks for it"),
        "/version": _read("version", "Stoker's version", "application/json", {"type": "object"}),
        "/load": _read(
            "load",
            "How many requests are carried now",
            "application/json",
            {"type": "object"},
            "401",
            "503",
        ),
        "/metrics": _read("metrics", "Prometheus' exposition", "text/plain", None, "401"),
        "/openapi.json": _read("openapi", "This document", "application/json", {"type": "object"}),
        "/docs": _read("docs", "This document as a page", "text/html"),
    }


def _models() -> dict[str, _Json]:
    models = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    }
    one = {"$ref": "#/components/schemas/Model"}
    return {
        "/v1/models": _read("models", "Every model", "application/json", models, "401", "503"),
        "/v1/models/{model}": _read(
            "model", "One model", "application/json", one, "401", "403", "404", "503"
        ),
        "/models/{model}/v1/models": _read(
            "own_models",
            "The model of this base URL",
            "application/json",
            models,
            "401",
            "403",
            "404",
            "503",
        ),
    }


def _responses() -> _Json:
    """What is asked of a response that an engine keeps."""
    got = _read(
        "response", "A response that its engine keeps", "application/json", {"type": "object"},
        "400", "401", "403", "404", "429", "503",
    )  # fmt: skip
    cancel = got | {"operationId": "cancel_response", "summary": "End one in the background"}
    for operation in (got, cancel):
        operation["parameters"] = [
            {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    path = f"{RESPONSES}/{{response_id}}"
    return {path: {"get": got}, path + "/cancel": {"post": cancel}}


def _read(name: str, summary: str, kind: str, schema: _Json | None = None, *errors: str) -> _Json:
    content = {kind: {"schema": schema or {"type": "string"}}}
    operation: _Json = {
        "operationId": f"get_{name}",
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **_errors(*errors)},
    }
    if name in ("model", "own_models"):
        operation["parameters"] = [_model_in_path("model")]
    return operation


def _probe(name: str, summary: str) -> _Json:
    """An answer without a body."""
    answers = {"200": {"description": "it serves"}, "503": {"description": "it does not"}}
    return {"operationId": f"get_{name}", "summary": summary, "responses": answers}


def _readyz() -> _Json:
    operation = _read("readyz", "Whether it has routes and is not draining", "text/plain")
    no = {"text/plain": {"schema": {"type": "string"}}}
    operation["responses"]["503"] = {"description": "not yet, or not any more", "content": no}
    return operation


def _shape(path: str) -> str:
    return "AnthropicError" if shape_of(path) == "anthropic" else "Error"


def _errors(*statuses: str, shape: str = "Error") -> _Json:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _model_in_path(name: str) -> _Json:
    return {"name": name, "in": "path", "required": True, "schema": _MODEL}


def _json_body(required: list[str]) -> _Json:
    schema: _Json = {"type": "object", "properties": {"model": _MODEL, "stream": _STREAM}}
    if required:
        schema["required"] = required
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _form_body() -> _Json:
    schema = {
        "type": "object",
        "required": ["model", "file"],
        "properties": {"model": _MODEL, "file": {"type": "string", "format": "binary"}},
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _error_schema() -> _Json:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {**fields, "code": {"type": ["string", "integer", "null"]}},
            }
        },
    }


def _anthropic_error_schema() -> _Json:
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": text, "message": text},
            },
            "request_id": text,
        },
    }


def _model_schema() -> _Json:
    own = ["warmth", "aliases", "root", "parent", "max_model_len", "permission"]
    return {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", *own],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "warmth": {"type": "string"},
            "aliases": {"type": "array", "items": {"type": "string"}},
            "root": {"type": "string"},
            "parent": {"type": ["string", "null"]},  # of an adapter: its base
            "max_model_len": {"type": ["integer", "null"]},
            "permission": {"type": "array", "items": {"type": "object"}},
        },
    }
