"""The stub's OpenAI routes: bodies checked as vLLM checks them, answers made of the prompt's words.

One word is one token. A request gets exactly its `max_tokens`, one every `token_s`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import os
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from runtime import outside
from runtime.answers import json_answer
from runtime.engine import guard
from runtime.engine.adapter_index import RETRY_AFTER_S, NotYet
from runtime.engine.guard import Activity
from runtime.engine.stub import media
from runtime.engine.stub.adapters import StubAdapters
from runtime.engine.stub.engine import StubArgs
from runtime.outside import OutsideError

MEDIA_DOMAINS = web.AppKey("media_domains", tuple[str, ...])
FINGERPRINT = "stoker-stub"
MAX_MODEL_LEN = 4096
EMBEDDING_SIZE = 8

Tokens = Annotated[int, Meta(ge=1)]
_NOT_JSON = "Unsupported Media Type: Only 'application/json' is allowed"
T = TypeVar("T")


class Message(Struct):
    """One chat message; parts that are not text count for nothing."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return " ".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class StreamOptions(Struct):
    """`stream_options` of a request: whether usage comes at the end, and with each chunk."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Generation(Struct, kw_only=True):
    model: str
    max_tokens: Tokens | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ChatRequest(_Generation, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None


class CompletionRequest(_Generation, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int]


class EmbeddingRequest(Struct, kw_only=True):
    """The body of /v1/embeddings."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str = "float"


class UnloadRequest(Struct, kw_only=True):
    """The body of /v1/unload_lora_adapter."""

    lora_name: str


