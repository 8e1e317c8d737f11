"""What the router tells of its calls, through real sockets: metrics, access log, spans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.parser import text_string_to_metric_families

from tests.kits import router_stack as kit
from tests.kits.router_stack import KEY, TOKEN, Stack, eventually, never, sse, unary

CHAT, EMBEDDINGS, MESSAGES = "/v1/chat/completions", "/v1/embeddings", "/v1/messages"
SECRET, PROMPT, ANSWER = "sk-caller-secret", "the-prompt-itself", "the-answer-itself"
USAGE = b'"usage":{"prompt_tokens":7,"total_tokens":19,"completion_tokens":12}'
WHOLE = b'{"choices":[{"message":{"content":"%b"}}],%b}' % (ANSWER.encode(), USAGE)
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN_EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % ANSWER.encode()
LAST = b'data: {"choices":[],%b}\n\n' % USAGE
DONE = b"data: [DONE]\n\n"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


@pytest.fixture(params=["plain", "handed over"])
def odd(request: pytest.FixtureRequest) -> bool:
    """Whether aiohttp's server answers, or the front."""
    return request.param == "handed over"


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, odd: bool, **settings: object) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path, **settings) as made:
        if odd:
            made.make_calls_odd()
        yield made


async def ask(stack: Stack, path: str = CHAT, model: str = "m", **more: Any) -> bytes:
    headers = {"Authorization": f"Bearer {SECRET}", **more.pop("headers", {})}
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], **more}
    async with stack.post(path, body, headers=headers) as response:
        return await response.read()


async def samples(stack: Stack) -> dict[tuple[str, ...], float]:
    """The exposition, as (name, label values by label name...)."""
    found = {}
    for family in text_string_to_metric_families(await stack.metrics()):
        for sample in family.samples:
            assert not {"tenant", "key", "key_id"} & set(sample.labels)
            labels = dict(sorted(sample.labels.items()))
            found[sample.name, *labels.values()] = sample.value
    return found


# ------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("path", "answer", "prompt", "completion", "estimated", "gaps"),
    [
        (CHAT, unary(WHOLE), 7, 12, 0, 0),
        (EMBEDDINGS, unary(b'{"data":[],"usage":{"prompt_tokens":8}}'), 8, 0, 0, 0),
        (CHAT, sse(ROLE, TOKEN_EVENT, TOKEN_EVENT, LAST, DONE), 7, 12, 0, 1),
        (CHAT, sse(ROLE, TOKEN_EVENT, TOKEN_EVENT, TOKEN_EVENT, DONE), 0, 3, 3, 1),
        (MESSAGES,
         sse(b'event: message_delta\ndata: {"usage":{"input_tokens":3,"output_tokens":4}}\n\n',
             b'event: message_stop\ndata: {"type":"message_stop"}\n\n'), 3, 4, 0, 1),
    ],
    ids=["chat", "embeddings", "stream with usage", "stream without", "anthropic"],
)  # fmt: skip
async def test_tokens_are_counted_as_the_engine_says(
    tmp_path, odd, path, answer, prompt, completion, estimated, gaps
) -> None:
    async with serving(tmp_path, odd) as stack:
        await stack.serve("m", await stack.engine(answer), warmth="hot", aliases=("other",))
        for model in ("m", "other"):
            await ask(stack, path, model, stream=gaps > 0)
        found = await samples(stack)
    assert found["llm_inference_requests_total", "m", "200", ""] == 2
    assert found["llm_prompt_tokens_total", "m", ""] == 2 * prompt
    assert found["llm_tokens_generated_total", "m", ""] == 2 * completion
    assert found["llm_tokens_estimated_total", "m", ""] == 2 * estimated
    assert found["llm_inference_latency_seconds_count", "m", ""] == 2
    assert found["llm_time_to_first_token_seconds_count", "m", ""] == 2
    assert found["llm_inter_token_latency_seconds_count", "m", ""] == 2 * gaps
    assert found["llm_queue_depth", "m"] == 0
    assert ("llm_hold_seconds_count", "m", "hot", "") not in found


async def test_a_long_answer_in_many_pieces_is_counted(tmp_path, odd) -> None:
    floats = b"0.1234567," * 60_000
    async with serving(tmp_path, odd) as stack:
        body = b'{"data":[%b0],"usage":{"prompt_tokens":8,"total_tokens":8}}' % floats
        await stack.serve("m", await stack.engine(unary(body)))
        assert await ask(stack, EMBEDDINGS) == body
        assert (await samples(stack))["llm_prompt_tokens_total", "m", ""] == 8


