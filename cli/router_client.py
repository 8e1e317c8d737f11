"""One question to a model through a router, as a stream of what happens."""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import click

from runtime import outside
from runtime.sockets import tcp_connector


@dataclass
class Answer:
    """What came back. Times are seconds since the question was sent."""

    text: str = ""
    first_token_s: float | None = None
    total_s: float = 0.0
    tokens: int | None = None  # as the engine counted them


class RouterError(click.ClickException):
    """The router refused, broke off, or could not be reached."""


async def post(url: str, path: str, body: dict[str, Any]) -> bytes:
    """The whole answer's JSON. Raises RouterError."""
    async with _session() as session:
        try:
            async with session.post(f"{url}{path}", json=body) as response:
                answer = await response.read()
                if response.status >= 400:
                    raise _refused(response.status, answer, path)
                return answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(url, error) from None


async def stream(
    url: str,
    path: str,
    body: dict[str, Any],
    on_text: Callable[[str], None],
    on_wait: Callable[[str], None],
) -> Answer:
    """Ask with `stream: true`; `on_text` gets each piece, `on_wait` why it is not there yet.

    Raises RouterError where the call is refused or the answer breaks off before its end.
    """
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    answer, began = Answer(), time.monotonic()
    async with _session() as session:
        try:
            async with session.post(f"{url}{path}", json=asked) as response:
                if response.status >= 400:
                    raise _refused(response.status, await response.read(), path)
                async for kind, text in _events(response.content):
                    if kind == "comment":
                        _note_wait(answer, text, on_wait)
                    else:
                        _take(answer, text, time.monotonic() - began, on_text)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(url, error) from None
    answer.total_s = time.monotonic() - began
    return answer


def _session() -> aiohttp.ClientSession:
    # A held call is silent for as long as its cold start takes, so only connecting is limited.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    key = os.environ.get("STOKER_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(timeout=timeout, headers=headers, connector=tcp_connector())


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str]]:
    """("comment" or "data", text) for each line of a server-sent event stream up to [DONE]."""
    async for raw in content:
        line = raw.decode(errors="replace").rstrip("\r\n")
        if line.startswith(":"):
            yield "comment", line[1:].strip()
        elif line.startswith("data:"):
            text = line.removeprefix("data:").strip()
            if text == "[DONE]":
                return
            yield "data", text
    raise RouterError("the answer broke off before its end; see `stoker decisions` for why")


def _note_wait(answer: Answer, text: str, on_wait: Callable[[str], None]) -> None:
    """A router's comment "waiting for M: why, 5s, about 40s left", without the seconds so far."""
    if text.startswith("waiting for "):
        on_wait(re.sub(r", \d+s(?=,|$)", "", text, count=1))


def _take(answer: Answer, data: str, at_s: float, on_text: Callable[[str], None]) -> None:
    try:
        event = outside.json_document(data.encode())
    except ValueError:
        raise RouterError(f"the answer holds a line that is not JSON: {data[:200]}") from None
    if event.get("error"):
        raise RouterError(_message(event) or data)
    if event.get("usage"):
        answer.tokens = event["usage"].get("completion_tokens")
    piece = "".join(_piece(choice) for choice in event.get("choices") or ())
    if piece:
        if answer.first_token_s is None:
            answer.first_token_s = at_s
        answer.text += piece
        on_text(piece)


def _piece(choice: dict[str, Any]) -> str:
    """The text of one choice of a chat or a completion chunk."""
    delta = choice.get("delta") or {}
    return delta.get("content") or choice.get("text") or ""


def _message(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else error


def _refused(status: int, answer: bytes, path: str) -> RouterError:
    try:
        message = _message(outside.json_document(answer))
    except ValueError:
        message = None
    if status == 404 and message in (None, "Not Found"):  # the engine's own: it has no such route
        return RouterError(
            f"the model's engine has no {path}: it does not generate text. A model that embeds is"
            " asked at /v1/embeddings, one that ranks at /v1/rerank or /v1/score"
        )
    said = message or f"status {status}: {answer[:300].decode(errors='replace')}"
    if status == 401:
        said += "; put a key into STOKER_API_KEY (`stoker key create TENANT` makes one)"
    return RouterError(said)


def _unreachable(url: str, error: Exception) -> RouterError:
    reason = str(error) or type(error).__name__
    return RouterError(f"no answer from the router at {url}: {reason}")


def ask_body(
    model: str, prompt: str, max_tokens: int | None, raw: bool
) -> tuple[str, dict[str, Any]]:
    """(path, body) of a chat, or with `raw` of a plain completion without a chat template."""
    body: dict[str, Any] = {"model": model}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if raw:
        return "/v1/completions", body | {"prompt": prompt}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
