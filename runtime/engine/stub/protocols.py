"""The stub's routes of the two other protocols that vLLM speaks: Anthropic's Messages and OpenAI's
Responses. The answers are those of `api.py`; here they get their protocol's shape.

Rule this file keeps: the events of a stream come in the order and with the names of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from runtime.answers import json_answer
from runtime.engine.stub.api import (
    Answer,
    Api,
    Message,
    Tokens,
    checked,
    error_response,
)

STORE_ENV = "VLLM_ENABLE_RESPONSES_API_STORE"  # vLLM keeps responses where it is 1
_STOPS = {"length": "max_tokens", "stop": "end_turn"}  # Anthropic's words for OpenAI's
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}


class MessagesRequest(Struct, kw_only=True):
    """The fields of `POST /v1/messages` that the stub looks at."""

    model: str
    max_tokens: Tokens
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = False


class CountRequest(Struct, kw_only=True):
    """The body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]


class ResponsesRequest(Struct, kw_only=True):
    """The fields of `POST /v1/responses` that the stub looks at."""

    model: str
    input: str | list[dict[str, Any]]
    max_output_tokens: Tokens | None = None
    stream: bool | None = False
    store: bool | None = True
    background: bool | None = False
    previous_response_id: str | None = None
    request_id: str | None = None

    def spoken(self) -> str:
        """The words of the last message of the input."""
        if isinstance(self.input, str):
            return self.input
        last = self.input[-1] if self.input else {}
        content = last.get("content", "")
        if isinstance(content, list):
            return " ".join(str(part.get("text", "")) for part in content)
        return str(content)