async def test_who_hangs_up_is_charged_for_what_came(tmp_path, odd) -> None:
    hold = asyncio.Event()
    async with serving(tmp_path, odd) as stack:
        first = ROLE + TOKEN_EVENT * 3
        await stack.serve("m", await stack.engine(sse(first, DONE, hold=hold)))
        async with stack.post(CHAT, {"model": "m", "stream": True}) as response:
            await response.content.readexactly(len(first))
            response.close()
        name = ("llm_inference_requests_total", "m", "499", "")
        async with asyncio.timeout(kit.DEADLINE_S):
            while name not in (found := await samples(stack)):
                await asyncio.sleep(0.01)
        assert found["llm_tokens_estimated_total", "m", ""] == 3


async def test_a_hold_is_counted_by_the_rung_the_model_was_on(tmp_path, odd) -> None:
    async with serving(tmp_path, odd) as stack:
        engine = await stack.engine(unary(WHOLE))
        await stack.serve("m", warmth="asleep")
        call = asyncio.create_task(ask(stack))
        await eventually(lambda: stack.scheduler.waiting() == 1, "it does not wait")
        assert (await samples(stack))["llm_queue_depth", "m"] == 1
        await stack.serve("m", engine, warmth="hot")
        assert await call == WHOLE
        found = await samples(stack)
    assert found["llm_hold_seconds_count", "m", "asleep", ""] == 1
    assert 0 < found["llm_hold_seconds_sum", "m", "asleep", ""] < kit.DEADLINE_S


# ------------------------------------------------------------------------------------- access log


def lines_of(path: Path) -> list[dict]:
    """The log's lines. None may tell a secret or what was said."""
    text = path.read_text()
    for secret in (SECRET, PROMPT, ANSWER, KEY, TOKEN, "private=1"):
        assert secret not in text
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


async def test_each_call_is_a_line(tmp_path, odd) -> None:
    path = tmp_path / "access.log"
    path.write_text('{"before":1}\n')
    async with serving(tmp_path, odd, access_log=str(path)) as stack:
        engine = await stack.engine(unary(WHOLE))
        await stack.serve("m", engine, aliases=("other",), warmth="hot")
        began = datetime.now(UTC)
        headers = {"X-Request-ID": "r1", "traceparent": SAMPLED}
        await ask(stack, CHAT + "?private=1", "other", headers=headers)
        await ask(stack, model="unknown", headers={"X-Request-ID": "r2"})
        engine.answer = sse(ROLE, TOKEN_EVENT, DONE)
        await ask(stack, headers={"X-Request-ID": "r3"}, stream=True)
        await eventually(lambda: len(lines_of(path)) == 4, "not written while it serves")
    before, whole, unknown, stream = lines_of(path)
    assert before == {"before": 1}
    age = datetime.fromisoformat(whole.pop("time")) - began
    assert timedelta(seconds=-1) < age < timedelta(seconds=kit.DEADLINE_S)
    assert 0 <= whole["ttft_s"] <= whole.pop("total_s") < kit.DEADLINE_S
    whole.pop("ttft_s")
    assert whole == {
        "request_id": "r1", "client": "127.0.0.1", "method": "POST", "path": CHAT, "status": 200,
        "error": None, "tenant": "anonymous", "key_id": None, "model": "m", "version": None,
        "replica": "replica-0", "rung": "hot", "held_s": 0.0, "prompt_tokens": 7,
        "completion_tokens": 12, "tokens_exact": True, "bytes": len(WHOLE), "trace_id": TRACE_ID,
            "cached": False,
    }  # fmt: skip
    assert (unknown["request_id"], unknown["status"]) == ("r2", 404)
    assert (unknown["error"], unknown["replica"]) == ("model_not_found", None)
    assert (stream["completion_tokens"], stream["tokens_exact"]) == (1, False)
    assert stream["bytes"] == len(ROLE + TOKEN_EVENT + DONE)


async def test_what_never_becomes_a_call_is_a_line_too(tmp_path) -> None:
    path = tmp_path / "access.log"
    async with kit.stack(tmp_path, access_log=str(path)) as stack:
        await stack.serve("m", await stack.engine(unary(WHOLE)))
        async with stack.post(CHAT, PROMPT.encode(), headers={"X-Request-ID": "bad"}):
            pass
        async with stack.session.get(stack.url + "/v1/models?private=1"):
            pass
        async with stack.session.get(stack.url + "/healthz"):
            pass
        body = {"prompt": PROMPT}
        async with stack.post("/invoke/m", body):
            pass
    bad, models, invoke = lines_of(path)
    assert (bad["request_id"], bad["status"], bad["error"]) == ("bad", 400, "invalid_json")
    assert (models["method"], models["path"], models["status"]) == ("GET", "/v1/models", 200)
    assert (invoke["path"], invoke["model"], invoke["status"]) == ("/invoke/m", "m", 200)


