"""The stub's Messages and Responses routes, in the order and with the names of vLLM's events."""

import json

from tests.unit.test_engine_stub import running

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


async def test_messages_whole_streamed_and_counted():
    async with running() as engine:
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


async def test_an_unknown_model_is_told_in_the_routes_own_shape():
    async with running() as engine:
        body = {"model": "x", "max_tokens": 3, "messages": [PROMPT]}
        async with engine.http.post("/v1/messages", json=body) as answer:
            assert (answer.status, (await answer.json())["type"]) == (404, "error")
        async with engine.http.post("/v1/responses", json={"model": "x", "input": "a"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, 404)


async def test_responses_whole_and_streamed():
    async with running() as engine:
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


async def test_what_a_request_must_have_is_named():
    body = {"model": "m", "messages": [PROMPT]}
    async with running() as engine, engine.http.post("/v1/messages", json=body) as answer:
        assert answer.status == 400
        assert "max_tokens" in await answer.text()