class Protocols:
    """The routes over one `Api`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._stores = os.environ.get(STORE_ENV, "0") == "1"
        self._stored: dict[str, dict[str, Any]] = {}  # as in vLLM, none is ever dropped
        self._tasks: dict[str, asyncio.Task[None]] = {}  # in the background

    def routes(self) -> list[web.RouteDef]:
        """What to add to the server."""
        return [
            web.post("/v1/messages", checked(MessagesRequest, self._messages, _anthropic)),
            web.post("/v1/messages/count_tokens", checked(CountRequest, self._count, _anthropic)),
            web.post("/v1/responses", checked(ResponsesRequest, self._responses)),
            web.get("/v1/responses/{id}", self._retrieve),
            web.post("/v1/responses/{id}/cancel", self._cancel),
        ]

    async def _messages(self, request: web.Request, body: MessagesRequest) -> web.StreamResponse:
        if refusal := await self._api.unknown_model(body.model):
            return _anthropic(refusal)
        spoken, count = body.messages[-1].text(), _count(body.messages)
        answer = self._api.compose(body.model, body.max_tokens, spoken, count, True)
        if body.stream:
            return await _stream(request, _message_events(answer, self._api.paced(answer)))
        async for _ in self._api.paced(answer):
            pass
        return json_answer(_message(answer, "".join(answer.words), _STOPS[answer.finish]))

    async def _count(self, request: web.Request, body: CountRequest) -> web.StreamResponse:
        if refusal := await self._api.unknown_model(body.model):
            return _anthropic(refusal)
        return json_answer({"input_tokens": _count(body.messages)})

    async def _responses(self, request: web.Request, body: ResponsesRequest) -> web.StreamResponse:
        if refusal := await self._api.unknown_model(body.model):
            return refusal
        if body.background and body.store and not self._stores:
            words = f"This vLLM engine does not support `store=True`; set `{STORE_ENV}=1`."
            return error_response(400, words, "invalid_request_error", "background")
        if (before := body.previous_response_id) is not None and before not in self._stored:
            return _no_response(before)
        spoken = body.spoken()
        limit, count = body.max_output_tokens, len(spoken.split())
        answer = self._api.compose(body.model, limit, spoken, count, True)
        answer = msgspec.structs.replace(answer, response_id=body.request_id)
        if body.background and self._stores:
            return json_answer(self._begin(answer))
        if body.stream:
            return await _stream(request, _response_events(answer, self._api.paced(answer)))
        async for _ in self._api.paced(answer):
            pass
        whole = _response(answer, "completed", "".join(answer.words))
        if self._stores and body.store:
            self._stored[whole["id"]] = whole
        return json_answer(whole)

    def _begin(self, answer: Answer) -> dict[str, Any]:
        """Answer in the background."""
        queued = self._stored[_id(answer)] = _response(answer, "queued")

        async def work() -> None:
            async for _ in self._api.paced(answer):
                pass
            if queued["status"] == "queued":
                queued.update(_response(answer, "completed", "".join(answer.words)))

        self._tasks[queued["id"]] = asyncio.create_task(work())
        return queued

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        found = self._stored.get(request.match_info["id"])
        return _no_response(request.match_info["id"]) if found is None else json_answer(found)

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        found = self._stored.get(request.match_info["id"])
        if found is None:
            return _no_response(request.match_info["id"])
        if found["status"] not in ("queued", "in_progress"):
            words = "Cannot cancel a synchronous response."
            return error_response(400, words, "invalid_request_error", "response_id")
        found["status"] = "cancelled"
        self._tasks[found["id"]].cancel()
        return json_answer(found)


# ------------------------------------------------------------------------------------ Messages


def _message(answer: Answer, text: str, stop: str | None) -> dict[str, Any]:
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.words)}
    return {
        "id": answer.id,
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": text}] if text else [],
        "model": answer.model,
        "stop_reason": stop,
        "usage": usage if stop else {**usage, "output_tokens": 0},
    }


async def _message_events(
    answer: Answer, words: AsyncIterator[str]
) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "message_start", "message": _message(answer, "", None)}
    block = {"type": "text", "text": ""}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    async for word in words:
        delta = {"type": "text_delta", "text": word}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    stop = _STOPS[answer.finish]
    usage = _message(answer, "", stop)["usage"]
    yield {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}
    yield {"type": "message_stop"}


def _anthropic(refusal: web.Response) -> web.Response:
    """An error of the stub's in Anthropic's shape, as vLLM gives it on these routes."""
    assert isinstance(refusal.body, bytes)
    error = msgspec.json.decode(refusal.body)["error"]
    shown = {"type": error["type"], "message": error["message"]}
    return json_answer({"type": "error", "error": shown}, refusal.status)


def _count(messages: list[Message]) -> int:
    return sum(len(message.text().split()) for message in messages)


# ------------------------------------------------------------------------------------ Responses


def _response(answer: Answer, status: str, text: str | None = None) -> dict[str, Any]:
    """The response object; `text` is there once it is completed."""
    done = text is not None
    return {
        "id": _id(answer),
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": answer.model,
        "output": [_item(answer, "completed", text)] if text is not None else [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": None,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": _response_usage(answer) if done else None,
    }


def _id(answer: Answer) -> str:
    return answer.response_id or f"resp_{answer.id}"


def _no_response(response_id: str) -> web.Response:
    words = f"Response with id '{response_id}' not found."
    return error_response(404, words, "invalid_request_error", "response_id")


def _response_usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _item(answer: Answer, status: str, text: str | None) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _response_events(
    answer: Answer, words: AsyncIterator[str]
) -> AsyncIterator[dict[str, Any]]:
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}

    whole = "".join(answer.words)
    where: dict[str, Any] = {"output_index": 0, "item_id": f"msg_{answer.id}", "content_index": 0}
    yield event("created", response=_response(answer, "in_progress"))
    yield event("in_progress", response=_response(answer, "in_progress"))
    yield event("output_item.added", output_index=0, item=_item(answer, "in_progress", None))
    yield event("content_part.added", part=_part(""), **where)
    async for word in words:
        yield event("output_text.delta", delta=word, logprobs=[], **where)
    yield event("output_text.done", text=whole, logprobs=[], **where)
    yield event("content_part.done", part=_part(whole), **where)
    yield event("output_item.done", output_index=0, item=_item(answer, "completed", whole))
    yield event("completed", response=_response(answer, "completed", whole))


async def _stream(
    request: web.Request, events: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    """Named server-sent events, each as it comes; neither protocol ends with [DONE]."""
    response = web.StreamResponse(headers=SSE)
    await response.prepare(request)
    async for event in events:
        data = msgspec.json.encode(event)
        await response.write(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data))
    await response.write_eof()
    return response
