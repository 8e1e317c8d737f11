"""OpenAI's own client against the router: what people will really point at it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from runtime.wire.routes import Endpoint, ModelRoute
from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT
from tests.kits.router_stack import Received, Stack


def piece(delta: dict) -> bytes:
    body = {
        "id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }  # fmt: skip
    return b"data: " + json.dumps(body).encode() + b"\n\n"


WORDS = ["Hel", "lo", " wörld"]


async def engine_like(received: Received, writer: asyncio.StreamWriter) -> None:
    """Answers in the shapes of vLLM's OpenAI server."""
    asked = received.json()
    if asked.get("stream"):
        pieces = [piece({"content": word}) for word in WORDS]
        await kit.sse(*pieces, b"data: [DONE]\n\n")(received, writer)
        return
    text = "".join(WORDS)
    answer = {
        "/v1/chat/completions": {
            "id": "c1", "object": "chat.completion", "created": 1, "model": asked["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": text}}
            ],
        },
        "/v1/completions": {
            "id": "c1", "object": "text_completion", "created": 1, "model": asked["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}],
        },
        "/v1/embeddings": {
            "object": "list", "model": asked["model"],
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        },
    }[received.target]  # fmt: skip
    await kit.unary(json.dumps(answer).encode())(received, writer)


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=stack.url + "/v1", api_key="sk-client", max_retries=0, timeout=20
    ) as made:
        yield made


MESSAGES: Any = [{"role": "user", "content": "hi"}]


async def test_chat_completions_embeddings(stack: Stack, client: AsyncOpenAI) -> None:
    engine = await stack.engine(engine_like)
    await stack.serve("m", engine, aliases=("org/m",))
    chat = await client.chat.completions.create(model="org/m", messages=MESSAGES)
    assert (chat.model, chat.choices[0].message.content) == ("org/m", "Hello wörld")
    completion = await client.completions.create(model="m", prompt="hi")
    assert completion.choices[0].text == "Hello wörld"
    embedding = await client.embeddings.create(model="m", input="hi", encoding_format="float")
    assert embedding.data[0].embedding == [0.5, 1.0]
    assert all("sk-client" not in str(received.headers) for received in engine.received)


async def test_a_replica_that_does_not_know_an_adapter_yet_is_no_404(stack: Stack) -> None:
    """It was started before its model had adapters: the table is ahead of it."""
    engine = await stack.engine(kit.unary(b'{"error":{}}', "404 Not Found"))
    await stack.serve("m", engine, adapters=("m:sql",))
    async with httpx.AsyncClient(base_url=stack.url) as http:
        late = await http.post("/v1/completions", json={"model": "m:sql", "prompt": "a"})
        lost = await http.post("/v1/completions", json={"model": "m", "prompt": "a"})
    assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
    assert late.json()["error"]["code"] == "adapter_not_ready"
    assert lost.status_code == 404, "the engine's own answers are not touched"
    assert len(engine.received) == 2


async def test_streaming_chat(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m", await stack.engine(engine_like))
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert [part.choices[0].delta.content async for part in stream] == WORDS


async def test_streaming_chat_of_a_cold_model_passes_over_the_comments(
    stack: Stack, client: AsyncOpenAI
) -> None:
    await stack.serve("m", warmth="cold", waiting_for="starting")
    call = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    stream = await call  # the headers are here although the model is not
    await kit.eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    await stack.serve("m", await stack.engine(engine_like))
    assert [part.choices[0].delta.content async for part in stream] == WORDS


async def test_an_error_event_is_raised(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m")
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    await stack.serve("m", refusal="no device has 80 GiB")
    with pytest.raises(openai.APIError, match="no device has 80 GiB"):
        async for _ in stream:
            pass


async def test_a_cold_model_is_waited_for(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m")
    call = asyncio.create_task(client.chat.completions.create(model="m", messages=MESSAGES))
    await kit.eventually(lambda: stack.scheduler.waiting() == 1, "not held")
    await stack.serve("m", await stack.engine(engine_like))
    assert (await call).choices[0].message.content == "Hello wörld"


async def test_models(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("m", warmth="cold", aliases=("org/m",))
    models: list[Any] = [model async for model in client.models.list()]
    listed, alias = models
    assert (alias.id, alias.max_model_len) == ("org/m", None)
    assert (listed.id, listed.owned_by, listed.warmth) == ("m", "stoker", "cold")
    assert (await client.models.retrieve("org/m")).id == "org/m"


async def test_errors(stack: Stack, client: AsyncOpenAI) -> None:
    await stack.serve("llama", refusal="needs 80 GiB")
    with pytest.raises(openai.NotFoundError, match="did you mean 'llama'") as caught:
        await client.chat.completions.create(model="lama", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("lama")
    with pytest.raises(openai.InternalServerError, match="needs 80 GiB") as refused:
        await client.chat.completions.create(model="llama", messages=MESSAGES)
    assert refused.value.status_code == 503


async def test_one_models_own_base_url(stack: Stack, client: AsyncOpenAI) -> None:
    engine = await stack.engine(engine_like)
    await stack.serve("m", engine, aliases=("org/m",))
    own = client.with_options(base_url=stack.url + "/models/org%2Fm/v1")
    chat = await own.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert chat.model == "org/m"
    assert [model.id async for model in own.models.list()] == ["m", "org/m"]


@contextlib.asynccontextmanager
async def stub_engine(name: str) -> AsyncIterator[Endpoint]:
    """Stoker's own stand-in engine, as an agent would start it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    args = ["--port", str(port), "--names", name, "--args", '{"start_s": 0.1}']
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runtime.engine.stub.server", *args,
        cwd=ROOT,
        env={**os.environ, "STOKER_ROUTE_KEY": kit.KEY, "STOKER_CONTROL_KEY": "control"},
    )  # fmt: skip
    base_url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{base_url}/health").status_code == 200
        return False

    try:
        await kit.eventually(healthy, "the stub engine did not start")
        yield Endpoint(replica_id="stub-1", base_url=base_url, key=kit.KEY)
    finally:
        process.terminate()
        await process.wait()


async def test_the_stub_engine_behind_the_router(stack: Stack, client: AsyncOpenAI) -> None:
    async with stub_engine("m") as endpoint:
        await stack.serve("m")
        call = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        stream = await call
        await stack.scheduler.publish(ModelRoute(name="m", warmth="hot", endpoints=(endpoint,)))
        streamed = "".join([part.choices[0].delta.content or "" async for part in stream])
        chat = await client.chat.completions.create(model="m", messages=MESSAGES)
        assert chat.choices[0].message.content == streamed != ""
        assert (await client.completions.create(model="m", prompt="one two")).choices[0].text
        assert (await client.embeddings.create(model="m", input="one")).data[0].embedding