class TokenizeRequest(Struct, kw_only=True):
    """The body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = []


class Answer(Struct, frozen=True, kw_only=True):
    """What one request will be told, before the clock runs."""

    chat: bool
    id: str
    model: str
    created: int
    words: tuple[str, ...]
    prompt_tokens: int
    fingerprint: str = FINGERPRINT
    finish: str = "length"
    response_id: str | None = None  # that the caller chose, of a response

    def usage(self, words: int | None = None) -> dict[str, int]:
        """Of the whole answer, or of so many words of it."""
        count = len(self.words) if words is None else words
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": self.prompt_tokens + count,
        }

    def body(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        """The JSON object that carries `choices`; `chunk`: one event of a stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": f"{kind}.chunk" if self.chat and chunk else kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        """The one choice of a whole answer."""
        if not self.chat:
            return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}

    def delta(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        """The one choice of a chunk."""
        if not self.chat:
            return self.choice(text, finish)
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


class Api:
    """The routes, and what they have counted."""

    def __init__(self, names: tuple[str, ...], args: StubArgs, adapters: StubAdapters) -> None:
        self._names = names
        self._adapters = adapters
        self._args = args
        self._started = int(time.time())
        self._ids, self._boot = itertools.count(), os.urandom(4).hex()
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self.gibberish = False  # its weights are not the model's any more, and it can't know

    def rename(self, names: tuple[str, ...]) -> None:
        """Serve these names, and no others, from now on."""
        self._names, self._started = names, int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """The paths that the stub serves, each with its handler."""
        return [
            web.get("/v1/models", self._models),
            web.post("/v1/chat/completions", checked(ChatRequest, self._chat)),
            web.post("/v1/completions", checked(CompletionRequest, self._completion)),
            web.post("/v1/embeddings", checked(EmbeddingRequest, self._embeddings)),
            web.post("/tokenize", checked(TokenizeRequest, self._tokenize)),
            web.post("/v1/unload_lora_adapter", checked(UnloadRequest, self._unload)),
        ]

    def metrics(self, activity: Activity, sleep_level: int) -> str:
        """Prometheus text under vLLM's names."""
        fit = self._args.kv_requests
        running = min(activity.in_flight, fit)
        values = {
            "vllm:num_requests_running": ("gauge", running),
            "vllm:num_requests_waiting": ("gauge", activity.in_flight - running),
            "vllm:kv_cache_usage_perc": ("gauge", running / fit),
            "vllm:engine_sleep_state": ("gauge", sleep_level),
            "vllm:request_success_total": ("counter", activity.served),
            "vllm:prompt_tokens_total": ("counter", self._prompt_tokens),
            "vllm:generation_tokens_total": ("counter", self._generated_tokens),
        }
        return "".join(
            f'# TYPE {name} {kind}\n{name}{{model_name="{self._names[0]}",engine="stub"}} {value}\n'
            for name, (kind, value) in values.items()
        )

    async def _models(self, request: web.Request) -> web.Response:
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": FINGERPRINT,
                "max_model_len": MAX_MODEL_LEN,
            }
            for name in self._names
        ]
        adapters = [
            {"id": name, "object": "model", "root": path, "parent": self._names[0]}
            for name, path in self._adapters.loaded.items()
        ]
        return json_answer({"object": "list", "data": [*cards, *adapters]})

    async def _chat(self, request: web.Request, body: ChatRequest) -> web.StreamResponse:
        limit = body.max_completion_tokens or body.max_tokens
        users = [m.text() for m in body.messages if m.role == "user"]
        spoken = users[-1] if users else body.messages[-1].text()
        prompt_tokens = sum(len(m.text().split()) for m in body.messages)
        return await self._generate(request, body, True, limit, spoken, prompt_tokens)

    async def _completion(
        self, request: web.Request, body: CompletionRequest
    ) -> web.StreamResponse:
        prompt = body.prompt
        spoken = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        count = len(spoken.split())
        return await self._generate(request, body, False, body.max_tokens, spoken, count)

    async def _generate(
        self,
        request: web.Request,
        body: _Generation,
        chat: bool,
        limit: int | None,
        spoken: str,
        prompt_tokens: int,
    ) -> web.StreamResponse:
        if refusal := await self.unknown_model(body.model):
            return refusal
        if body.stream_options and not body.stream:
            words = "Stream options can only be defined when `stream=True`."
            return error_response(400, words, param="stream_options")
        answer = self.compose(body.model, limit, spoken, prompt_tokens, chat)
        if body.stream:
            return await self._stream(request, answer, body.stream_options or StreamOptions())
        async for _ in self.paced(answer):
            pass
        whole = answer.body([answer.choice("".join(answer.words), answer.finish)])
        return json_answer({**whole, "usage": answer.usage()})

    def compose(
        self, model: str, limit: int | None, spoken: str, prompt_tokens: int, chat: bool
    ) -> Answer:
        """What is answered to a prompt that says `spoken`, in `limit` words; it is counted."""
        words = ["!"] if self.gibberish else spoken.split() or ["stub"]
        most = limit or self._args.max_tokens
        ends = self._args.says_once and len(words) <= most
        chosen = words if ends else itertools.islice(itertools.cycle(words), most)
        self._prompt_tokens += prompt_tokens
        return Answer(
            chat=chat,
            id=f"{'chatcmpl' if chat else 'cmpl'}-stub-{self._boot}-{next(self._ids)}",
            model=self._said(model),
            created=int(time.time()),
            words=tuple(word if i == 0 else f" {word}" for i, word in enumerate(chosen)),
            prompt_tokens=prompt_tokens,
            fingerprint=FINGERPRINT if model in self._names else f"{FINGERPRINT}+{model}",
            finish="stop" if ends else "length",
        )

    def _said(self, model: str) -> str:
        """The name that an answer bears: an adapter's own, else the first, as vLLM does."""
        return self._names[0] if model in self._names else model

    async def paced(self, answer: Answer) -> AsyncIterator[str]:
        """The answer's words, each when it is due."""
        await asyncio.sleep(self._args.ttft_s)
        for index, word in enumerate(answer.words):
            if index:
                await asyncio.sleep(self._args.token_s)
            self._generated_tokens += 1
            yield word

    async def _stream(
        self, request: web.Request, answer: Answer, options: StreamOptions
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        last = len(answer.words) - 1
        index = 0
        async for word in self.paced(answer):
            choice = answer.delta(word, answer.finish if index == last else None, index == 0)
            index += 1
            said = answer.body([choice], chunk=True)
            if options.include_usage and options.continuous_usage_stats:
                said["usage"] = answer.usage(index)
            await response.write(_event(said))
        if options.include_usage:
            await response.write(_event({**answer.body([], chunk=True), "usage": answer.usage()}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _embeddings(self, request: web.Request, body: EmbeddingRequest) -> web.StreamResponse:
        if refusal := await self.unknown_model(body.model):
            return refusal
        one = isinstance(body.input, str) or (body.input and isinstance(body.input[0], int))
        inputs = [body.input] if one else list(body.input)
        await asyncio.sleep(self._args.ttft_s)
        count = sum(len(str(text).split()) for text in inputs)
        self._prompt_tokens += count
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(text, body.encoding_format)}
            for i, text in enumerate(["!"] * len(inputs) if self.gibberish else inputs)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        model = self._said(body.model)
        return json_answer({"object": "list", "data": data, "model": model, "usage": usage})

    async def _tokenize(self, request: web.Request, body: TokenizeRequest) -> web.StreamResponse:
        text = body.prompt if body.prompt is not None else " ".join(m.text() for m in body.messages)
        ids = [zlib.crc32(word.encode()) % 50_000 for word in text.split()]
        return json_answer({"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids})

    async def _unload(self, request: web.Request, body: UnloadRequest) -> web.StreamResponse:
        name = body.lora_name
        if not self._adapters.unload(name):
            return error_response(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def unknown_model(self, model: str) -> web.Response | None:
        """The 404 for a model that is not served here; None: it is."""
        if model in self._names:
            return None
        try:
            if await self._adapters.load(model):
                return None
        except NotYet as error:
            late = error_response(503, str(error), "ServiceUnavailableError")
            late.headers["Retry-After"] = str(RETRY_AFTER_S)
            return late
        return error_response(404, f"The model `{model}` does not exist.", "NotFoundError", "model")


def error_response(
    status: int, message: str, kind: str = "BadRequestError", param: str | None = None
) -> web.Response:
    """An error in OpenAI's shape, as vLLM words them."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json_answer({"error": error}, status)


def checked(
    kind: type[T],
    handler: Callable[[web.Request, T], Any],
    shape: Callable[[web.Response], web.Response] = lambda refusal: refusal,
) -> Callable[[web.Request], Any]:
    """`handler` with the body decoded as `kind`; an invalid body, one of another Content-Type, or
    one that names what may not be fetched, is a 400. `shape`: the protocol's, of that refusal."""
    read: Callable[[bytes], T] = outside.reader(kind, "what this path takes")
    any_json: Callable[[bytes], Any] = outside.reader(Any)

    async def decoded(request: web.Request) -> web.StreamResponse:
        if not outside.is_json_type(request.headers.get("Content-Type", "")):
            return error_response(400, _NOT_JSON)
        try:
            raw = await request.read()
            body = read(raw)
            domains: tuple[str, ...] = request.app[MEDIA_DOMAINS]
            words = media.refusal(any_json(raw), domains) if b"url" in raw else None
        except OutsideError as error:
            return error_response(400, f"invalid request body: it {error}")
        if words:
            return shape(error_response(400, words))
        if words := guard.other_model(getattr(body, "model", None)):
            return shape(error_response(403, words, "PermissionDeniedError", "model"))
        response: web.StreamResponse = await handler(request, body)
        return response

    return decoded


def _event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _vector(text: object, encoding: str) -> list[float] | str:
    """Figures between -1 and 1 that depend on the text alone."""
    digest = hashlib.sha256(str(text).encode()).digest()
    values = [byte / 127.5 - 1 for byte in digest[:EMBEDDING_SIZE]]
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{EMBEDDING_SIZE}f", *values)).decode()
    return values
