"""The stub's Messages and Responses routes, in the order and with the names of vLLM's events."""

import json

import pytest

PROMPT = {"role": "user", "content": "alpha beta"}


async def events(engine, path, body):
    async with engine.http.post(path, json={**body, "stream": True}) as answer:
        assert answer.status == 200
        text = await answer.text()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


async def test_messages_whole_streamed_and_counted(engine):
    body = {"model": "m", "max_tokens": 3, "messages": [PROMPT]}
    async with engine.http.post("/v1/messages", json=body) as answer:
        whole = await answer.json()
    assert whole["content"] == [{"type": "text", "text": "alpha beta alpha"}]
    assert whole["usage"] == {"input_tokens": 2, "output_tokens": 3}
    assert whole["stop_reason"] == "max_tokens"
    streamed = await events(engine, "/v1/messages", body)
    assert [e["type"] for e in streamed] == [
        "message_start", "content_block_start", *["content_block_delta"] * 3,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    text = "".join(e["delta"]["text"] for e in streamed if "text" in e.get("delta", {}))
    assert text == "alpha beta alpha"
    counted = {"model": "m", "messages": [PROMPT]}
    async with engine.http.post("/v1/messages/count_tokens", json=counted) as answer:
        assert await answer.json() == {"input_tokens": 2}


async def test_an_unknown_model_is_told_in_the_routes_own_shape(engine):
    body = {"model": "x", "max_tokens": 3, "messages": [PROMPT]}
    async with engine.http.post("/v1/messages", json=body) as answer:
        assert (answer.status, (await answer.json())["type"]) == (404, "error")
    async with engine.http.post("/v1/responses", json={"model": "x", "input": "a"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, 404)


async def test_responses_whole_and_streamed(engine):
    body = {"model": "m", "input": [PROMPT], "max_output_tokens": 2}
    async with engine.http.post("/v1/responses", json=body) as answer:
        whole = await answer.json()
    assert whole["output"][0]["content"][0]["text"] == "alpha beta"
    assert whole["usage"]["total_tokens"] == 4
    streamed = await events(engine, "/v1/responses", {**body, "input": "alpha beta"})
    assert [e["type"].removeprefix("response.") for e in streamed] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in streamed] == list(range(10))
    assert streamed[-1]["response"]["output"] == [streamed[-2]["item"]]


async def test_what_a_request_must_have_is_named(engine):
    body = {"model": "m", "messages": [PROMPT]}
    async with engine.http.post("/v1/messages", json=body) as answer:
        assert answer.status == 400
        assert "max_tokens" in await answer.text()


def chat(part):
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}


def messages(part):
    return "/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [part]}]}


def responses(part):
    return "/v1/responses", {"input": [{"role": "user", "content": [part]}]}


def parts(url):
    yield chat({"type": "image_url", "image_url": {"url": url}})
    yield chat({"type": "video_url", "video_url": {"url": url}})
    yield chat({"type": "audio_url", "audio_url": {"url": url}})
    yield chat({"type": "image_url", "image_url": url})
    yield messages({"type": "image", "source": {"type": "url", "url": url}})
    yield responses({"type": "input_image", "image_url": url})
    yield responses({"type": "input_file", "file_url": url})


async def statuses(engine, url):
    found = []
    for path, body in parts(url):
        async with engine.http.post(path, json={"model": "m", **body}) as answer:
            found.append((answer.status, await answer.text()))
    return found


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:8500/v1/kv/?recurse",
        "https://example.com/a.png", "HTTP://LOCALHOST/", "http://none/", "file:///etc/passwd",
        "FILE:///etc/passwd", "gopher://127.0.0.1/", "/etc/passwd", "http://[::1]/", "http://[",
        "http://img.example.com@127.0.0.1/", "http://127.0.0.1#img.example.com",
    ],
)  # fmt: skip
async def test_no_url_is_fetched_unless_its_host_was_allowed(engine, url):
    for status, text in await statuses(engine, url):
        assert status == 400, text
    anthropic = (await statuses(engine, url))[4][1]
    assert json.loads(anthropic)["type"] == "error"


async def test_a_data_url_needs_no_leave(engine):
    assert {s for s, _ in await statuses(engine, "data:image/png;base64,AAAA")} == {200}
