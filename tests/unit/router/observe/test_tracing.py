"""Tracing's pure parts, and that it is neither needed nor imported where it is off."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.router.call.body import Head
from runtime.router.call.outcome import Outcome
from runtime.router.call.request import Call
from runtime.router.observe.access_log import trace_id_of
from runtime.router.observe.tracing import Tracer, operation_of, traces_url


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/messages?beta=true", "chat"),
        ("/v1/completions", "text_completion"),
        ("/v1/embeddings", "embeddings"),
        ("/v2/rerank", "rerank"),
    ],
)
def test_an_operation_has_the_conventions_name(path: str, operation: str) -> None:
    assert operation_of(path) == operation


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otel/v1/traces", "https://c/otel/v1/traces"),
    ],
)
def test_a_collector_is_named_with_or_without_its_path(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([(b"TraceParent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")], "a" * 32),
        ([(b"traceparent", b"00-zz")], None),
        ([(b"x-trace", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")], None),
    ],
)
def test_the_trace_id_of_a_caller(headers: list[tuple[bytes, bytes]], found: str | None) -> None:
    assert trace_id_of(headers) == found


def test_odd_fields_of_a_body_become_no_attributes() -> None:
    head = Head(model="m", max_tokens="5", seed=10**30, temperature=True)  # type: ignore[arg-type]
    call = Call("r", "m" * 5000, "/v1/completions", [], b"", False, head)
    tracer = Tracer("http://127.0.0.1:9", 1.0)
    outcome = Outcome(call, None, 0.0)
    trace = tracer.begin(outcome)
    tracer.close()
    attributes = dict(trace._span.attributes)  # type: ignore[attr-defined]
    assert not [n for n in attributes if n.split(".")[-1] in ("max_tokens", "seed", "temperature")]
    assert len(attributes["gen_ai.request.model"]) == 256


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_router_without_tracing_imports_nothing_of_it() -> None:
    code = "import sys, runtime.router.driver; print('opentelemetry' in sys.modules)"
    assert run(code).stdout == "False\n"


def test_without_the_package_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import runtime.router.observe.tracing"
    assert "pip install 'stoker-serve[tracing]'" in run(code).stderr
