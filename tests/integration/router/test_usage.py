"""A stream is billed by the engine's own word, which its caller need not have asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from runtime.contract.access import Limits, Used
from runtime.wire.routes import CacheRule
from tests.kits import router_stack as kit
from tests.kits.router_keys import key, token
from tests.kits.router_stack import Received, Stack, chunk, eventually

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES = "/v1/responses"
PROMPT_TOKENS, ANSWER_TOKENS = 1700, 300  # of three events: the engine speculates
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
USAGE = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS, "total_tokens": 2000}
LAST = b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
DONE = b"data: [DONE]\n\n"
OTHERS = {
    MESSAGES: (
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":'
        b'{"input_tokens":1700,"output_tokens":0}}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":'
        b'{"input_tokens":1700,"output_tokens":300}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    ),
    RESPONSES: (
        b'event: response.completed\ndata: {"response":{"id":"resp_1","usage":'
        b'{"input_tokens":1700,"output_tokens":300,"total_tokens":2000},"user":null},'
        b'"sequence_number":9,"type":"response.completed"}\n\n'
    ),
}


class Vllm:
    """An engine that tells usage as vLLM does; `cuts`: the size of the pieces it writes."""

    def __init__(self) -> None:
        self.cut = 10_000
        self.hold: asyncio.Event | None = None
        self.breaks = False

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        options = received.json().get("stream_options") or {}
        counted = options.get("include_usage")
        continuous = counted and options.get("continuous_usage_stats")
        word = WORD.replace(b"]}\n", b'],"usage":%b}\n' % json.dumps(USAGE).encode())
        parts = OTHERS.get(received.target) or b"".join(
            [(word if continuous else WORD) * 3, LAST if counted else b"", DONE]
        )
        writer.write(kit.SSE_HEAD)
        if self.hold is not None:
            writer.write(chunk(parts[: 3 * len(WORD)]))
            await self.hold.wait()
            return
        if self.breaks:
            parts = parts[: len(WORD) + 20]
        for at in range(0, len(parts), self.cut):
            writer.write(chunk(parts[at : at + self.cut]))
            await writer.drain()
            await asyncio.sleep(0)
        if self.breaks:
            writer.close()
            return
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@pytest.fixture(params=["plain", "handed over"])
async def stack(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    async with kit.stack(tmp_path, anonymous="on") as made:
        if request.param == "handed over":
            made.make_calls_odd()
        await made.serve("m", await made.engine(Vllm()))
        await made.scheduler.publish_keys(
            key("acme", "acme"), key("tight", "tight", limits=Limits(tokens_per_min=50_000))
        )
        async with asyncio.timeout(kit.DEADLINE_S):
            while (await ask(made, "acme", CHAT, stream=False))[0] != 200:
                await asyncio.sleep(0.02)
        made.engines[0].received.clear()
        yield made


def vllm_of(stack: Stack) -> Vllm:
    vllm = stack.engines[0].answer
    assert isinstance(vllm, Vllm)
    return vllm


async def ask(stack: Stack, name: str | None, path: str, **more: Any) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token(name)}"} if name else {}
    body = {"model": "m", "messages": [], "stream": True, **more}
    async with stack.post(path, body, headers=headers) as response:
        return response.status, await response.read()


async def charged(stack: Stack, tenant: str, tokens: int) -> None:
    """Until the scheduler has heard that so many more tokens were taken."""

    def used() -> int:
        totals = stack.scheduler.usage.totals(asyncio.get_running_loop().time())
        return totals.get(f"tenant:{tenant}", Used()).tokens

    await eventually(lambda: used() == tokens, f"it is not charged {tokens}")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("cut", [10_000, 7])
async def test_a_stream_is_billed_by_the_engines_own_usage(
    stack: Stack, path: str, cut: int
) -> None:
    vllm_of(stack).cut = cut
    status, answer = await ask(stack, "tight", path)
    assert (status, answer) == (200, WORD * 3 + DONE)
    assert stack.engines[0].received[0].json()["stream_options"] == {"include_usage": True}
    await charged(stack, "tight", 2000)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_the_other_protocols_tell_it_unasked(stack: Stack, path: str) -> None:
    assert await ask(stack, "tight", path) == (200, OTHERS[path])
    assert "stream_options" not in stack.engines[0].received[0].json()
    await charged(stack, "tight", 2000)


async def test_who_asked_for_it_gets_it(stack: Stack) -> None:
    options = {"include_usage": True}
    assert await ask(stack, "tight", CHAT, stream_options=options) == (200, WORD * 3 + LAST + DONE)
    options["continuous_usage_stats"] = True
    _, answer = await ask(stack, "tight", CHAT, stream_options=options)
    assert answer.count(b'"usage"') == 4
    assert stack.engines[0].received[1].json()["stream_options"] == options
    await charged(stack, "tight", 4000)


async def test_who_is_not_counted_is_passed_on_as_it_came(stack: Stack) -> None:
    _, answer = await ask(stack, None, CHAT)
    assert answer == WORD * 3 + DONE
    assert "stream_options" not in stack.engines[0].received[0].json()


@pytest.mark.parametrize("odd", [False, True])
async def test_the_body_that_asks_for_it_comes_out_of_the_budget(tmp_path: Path, odd: bool) -> None:
    """Of two bodies of 150 kB and a copy of each only three have room: the fourth is not made."""
    async with kit.stack(tmp_path, anonymous="on", held_bytes=500_000) as stack:
        if odd:
            stack.make_calls_odd()
        engine = await stack.engine(kit.never)
        await stack.serve("m", engine)
        await stack.scheduler.publish_keys(key("acme", "acme"))
        await eventually((tmp_path / "keys.json").exists, "the keys are kept")

        async def sent(count: int) -> asyncio.Task[tuple[int, bytes]]:
            messages = [{"role": "user", "content": "x" * 150_000}]
            call = asyncio.create_task(ask(stack, "acme", CHAT, messages=messages))
            await eventually(lambda: len(engine.received) == count, "not sent")
            return call

        calls = [await sent(1), await sent(2)]
        calls[0].cancel()
        await eventually(lambda: engine.hung_up == 1, "it was not called off")
        calls.append(await sent(3))
        asked = ["stream_options" in received.json() for received in engine.received]
        assert asked == [True, False, True]
        for call in calls:
            call.cancel()


async def test_a_picture_does_not_use_up_the_limit(stack: Stack) -> None:
    """600 kB in base64 is no text of 150,000 tokens."""
    url = "data:image/png;base64," + "A" * 600_000
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    for _ in range(2):
        status, _ = await ask(stack, "tight", CHAT, messages=[message])
        assert status == 200
    await charged(stack, "tight", 4000)


async def test_who_hangs_up_is_billed_what_was_counted_so_far(stack: Stack) -> None:
    vllm_of(stack).hold = asyncio.Event()
    headers = {"Authorization": f"Bearer {token('tight')}"}
    body = {"model": "m", "prompt": "x" * 400, "stream": True}
    size = len(json.dumps(body, separators=(",", ":")))
    async with stack.post(COMPLETIONS, body, headers=headers) as response:
        assert await response.content.readexactly(3 * len(WORD)) == WORD * 3
        response.close()
    await charged(stack, "tight", size // 4 + 3)


async def test_an_answer_that_breaks_off_within_an_event_ends_with_an_error(stack: Stack) -> None:
    vllm_of(stack).breaks = True
    headers = {"Authorization": f"Bearer {token('tight')}"}
    got = b""
    async with stack.post(CHAT, {"model": "m", "stream": True}, headers=headers) as response:
        with contextlib.suppress(aiohttp.ClientPayloadError):
            while piece := await response.content.readany():
                got += piece
        assert response.content.exception() is not None
    assert got.startswith(WORD + b'data: {"error"')
    assert got.endswith(b"}\n\n")


async def test_what_is_kept_to_be_given_again_has_no_usage_either(stack: Stack) -> None:
    await stack.serve("m", stack.engines[0], cache=CacheRule(ttl_s=60, shared=False, revision="1"))
    for _ in range(2):
        assert await ask(stack, "tight", CHAT, temperature=0) == (200, WORD * 3 + DONE)
    assert len(stack.engines[0].received) == 1
