"""Files, batches and jobs in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from runtime.router.jobs.lines import ENDPOINTS

_Json = dict[str, Any]

ERRORS = {
    "409": "not while it is in this state",
    "507": "the store is full; delete files, or come back later",
}
_TEXT: _Json = {"type": "string"}
_WHOLE: _Json = {"type": "integer"}
_TIME: _Json = {"type": ["integer", "null"]}
_MAYBE: _Json = {"type": ["string", "null"]}


def operations() -> dict[str, dict[str, _Json]]:
    """path -> method -> operation, its `responses` without errors but with their statuses in
    `errors`, which the caller fills in."""
    file, batch, job = _ref("File"), _ref("Batch"), _ref("Job")
    page = [_query("after", _TEXT), _query("limit", {"type": "integer", "minimum": 1})]
    order = _query("order", {"enum": ["asc", "desc"]})
    return {
        "/v1/files": {
            "post": _operation("Upload a batch's input", file, "400 408 413 503 507", _upload()),
            "get": _operation(
                "Files", _page(file), "400 404 503", None, [*page, order, _query("purpose", _TEXT)]
            ),
        },
        "/v1/files/{id}": {
            "get": _operation("One file", file, "404 503"),
            "delete": _operation("Delete a file", _ref("Deleted"), "404 409 503"),
        },
        "/v1/files/{id}/content": {"get": _content()},
        "/v1/batches": {
            "post": _operation(
                "Run the lines of a file, with capacity that nobody waits for", batch,
                "400 404 408 413 503 507", _new_batch(),
            ),
            "get": _operation("Batches, the newest first", _page(batch), "400 404 503", None, page),
        },
        "/v1/batches/{id}": {"get": _operation("One batch", batch, "404 503")},
        "/v1/batches/{id}/cancel": {
            "post": _operation("Cancel a batch; what is answered stays", batch, "404 409 503")
        },
        "/jobs/{id}": {
            "get": _operation("A job, with its answer once there is one", job, "404 503"),
            "delete": _operation(
                "Cancel a job; one that has ended is forgotten",
                {"anyOf": [job, _ref("Deleted")]}, "404 503",
            ),
        },
    }  # fmt: skip


def accepted() -> _Json:
    """What /invoke answers to `Prefer: respond-async`."""
    return {
        "description": "a job; its answer is at Location",
        "content": {"application/json": {"schema": _ref("Job")}},
        "headers": {"Location": {"schema": _TEXT}, "Preference-Applied": {"schema": _TEXT}},
    }


def invoke_headers() -> list[_Json]:
    """The headers by which a call becomes a job."""
    wish = {"type": "string", "examples": ["respond-async"]}
    hook = "with respond-async: where to tell, signed, that the job has ended"
    return [
        {"name": "Prefer", "in": "header", "schema": wish, "description": "respond-async: a job"},
        {"name": "X-Stoker-Webhook", "in": "header", "schema": _TEXT, "description": hook},
    ]


def schemas() -> dict[str, _Json]:
    """By name."""
    deleted = {"id": _TEXT, "object": _TEXT, "deleted": {"const": True}}
    counts = {"total": _WHOLE, "completed": _WHOLE, "failed": _WHOLE}
    file = {
        "id": _TEXT, "object": {"const": "file"}, "bytes": _WHOLE, "created_at": _WHOLE,
        "expires_at": _WHOLE, "filename": _TEXT, "purpose": {"enum": ["batch", "batch_output"]},
    }  # fmt: skip
    batch = {
        "id": _TEXT, "object": {"const": "batch"}, "endpoint": {"enum": [*ENDPOINTS]},
        "input_file_id": _TEXT, "completion_window": {"const": "24h"}, "created_at": _WHOLE,
        "status": {"enum": [
            "validating", "failed", "in_progress", "finalizing", "completed", "expired",
            "cancelling", "cancelled",
        ]},
        "output_file_id": _MAYBE, "error_file_id": _MAYBE, "expires_at": _WHOLE,
        "completed_at": _TIME, "request_counts": _object(counts),
        "errors": {"type": ["object", "null"]}, "metadata": {"type": ["object", "null"]},
    }  # fmt: skip
    response = {"status_code": _WHOLE, "body": {"description": "the engine's, as it came"}}
    job = {
        "id": _TEXT, "object": {"const": "job"}, "model": _TEXT, "created_at": _WHOLE,
        "status": {
            "enum": ["queued", "running", "completed", "failed", "cancelled", "expired"]
        },
        "started_at": _TIME, "ended_at": _TIME, "expires_at": _TIME, "deadline_at": _WHOLE,
        "waits_for": _MAYBE, "response": {"anyOf": [_object(response), {"type": "null"}]},
    }  # fmt: skip
    made = {"File": file, "Batch": batch, "Job": job, "Deleted": deleted}
    return {name: _object(fields) for name, fields in made.items()}


def _operation(
    summary: str,
    schema: _Json,
    errors: str,
    body: _Json | None = None,
    parameters: list[_Json] | None = None,
) -> _Json:
    content = {"application/json": {"schema": schema}}
    operation: _Json = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}},
        "errors": errors.split(),
    }
    if body is not None:
        operation["requestBody"] = body
    if parameters is not None:
        operation["parameters"] = parameters
    return operation


def _content() -> _Json:
    operation = _operation("A file's content", _TEXT, "404 503")
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["responses"]["200"]["content"] = {"application/octet-stream": binary}
    return operation


def _upload() -> _Json:
    schema = _object({"purpose": {"const": "batch"}, "file": {"type": "string"}})
    schema["properties"]["file"]["format"] = "binary"
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _new_batch() -> _Json:
    schema = _object(
        {
            "input_file_id": _TEXT,
            "endpoint": {"enum": [*ENDPOINTS]},
            "completion_window": {"const": "24h"},
        }
    )
    schema["properties"]["metadata"] = {
        "type": ["object", "null"],
        "maxProperties": 16,
        "propertyNames": {"minLength": 1, "maxLength": 64},
        "additionalProperties": {"type": "string", "maxLength": 512},
        "description": "`webhook`: where to tell, signed, that the batch has ended",
    }
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _page(of: _Json) -> _Json:
    return _object(
        {
            "object": {"const": "list"}, "data": {"type": "array", "items": of},
            "first_id": _MAYBE, "last_id": _MAYBE, "has_more": {"type": "boolean"},
        }
    )  # fmt: skip


def _object(fields: _Json) -> _Json:
    return {"type": "object", "required": list(fields), "properties": fields}


def _query(name: str, schema: _Json) -> _Json:
    return {"name": name, "in": "query", "schema": schema}


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}
