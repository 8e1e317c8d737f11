"""Spans of calls, by OpenTelemetry's GenAI conventions, sent as OTLP. The only file that knows
opentelemetry; it is imported where `router.otlp_endpoint` is set.

Rules this file keeps:
- one SERVER span a call, its parent the caller's traceparent, whose sampled flag decides; below it
  one span for each hold and one for each replica tried, which is the parent of the engine's own;
- no prompt, answer, key or header becomes an attribute;
- export is a thread's affair: a collector that is down costs spans, never calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed_version
from typing import Any
from urllib.parse import urlsplit

from runtime.router.call.outcome import NAME_CHARS, Outcome
from runtime.router.call.request import Call
from runtime.wire.routes import Endpoint, RouteTable

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as missing:
    raise RuntimeError(
        "router.otlp_endpoint needs OpenTelemetry, which is not installed here:"
        " pip install 'stoker-serve[tracing]'"
    ) from missing

PROVIDER = "stoker"
EXPORT_S = 5.0  # for one export, also the last one at the router's end
_CONTEXT = {b"traceparent": "traceparent", b"tracestate": "tracestate"}
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_propagator = TraceContextTextMapPropagator()


class Tracer:
    """Makes the spans of one router.

    `endpoint`: the collector, with or without /v1/traces. `sample`: which share of the calls that
    come without a traceparent is traced, 0 to 1.
    """

    def __init__(self, endpoint: str, sample: float) -> None:
        about = {
            "service.name": "stoker-router",
            "service.version": installed_version("stoker-serve"),
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample)), resource=Resource.create(about)
        )
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stoker.router")
        self._held: set[Trace] = set()

    def begin(self, outcome: Outcome) -> Trace:
        """The trace of a call that has just arrived."""
        call = outcome.call
        operation = operation_of(call.path)
        model = outcome.model or call.model[:NAME_CHARS]
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=_propagator.extract(_carried(call.headers)),
            kind=SpanKind.SERVER,
            attributes=_asked(call, operation, model),
        )
        return Trace(self, outcome, span)

    def child(self, parent: Span, name: str, kind: SpanKind) -> Span:
        """A span below `parent`, from now on."""
        return self._tracer.start_span(name, context=set_span_in_context(parent), kind=kind)

    def routes(self, table: RouteTable) -> None:
        """Tell the traces of held calls what they wait for."""
        if self._held:
            reasons = {route.name: route.waiting_for for route in table.models}
            for trace in self._held:
                trace.waits_for(reasons.get(trace.model))

    def holds(self, trace: Trace, held: bool) -> None:
        """Whether the call is held now."""
        if held:
            self._held.add(trace)
        else:
            self._held.discard(trace)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class Trace:
    """The spans of one call."""

    def __init__(self, tracer: Tracer, outcome: Outcome, span: Span) -> None:
        self._tracer = tracer
        self._outcome = outcome
        self._span = span
        self._hold: Span | None = None
        self._engine: Span | None = None
        self._reason: str | None = None

    @property
    def model(self) -> str:
        """The model that the call is for."""
        return self._outcome.model

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    # -- waiting

    def hold(self, reason: str | None) -> None:
        """Begin a wait for a replica; `reason` is what the table says of it."""
        self._hold = self._tracer.child(self._span, "hold", SpanKind.INTERNAL)
        self._span.set_attribute("stoker.cold_start", True)
        self._tracer.holds(self, True)
        self.waits_for(reason)

    def waits_for(self, reason: str | None) -> None:
        """Note what the call waits for now."""
        if self._hold is not None and reason is not None and reason != self._reason:
            self._reason = reason
            self._hold.add_event(
                "stoker.cold_start",
                {"stoker.waiting_for": reason, "stoker.rung": self._outcome.rung},
            )

    def let_go(self) -> None:
        """End the wait."""
        self._tracer.holds(self, False)
        if self._hold is not None:
            self._hold.end()
            self._hold = None

    # -- at a replica

    def sent(self, lines: list[bytes], endpoint: Endpoint) -> list[bytes]:
        """Note that it is sent with these header lines; the lines with our traceparent."""
        span = self._engine = self._tracer.child(self._span, "POST", SpanKind.CLIENT)
        where = urlsplit(endpoint.base_url)
        span.set_attributes(
            {
                "http.request.method": "POST",
                "url.path": _path(self._outcome.call),
                "server.address": where.hostname or "",
                "server.port": where.port or 80,
                "stoker.replica_id": endpoint.replica_id,
            }
        )
        context = span.get_span_context()
        ours = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        kept = [line for line in lines if line[:12].lower() != b"traceparent:"]
        return [*kept, b"traceparent: " + ours.encode()]

    def failed(self, reason: str) -> None:
        """The replica gave no answer."""
        if self._engine is not None:
            self._engine.set_attribute("error.type", "replica_failed")
            self._engine.set_status(Status(StatusCode.ERROR, reason))
            self._engine.end()
            self._engine = None

    # -- its end

    def end(self) -> None:
        """The call is over."""
        outcome = self._outcome
        self.let_go()
        if self._engine is not None:
            self._engine.set_attribute("http.response.status_code", outcome.status)
            self._engine.end()
        if self._span.is_recording():
            self._span.set_attributes(_became(outcome))
            if outcome.status >= 500 or outcome.error == "broken_off":
                self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _carried(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The caller's trace context."""
    return {
        _CONTEXT[lower]: value.decode("latin-1")
        for name, value in headers
        if (lower := name.lower()) in _CONTEXT
    }


def _path(call: Call) -> str:
    return call.path.partition("?")[0]


def operation_of(path: str) -> str:
    """GenAI's word for what an engine's path does; its own last part where there is none."""
    path = path.partition("?")[0]
    return _OPERATIONS.get(path) or path.rpartition("/")[2]


def traces_url(endpoint: str) -> str:
    """OTLP's path for traces, unless `endpoint` has one."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _asked(call: Call, operation: str, model: str) -> dict[str, Any]:
    head = call.head
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.stream": call.streams,
        "http.request.method": "POST",
        "url.path": call.asked or _path(call),
        "client.address": call.address,
        "stoker.request_id": call.request_id,
        "stoker.tenant": call.caller.tenant,
    }
    for name, value, kinds in (
        ("max_tokens", head.max_completion_tokens or head.max_tokens, int),
        ("temperature", head.temperature, (int, float)),
        ("seed", head.seed, int),
    ):
        if isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**63:
            found[f"gen_ai.request.{name}"] = value
    return found


def _became(outcome: Outcome) -> dict[str, Any]:
    usage = outcome.usage
    found: dict[str, Any] = {
        "http.response.status_code": outcome.status,
        "gen_ai.response.model": outcome.model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "error.type": outcome.error or (str(outcome.status) if outcome.status >= 400 else None),
        "stoker.rung": outcome.rung,
        "stoker.version": outcome.call.version,
        "stoker.replica_id": outcome.replica_id,
        "stoker.held_s": outcome.held_s or None,
        "stoker.ttft_s": outcome.ttft_s,
    }
    if usage.completion_tokens is not None:
        found["stoker.tokens_exact"] = usage.exact
    return {name: value for name, value in found.items() if value not in (None, "")}
