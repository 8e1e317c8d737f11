"""One sleep or wake against an engine's HTTP routes: what is called, and what is believed."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from agent.engines import sleep, wake_canary
from agent.engines.sleep import Controls, EngineError, Memory, RungFailed, Untouched
from agent.engines.wake_canary import WakeCanary

KEY = "control-secret"
GIB = 2**30


class FakeEngine:
    """Notes every call; `answers` overrides what a path gives: (status, body)."""

    controls: Controls  # of the fixture below

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bodies: list[object] = []
        self.answers: dict[str, tuple[int, object]] = {}
        self.asleep = False
        self.token = " Paris"
        app = web.Application()
        app.add_routes([web.route("*", "/{tail:.*}", self._any)])
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def _any(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        self.calls.append(f"{request.method} {request.path_qs}")
        body = await request.read()
        self.bodies.append(msgspec.json.decode(body) if body else None)
        if request.path in self.answers:
            status, answer = self.answers[request.path]
            return web.json_response(answer, status=status)
        if request.path == "/sleep":
            self.asleep = True
        if request.path == "/wake_up" and request.query.get("tags") != "weights":
            self.asleep = False
        known = {
            "/stoker/close": {"in_flight": 0, "served": 0, "idle_for_s": None},
            "/is_sleeping": {"is_sleeping": self.asleep},
            "/v1/completions": {"choices": [{"text": self.token, "logprobs": None}]},
        }
        return web.json_response(known.get(request.path, {}))


@pytest.fixture
async def engine():
    engine = FakeEngine()
    await engine.runner.setup()
    await web.TCPSite(engine.runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        host, port = engine.runner.addresses[0]
        engine.controls = Controls(session, f"http://{host}:{port}", KEY)
        yield engine
    await engine.runner.cleanup()


def meter(*figures: Memory):
    """A measure that gives these figures one by one, then the last forever."""
    left = list(figures)

    async def measure() -> Memory:
        return left.pop(0) if len(left) > 1 else left[0]

    return measure


# ------------------------------------------------------------------------------ sleep


@pytest.mark.parametrize("level", [1, 2])
async def test_the_door_is_shut_before_it_is_told_to_sleep(engine, level):
    assert await sleep.put_to_sleep(engine.controls, level, 1, None) == 0
    assert engine.calls == [
        "POST /stoker/close",
        f"POST /sleep?level={level}&mode=wait",
        "GET /is_sleeping",
    ]
    assert engine.bodies == [None] * 3


async def test_a_request_of_the_last_moment_keeps_it_awake(engine):
    engine.answers["/stoker/close"] = (200, {"in_flight": 2})
    with pytest.raises(Untouched, match="2 requests"):
        await sleep.put_to_sleep(engine.controls, 1, 1, None)
    assert engine.calls == ["POST /stoker/close", "POST /stoker/open"]


async def test_an_engine_without_a_door_is_left_as_it_is(engine):
    engine.answers["/stoker/close"] = (404, {})
    with pytest.raises(Untouched, match="404"):
        await sleep.put_to_sleep(engine.controls, 1, 1, None)
    assert engine.calls == ["POST /stoker/close", "POST /stoker/open"]


async def test_a_sleep_that_is_refused_or_not_true_has_failed(engine):
    engine.answers["/sleep"] = (500, {"detail": "CUDA error"})
    with pytest.raises(RungFailed, match="CUDA error"):
        await sleep.put_to_sleep(engine.controls, 1, 1, None)
    engine.answers["/sleep"] = (200, {})
    with pytest.raises(RungFailed, match="says that it does not"):
        await sleep.put_to_sleep(engine.controls, 1, 1, None)


async def test_asleep_is_when_its_bytes_are_seen_gone(engine):
    measure = meter(Memory(20 * GIB, 50 * GIB), Memory(20 * GIB, 50 * GIB), Memory(GIB, 31 * GIB))
    assert await sleep.put_to_sleep(engine.controls, 1, 24 * GIB, measure) == GIB


async def test_where_no_process_is_seen_the_devices_tell(engine):
    """As in a container: NVML lists no process of ours there."""
    measure = meter(Memory(None, 50 * GIB), Memory(None, 49 * GIB), Memory(None, 28 * GIB))
    assert await sleep.put_to_sleep(engine.controls, 1, 24 * GIB, measure) == 2 * GIB


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Memory(20 * GIB, 50 * GIB), Memory(11 * GIB, 41 * GIB)),
        (Memory(None, 50 * GIB), Memory(None, 40 * GIB)),
    ],
)
async def test_memory_that_stays_is_a_failure_with_words(engine, monkeypatch, before, after):
    monkeypatch.setattr(sleep, "FREE_S", 0.3)
    with pytest.raises(RungFailed, match=r"still show 1[14]\.0 GiB of 2[04]\.0 GiB"):
        await sleep.put_to_sleep(engine.controls, 1, 24 * GIB, meter(before, after))


# ------------------------------------------------------------------------------ wake


async def test_level_1_wakes_with_one_call(engine):
    known = await sleep.take_canary(engine.controls, "m")
    engine.calls.clear()
    engine.asleep = True
    phases = await sleep.wake(engine.controls, 1, known)
    assert engine.calls == [
        "GET /is_sleeping",
        "POST /wake_up",
        "GET /is_sleeping",
        "POST /v1/completions",
        "POST /stoker/open",
    ]
    assert set(phases) == {"wake", "canary"}


async def test_level_2_wakes_weights_reloads_them_and_then_the_kv_cache(engine):
    engine.asleep = True
    phases = await sleep.wake(engine.controls, 2, None)
    assert engine.calls == [
        "GET /is_sleeping",
        "POST /wake_up?tags=weights",
        "POST /collective_rpc",
        "POST /wake_up?tags=kv_cache",
        "GET /is_sleeping",
        "POST /stoker/open",
    ]
    assert engine.bodies[2] == {"method": "reload_weights"}
    assert set(phases) == {"wake", "reload"}


async def test_one_that_is_awake_only_has_its_canary_to_pass(engine):
    known = await sleep.take_canary(engine.controls, "m")
    engine.calls.clear()
    await sleep.wake(engine.controls, 2, known)
    assert engine.calls == ["GET /is_sleeping", "POST /v1/completions", "POST /stoker/open"]


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/collective_rpc", (500, {"detail": "no such file"}), "no such file"),
        ("/is_sleeping", (200, {"is_sleeping": True}), "does not say that it is awake"),
        ("/v1/completions", (200, {"choices": [{"text": "!", "logprobs": None}]}), "'!'"),
        ("/v1/completions", (500, {}), "500"),
        ("/v1/completions", (200, {"choices": []}), "no answer"),
    ],
)
async def test_a_wake_that_is_not_proved_has_failed_and_its_door_stays_shut(
    engine, path, answer, words
):
    known = await sleep.take_canary(engine.controls, "m")
    engine.asleep = True
    engine.answers[path] = answer
    with pytest.raises(RungFailed, match=words):
        await sleep.wake(engine.controls, 2, known)
    assert "POST /stoker/open" not in engine.calls


# ------------------------------------------------------------------------------ canary


async def test_the_first_call_that_a_model_answers_is_its_canary(engine):
    engine.answers["/v1/completions"] = (400, {"error": "no generation"})
    engine.answers["/v1/embeddings"] = (404, {})
    engine.answers["/pooling"] = (200, {"data": [{"data": [[1.0, 2.0], [3.0, 4.0]]}]})
    known = await sleep.take_canary(engine.controls, "m")
    assert (known.path, known.vector) == ("/pooling", (1.0, 2.0, 3.0, 4.0))
    assert engine.bodies[0]["logprobs"] == 5
    assert "logprobs" not in engine.bodies[1]
    assert all(body["model"] == "m" for body in engine.bodies)


async def test_a_model_may_have_no_canary_but_a_sick_engine_is_told(engine):
    for path, _ in wake_canary.ASKS:
        engine.answers[path] = (404, {})
    known = await sleep.take_canary(engine.controls, "m")
    assert known.path == ""
    await sleep.wake(engine.controls, 1, known)
    engine.answers["/v1/completions"] = (500, {"detail": "EngineDeadError"})
    with pytest.raises(EngineError, match="EngineDeadError"):
        await sleep.take_canary(engine.controls, "m")


def token(text: str, **logprobs: float) -> WakeCanary:
    return WakeCanary(path="/v1/completions", token=text, logprobs=logprobs)


def vector(*values: float) -> WakeCanary:
    return WakeCanary(path="/v1/embeddings", vector=values)


NAN = float("nan")


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (token("a"), token("a"), True),
        (token("a"), token("b"), False),
        (token(""), token(""), True),
        (token("a", a=-1.0, b=-1.05), token("b", a=-1.06, b=-1.0), True),  # a near tie
        (token("a", a=-1.0, b=-2.0), token("b", a=-2.0, b=-1.0), False),
        (token("a", a=-1.0), token("a", a=-1.1), True),
        (token("a", a=-1.0), token("a", a=-9.0), False),  # right by chance
        (token("a", a=-1.0), token("a", a=NAN), False),
        (vector(1.0, 2.0), vector(1.0, 2.001), True),
        (vector(1.0, 2.0), vector(2.0, -1.0), False),
        (vector(1.0, 2.0), vector(NAN, NAN), False),
        (vector(1.0, 2.0), vector(1.0), False),
        (vector(1.0, 2.0), vector(0.0, 0.0), False),
        (vector(1.0, 2.0), WakeCanary(), False),
        (WakeCanary(), WakeCanary(), False),
    ],
)
def test_a_difference_that_rounding_explains_is_none(before, after, same):
    words = wake_canary.difference(before, after)
    assert (words is None) == same, words


def test_a_canary_outlives_the_agent():
    known = token("a", a=-1.0)
    assert msgspec.json.decode(msgspec.json.encode(known), type=WakeCanary) == known
    assert wake_canary.difference(known, known) is None


def test_vllms_top_logprobs_are_read():
    likely = {"tokens": ["token_id:7"], "top_logprobs": [{"token_id:7": -0.5, "token_id:8": -1}]}
    found = wake_canary.read("/v1/completions", {}, {"choices": [{"text": "", "logprobs": likely}]})
    assert (found.token, found.logprobs) == ("token_id:7", {"token_id:7": -0.5, "token_id:8": -1.0})
    embedding = {"data": [{"embedding": [0.5, 1]}]}
    assert wake_canary.read("/v1/embeddings", {}, embedding).vector == (0.5, 1.0)
    wrongs: list[Any] = [{}, {"choices": []}, {"choices": [None]}, None]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="no answer to compare"):
            wake_canary.read("/v1/completions", {}, wrong)
