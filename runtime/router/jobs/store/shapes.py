"""How files, batches and jobs are shown: OpenAI's objects, and one of the same kind for jobs. Pure.

Rule this file keeps: times are whole seconds since 1970, as OpenAI's clients want them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.jobs.store.rows import BatchRow, FileRow, JobRow

_STAMPS = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})


def file_object(file: FileRow) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(batch: BatchRow) -> dict[str, Any]:
    """OpenAI's `batch`."""
    errors = None if batch.errors is None else {"object": "list", "data": batch.errors}
    stamps = {f"{name}_at": _whole(batch.stamps.get(name)) for name in _STAMPS}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_id,
        "error_file_id": batch.error_id,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **stamps,
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "metadata": batch.metadata,
    }


def job_object(job: JobRow, answer: bytes | None) -> dict[str, Any]:
    """A job; `response` is what the call would have been answered with."""
    response = None
    if job.code is not None and answer is not None:
        response = {"status_code": job.code, "body": json_or_text(answer)}
    return {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "model": job.model,
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "ended_at": _whole(job.ended_at),
        "expires_at": _whole(job.expires_at),
        "deadline_at": int(job.deadline_at),
        "waits_for": job.waits_for if job.status == "queued" else None,
        "response": response,
    }


def listing(objects: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of objects."""
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }


def event(kind: str, of: str, data: dict[str, Any], now: float) -> tuple[str, bytes]:
    """A webhook's id and body, as OpenAI's own: `kind` is e.g. `batch.completed`."""
    event_id = "evt_" + hashlib.sha256(f"{kind} {of}".encode()).hexdigest()[:32]
    body = {"id": event_id, "object": "event", "created_at": int(now), "type": kind, "data": data}
    return event_id, msgspec.json.encode(body)


def json_or_text(body: bytes) -> Any:
    """An answer's body as one line of JSON, its numbers as they were written; else as text."""
    try:
        return outside.one_line(body)
    except OutsideError:
        return body.decode("utf-8", "replace")


def _whole(time: float | None) -> int | None:
    return None if time is None else int(time)