@pytest.mark.parametrize(
    ("trusted", "client"), [((), "127.0.0.1"), (("127.0.0.0/8",), "192.0.2.7")]
)
async def test_a_trusted_proxy_says_whose_call_it_is(tmp_path, odd, trusted, client) -> None:
    path = tmp_path / "access.log"
    settings = {"access_log": str(path), "trusted_proxies": trusted, "anonymous": "on"}
    async with serving(tmp_path, odd, **settings) as stack:
        await stack.serve("m", await stack.engine(unary(WHOLE)))
        headers = {"X-Forwarded-For": "192.0.2.1, 192.0.2.7"}
        await ask(stack, headers=headers)
        async with stack.session.get(stack.url + "/v1/models", headers=headers):
            pass
    assert [line["client"] for line in lines_of(path)] == [client] * 2


async def test_a_log_that_was_moved_away_is_begun_again(tmp_path) -> None:
    path, old = tmp_path / "access.log", tmp_path / "access.log.1"
    async with kit.stack(tmp_path, access_log=str(path)) as stack:
        await stack.serve("m", await stack.engine(unary(WHOLE)))
        await ask(stack, headers={"X-Request-ID": "r1"})
        await eventually(lambda: lines_of(path), "not written")
        path.rename(old)
        await ask(stack, headers={"X-Request-ID": "r2"})
    assert [line["request_id"] for line in lines_of(old)] == ["r1"]
    assert [line["request_id"] for line in lines_of(path)] == ["r2"]


async def test_a_log_that_cannot_be_opened_is_named(tmp_path) -> None:
    path = str(tmp_path / "none" / "access.log")
    with pytest.raises(OSError, match=r"router\.access_log: cannot write .*/none/access\.log"):
        async with kit.stack(tmp_path, access_log=path):
            pass


async def test_a_full_disk_costs_lines_not_calls(tmp_path, caplog) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    async with kit.stack(tmp_path, access_log="/dev/full") as stack:
        await stack.serve("m", await stack.engine(unary(WHOLE)))
        assert await ask(stack) == WHOLE
    assert "access log /dev/full: up to 1 lines lost" in caplog.text


# ------------------------------------------------------------------------------------- spans


