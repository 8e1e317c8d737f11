"""What the store says of a file, a batch, a line and a job. Pure.

Rule this file keeps: times are seconds since 1970."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file. `batch`: it is the output of that batch's lines with `outcome`."""

    seq: int
    id: str
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: float
    expires_at: float
    batch: int | None = None
    outcome: int | None = None
    key_id: str | None = None  # of who uploaded it, or made its batch


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One batch. `stamps`: when it entered which status; `input` is its file's seq."""

    seq: int
    id: str
    tenant: str
    key_id: str | None
    endpoint: str
    input: int
    input_id: str
    metadata: dict[str, str] | None
    created_at: float
    expires_at: float  # what has no result by then gets none
    keep_s: float  # how long its output is kept
    webhook: str | None
    status: str
    stamps: dict[str, float]
    errors: list[dict[str, Any]] | None
    total: int
    completed: int
    failed: int
    output_id: str | None
    error_id: str | None


class LineRow(NamedTuple):
    """One line: where it lies in the input file, and what is needed to send it."""

    line: int
    custom_id: str
    model: str
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job, without its body and its answer. `code` is the answer's HTTP status."""

    seq: int
    id: str
    tenant: str
    key_id: str | None
    priority: int
    model: str
    path: str
    created_at: float
    deadline_at: float  # without an answer by then it has expired
    webhook: str | None
    status: str  # queued, running, completed, failed, cancelled or expired
    started_at: float | None
    ended_at: float | None
    expires_at: float | None  # when its answer is forgotten
    code: int | None
    waits_for: str | None  # why it was put back last
