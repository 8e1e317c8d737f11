"""What OpenAI's and Anthropic's own clients raise when a call fails: the measure of its shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.kits import router_stack as kit
from tests.kits.router_stack import Stack, unary

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOO_LONG = (
    b'{"error":{"message":"the prompt is too long","type":"BadRequestError","param":null,'
    b'"code":400}}'
)


@pytest.fixture
async def claude(stack: Stack) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=stack.url, api_key="k", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
async def gpt(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    base_url = stack.url + "/v1"
    async with AsyncOpenAI(base_url=base_url, api_key="k", max_retries=0, timeout=20) as made:
        yield made


async def refused(stack: Stack) -> None:
    await stack.serve("m", refusal="no device has 80 GiB", refusal_final=True)


async def too_long(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary(TOO_LONG, "400 Bad Request")))


async def removed(stack: Stack) -> None:
    await stack.scheduler.publish()
    await stack.scheduler.in_force()


FAILURES = pytest.mark.parametrize(
    ("fail", "words"),
    [(refused, "80 GiB"), (too_long, "prompt is too long"), (removed, "(?:was removed|no model)")],
)
Fail = Callable[[Stack], Coroutine[Any, Any, None]]


# ------------------------------------------------------------------------------------- Anthropic


@FAILURES
async def test_anthropic_whole(
    stack: Stack, claude: AsyncAnthropic, fail: Fail, words: str
) -> None:
    await fail(stack)
    with pytest.raises(anthropic.APIStatusError, match=words) as raised:
        await claude.messages.create(model="m", max_tokens=9, messages=MESSAGES)
    kinds: dict[Fail, str] = {refused: "overloaded_error", too_long: "invalid_request_error"}
    body: Any = raised.value.body
    assert body["error"]["type"] == kinds.get(fail, "not_found_error")
    with pytest.raises(anthropic.APIStatusError, match=words):
        await claude.messages.count_tokens(model="m", messages=MESSAGES)


@FAILURES
async def test_anthropic_held_stream(
    stack: Stack, claude: AsyncAnthropic, fail: Fail, words: str
) -> None:
    await stack.serve("m")
    async with claude.messages.stream(model="m", max_tokens=9, messages=MESSAGES) as stream:
        await fail(stack)
        with pytest.raises(anthropic.APIStatusError, match=words):
            await anext(aiter(stream))


async def test_anthropic_stream_that_breaks_off(stack: Stack, claude: AsyncAnthropic) -> None:
    message = {
        "id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    begin = json.dumps({"type": "message_start", "message": message}).encode()
    await stack.serve("m", await stack.engine(cut_off(b"message_start", begin)))
    got: list[Any] = []
    with pytest.raises(anthropic.APIStatusError, match="in the middle of its answer"):
        await all_of(
            await claude.messages.create(
                model="m", max_tokens=9, messages=MESSAGES, stream=True
            ), got
        )  # fmt: skip
    assert [event.type for event in got] == ["message_start"]


# ------------------------------------------------------------------------------------- OpenAI


@FAILURES
async def test_openai_whole(stack: Stack, gpt: AsyncOpenAI, fail: Fail, words: str) -> None:
    await fail(stack)
    with pytest.raises(openai.APIStatusError, match=words):
        await gpt.chat.completions.create(model="m", messages=MESSAGES)
    with pytest.raises(openai.APIStatusError, match=words):
        await gpt.responses.create(model="m", input="hi")


@FAILURES
async def test_openai_held_stream(stack: Stack, gpt: AsyncOpenAI, fail: Fail, words: str) -> None:
    await stack.serve("m")
    stream = await gpt.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    await fail(stack)
    with pytest.raises(openai.APIError, match=words):
        await anext(stream)


async def test_openai_responses_held_stream_has_an_error_event(
    stack: Stack, gpt: AsyncOpenAI
) -> None:
    await stack.serve("m")
    stream = await gpt.responses.create(model="m", input="hi", stream=True)
    await refused(stack)
    (event,) = [event async for event in stream]
    assert isinstance(event, openai.types.responses.ResponseErrorEvent)
    assert (event.type, event.code, event.sequence_number) == ("error", "model_unavailable", 0)
    assert "80 GiB" in event.message


async def test_openai_responses_stream_that_breaks_off(stack: Stack, gpt: AsyncOpenAI) -> None:
    data = {
        "type": "response.output_text.delta", "sequence_number": 7, "delta": "a", "item_id": "i",
        "output_index": 0, "content_index": 0, "logprobs": [],
    }  # fmt: skip
    engine = await stack.engine(cut_off(b"response.output_text.delta", json.dumps(data).encode()))
    await stack.serve("m", engine)
    got: list[Any] = []
    with pytest.raises(openai.APIConnectionError):  # it does not look complete
        await all_of(await gpt.responses.create(model="m", input="hi", stream=True), got)
    assert [event.type for event in got] == ["response.output_text.delta", "error"]
    assert got[1].sequence_number == 8


async def test_openai_chat_stream_that_breaks_off(stack: Stack, gpt: AsyncOpenAI) -> None:
    piece = {
        "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
    }  # fmt: skip
    await stack.serve("m", await stack.engine(cut_off(None, json.dumps(piece).encode())))
    stream = await gpt.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert (await anext(stream)).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError, match="in the middle of its answer"):
        await anext(stream)


# ------------------------------------------------------------------------------- coming back


@pytest.mark.parametrize(("final", "calls"), [(True, 1), (False, 2)])
async def test_clients_come_back_where_that_can_help_and_when_they_are_told(
    stack: Stack, final: bool, calls: int
) -> None:
    async def refuse() -> None:
        await stack.serve("m", refusal="no", refusal_final=final, retry_after_s=0.2)

    await refuse()
    asked = 0

    async def count(request: object) -> None:
        nonlocal asked
        asked += 1

    for client in (
        AsyncOpenAI(base_url=stack.url + "/v1", api_key="k", max_retries=1, timeout=20),
        AsyncAnthropic(base_url=stack.url, api_key="k", max_retries=1, timeout=20),
    ):
        asked = 0
        client._client.event_hooks["request"].append(count)
        async with client:
            with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)):
                await ask(client)
        assert asked == calls


async def test_a_clients_own_timeout_is_met_by_an_answer(stack: Stack) -> None:
    await stack.serve("m", waiting_for="a start on n1")
    limit = "within 4s, as the request"
    for client in (
        AsyncOpenAI(base_url=stack.url + "/v1", api_key="k", max_retries=0, timeout=4),
        AsyncAnthropic(base_url=stack.url, api_key="k", max_retries=0, timeout=4),
    ):
        async with client:
            with pytest.raises((openai.APIStatusError, anthropic.APIStatusError), match=limit):
                await ask(client)


# ------------------------------------------------------------------------------- small helpers


def cut_off(name: bytes | None, data: bytes) -> kit.Answer:
    """An engine that dies after its first event."""
    event = (b"" if name is None else b"event: " + name + b"\n") + b"data: " + data + b"\n\n"

    async def answer(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        writer.write(kit.SSE_HEAD + kit.chunk(event))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    return answer


async def ask(client: AsyncOpenAI | AsyncAnthropic) -> None:
    """One call that is not streamed."""
    if isinstance(client, AsyncOpenAI):
        await client.chat.completions.create(model="m", messages=MESSAGES)
    else:
        await client.messages.create(model="m", max_tokens=9, messages=MESSAGES)


async def all_of(stream: AsyncIterable[object], got: list[Any]) -> None:
    """Read to its end, or to what it raises."""
    async for event in stream:
        got.append(event)