class Collector:
    """An OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "stoker-router"
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/traces", collector.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield collector, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def tracing(
    tmp_path: Path, odd: bool, **settings: object
) -> AsyncIterator[tuple[Stack, list[Span]]]:
    """A router that sends its spans to the list, all of them by the end; none tells a secret."""
    async with collecting() as (collector, url):
        async with serving(tmp_path, odd, otlp_endpoint=url, **settings) as stack:
            yield stack, collector.spans
        for secret in (SECRET, PROMPT, ANSWER, KEY, TOKEN):
            assert secret.encode() not in collector.raw


def said(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


async def traced(
    tmp_path: Path, odd: bool, answer: kit.Answer
) -> tuple[dict[str, Span], kit.Received]:
    """One sampled chat call: its two spans by name, and what the engine got."""
    async with tracing(tmp_path, odd) as (stack, spans):
        engine = await stack.engine(answer)
        await stack.serve("m", engine, warmth="hot", aliases=("other",))
        headers = {"traceparent": SAMPLED, "tracestate": "vendor=1"}
        await ask(stack, CHAT, "other", headers=headers, max_tokens=5, temperature=0.5)
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert len(spans) == 2
    return {span.name: span for span in spans}, engine.received[0]


async def test_a_call_is_a_span_below_its_callers_and_above_its_engines(tmp_path, odd) -> None:
    spans, received = await traced(tmp_path, odd, unary(WHOLE))
    server, engine = spans["chat m"], spans["POST"]
    assert (server.kind, engine.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert server.parent_span_id.hex() == SPAN_ID
    assert engine.parent_span_id == server.span_id
    sent = [value for name, value in received.headers if name.lower() == "traceparent"]
    assert sent == [f"00-{TRACE_ID}-{engine.span_id.hex()}-01"]
    assert received.header("tracestate") == "vendor=1"
    told = said(server)
    assert told.pop("stoker.request_id")
    assert 0 <= told.pop("stoker.ttft_s") < kit.DEADLINE_S
    assert told == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "stoker",
        "gen_ai.request.model": "m", "gen_ai.response.model": "m", "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 5, "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 12,
        "http.request.method": "POST", "http.response.status_code": 200, "url.path": CHAT,
        "client.address": "127.0.0.1", "stoker.tenant": "anonymous", "stoker.rung": "hot",
        "stoker.replica_id": "replica-0", "stoker.tokens_exact": True,
    }  # fmt: skip
    assert said(engine)["server.address"] == "127.0.0.1"
    assert said(engine)["http.response.status_code"] == 200


async def test_an_engines_error_is_the_spans_error(tmp_path, odd) -> None:
    spans, _ = await traced(tmp_path, odd, unary(b"{}", "500 Internal Server Error"))
    assert spans["chat m"].status.code == Status.STATUS_CODE_ERROR
    assert said(spans["chat m"])["error.type"] == "500"


async def test_a_hold_and_a_failed_replica_are_spans(tmp_path, odd) -> None:
    async def dies(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with tracing(tmp_path, odd) as (stack, spans):
        bad, good = await stack.engine(dies), await stack.engine(unary(WHOLE))
        await stack.serve("m", warmth="cold")
        call = asyncio.create_task(ask(stack, headers={"traceparent": SAMPLED}))
        await eventually(lambda: stack.scheduler.waiting() == 1, "it does not wait")
        await stack.serve("m", warmth="starting", waiting_for="starting on gpu-1")
        await stack.serve("m", bad, warmth="hot")
        await eventually(lambda: bad.received, "not sent")
        await stack.serve("m", good, warmth="hot")
        assert await call == WHOLE
    server = next(s for s in spans if s.kind == Span.SPAN_KIND_SERVER)
    rest = [s for s in spans if s is not server]
    assert {s.parent_span_id for s in rest} == {server.span_id}
    hold, *_ = [s for s in rest if s.name == "hold"]
    assert [e.name for e in hold.events] == ["stoker.cold_start"]
    assert said(hold.events[0]) == {
        "stoker.waiting_for": "starting on gpu-1",
        "stoker.rung": "cold",
    }
    failed, answered = [s for s in rest if s.name == "POST"]
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert said(failed)["error.type"] == "replica_failed"
    assert said(answered)["http.response.status_code"] == 200
    assert (said(server)["stoker.cold_start"], said(server)["stoker.rung"]) == (True, "cold")
    assert said(server)["stoker.held_s"] > 0


async def test_the_callers_sampled_flag_decides(tmp_path, odd) -> None:
    async with tracing(tmp_path, odd, trace_sample=0.0) as (stack, spans):
        engine = await stack.engine(unary(WHOLE))
        await stack.serve("m", engine)
        await ask(stack, headers={"traceparent": UNSAMPLED})
        await ask(stack)
        await ask(stack, headers={"traceparent": SAMPLED})
    sent = [received.header("traceparent").split("-") for received in engine.received]
    assert [int(parts[3], 16) & 1 for parts in sent] == [0, 0, 1]
    assert (sent[0][1], sent[2][1]) == (TRACE_ID, TRACE_ID)
    assert sent[1][1] != TRACE_ID
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert len(spans) == 2


async def test_without_tracing_the_callers_context_passes_untouched(tmp_path, odd) -> None:
    async with serving(tmp_path, odd) as stack:
        engine = await stack.engine(unary(WHOLE))
        await stack.serve("m", engine)
        await ask(stack, headers={"traceparent": SAMPLED, "tracestate": "vendor=1"})
    assert engine.received[0].header("traceparent") == SAMPLED
    assert engine.received[0].header("tracestate") == "vendor=1"


async def test_a_hang_up_ends_its_spans(tmp_path, odd) -> None:
    async with tracing(tmp_path, odd) as (stack, spans):
        engine = await stack.engine(never)
        await stack.serve("m", engine)
        call = asyncio.create_task(ask(stack))
        await eventually(lambda: engine.received, "not sent")
        call.cancel()
        await eventually(lambda: engine.hung_up, "still there")
    server = next(s for s in spans if s.kind == Span.SPAN_KIND_SERVER)
    assert said(server)["error.type"] == "hung_up"
    assert len(spans) == 2


async def test_a_collector_that_is_down_costs_no_call(tmp_path) -> None:
    async with kit.stack(tmp_path, otlp_endpoint="http://127.0.0.1:9") as stack:
        await stack.serve("m", await stack.engine(unary(WHOLE)))
        assert await ask(stack) == WHOLE
