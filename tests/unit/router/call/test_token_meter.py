"""The meter: tokens as the engines' real answers tell them, however they are cut up."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.router.call.token_meter import JSON_BYTES, NOTHING, STREAM_BYTES, Meter, TokenUsage

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
OPENAI = {
    "prompt_tokens": 7,
    "total_tokens": 19,
    "completion_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}
RESPONSES_USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 19,
}
SLY = 'she said "usage": {"prompt_tokens": 1} and\n\ndata: {"usage":{"prompt_tokens":1}}\n\n'


def read(pieces: Iterable[bytes], path: str = CHAT) -> TokenUsage:
    meter = Meter()
    for piece in pieces:
        meter.feed(piece)
    return meter.usage(path)


def event(value: object, name: str = "") -> bytes:
    prefix = f"event: {name}\n".encode() if name else b""
    return prefix + b"data: " + msgspec.json.encode(value) + b"\n\n"


def chat_answer(text: str = "hi") -> bytes:
    message = {"role": "assistant", "content": text, "tool_calls": []}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    return msgspec.json.encode(
        {"id": "c", "model": "m", "choices": choices, "usage": OPENAI, "prompt_logprobs": None}
    )


def chat_stream(*texts: str, usage: object = None, done: bool = True) -> bytes:
    def part(delta: object, **more: object) -> bytes:
        return event({"id": "c", "choices": [{"index": 0, "delta": delta}], **more})

    parts = [part({"role": "assistant", "content": ""}), *(part({"content": t}) for t in texts)]
    if usage is not None:
        parts.append(event({"id": "c", "choices": [], "usage": usage}))
    return b"".join(parts) + (b"data: [DONE]\n\n" if done else b"")


def messages_stream(*texts: str, end: bool = True) -> bytes:
    start = {"id": "m", "content": [], "usage": {"input_tokens": 5, "output_tokens": 0}}
    parts = [
        event({"type": "message_start", "message": start}, "message_start"),
        event({"type": "content_block_start", "index": 0}, "content_block_start"),
        *(
            event({"type": "content_block_delta", "delta": {"text": t}}, "content_block_delta")
            for t in texts
        ),
    ]
    if end:
        usage = {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 12}
        parts += [
            event({"type": "content_block_stop", "index": 0}, "content_block_stop"),
            event({"type": "message_delta", "delta": {}, "usage": usage}, "message_delta"),
            event({"type": "message_stop"}, "message_stop"),
        ]
    return b"".join(parts)


def responses_stream(text: str) -> bytes:
    whole = {"id": "r", "output": [{"text": text}], "usage": RESPONSES_USAGE, "user": None}
    names = ["created", "in_progress", "output_item.added", "content_part.added"]
    parts = [event({"type": f"response.{n}"}, f"response.{n}") for n in names]
    parts.append(event({"type": "response.output_text.delta", "delta": text}, "d"))
    last = {"response": whole, "sequence_number": 9, "type": "response.completed"}
    return b"".join([*parts, event(last, "response.completed")])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chat_answer(), TokenUsage(7, 12, True, False)),
        (chat_answer(SLY), TokenUsage(7, 12, True, False)),
        (b'{"choices":[{"text":"hi"}],"usage":{"prompt_tokens":2,"completion_tokens":3}}',
         TokenUsage(2, 3, True, False)),
        (b'{"usage": {"prompt_tokens": 2, "completion_tokens": 3}, "choices": []}\n',
         TokenUsage(2, 3, True, False)),
        (b'{"data":[{"embedding":[0.1,0.2]}],"usage":{"prompt_tokens":8,"total_tokens":8}}',
         TokenUsage(8, 0, True, False)),
        (msgspec.json.encode({"id": "r", "output": [], "usage": RESPONSES_USAGE, "user": "usage"}),
         TokenUsage(7, 12, True, False)),
        # Anthropic: what was cached is not within input_tokens
        (b'{"type":"message","content":[{"type":"tool_use","input":{"usage":{"input_tokens":1}}}],'
         b'"usage":{"input_tokens":3,"output_tokens":12,"cache_read_input_tokens":2,'
         b'"cache_creation_input_tokens":null}}', TokenUsage(5, 12, True, False)),
        # not at the outermost level, not a usage, or none at all
        (b'{"content":[{"input":{"usage":{"input_tokens":1}}}]}', NOTHING),
        (b'{"text":"x","usage":{"type":"duration","seconds":3}}', NOTHING),
        (b'{"usage":{"prompt_tokens":-1,"completion_tokens":3}}', NOTHING),
        (b'{"usage":{"prompt_tokens":"7"}}', NOTHING),
        (b'{"usage":null}', NOTHING),
        (b'{"count":7,"tokens":[1,2]}', NOTHING),
        (b'{"usage":{"prompt_tokens":7', NOTHING),
        (b"\x1f\x8b\x08 not JSON", NOTHING),
        (b"", NOTHING),
    ],
)  # fmt: skip
def test_a_whole_answer(body: bytes, expected: TokenUsage) -> None:
    assert read([body]) == expected


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, chat_stream("a", "b", usage=OPENAI), TokenUsage(7, 12, True, True)),
        (CHAT, chat_stream("a", SLY), TokenUsage(None, 2, False, True)),
        (CHAT, b": waiting\n\n" + chat_stream("a", "b", "c"), TokenUsage(None, 3, False, True)),
        (CHAT, chat_stream("a", done=False), TokenUsage(None, 1, False, True)),
        (CHAT, event({"error": {"message": "no"}}), TokenUsage(None, 0, False, True)),
        (COMPLETIONS, event({"choices": [{"text": "a"}], "usage": None}) * 9 + b"data: [DONE]\n\n",
         TokenUsage(None, 9, False, True)),
        # continuous_usage_stats, cut off: the last whole event counts
        (COMPLETIONS,
         event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})
         + event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
         + b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3',
         TokenUsage(7, 2, True, True)),
        (MESSAGES, messages_stream("a", "b"), TokenUsage(5, 12, True, True)),
        (MESSAGES, messages_stream("a", "b", "c", end=False), TokenUsage(5, 3, False, True)),
        (RESPONSES, responses_stream(SLY), TokenUsage(7, 12, True, True)),
        (RESPONSES, responses_stream("x" * 2 * STREAM_BYTES), TokenUsage(7, 12, True, True)),
        (CHAT, chat_stream(usage=OPENAI).replace(b"\n", b"\r\n"), TokenUsage(7, 12, True, True)),
    ],
)  # fmt: skip
def test_a_stream(path: str, body: bytes, expected: TokenUsage) -> None:
    assert read([body], path) == expected


BODIES = [
    (CHAT, chat_answer(SLY)),
    (CHAT, chat_stream("a", SLY, "b", usage=OPENAI)),
    (CHAT, chat_stream("a", "b", "c")),
    (MESSAGES, messages_stream("a", "b")),
    (MESSAGES, messages_stream("a", SLY, end=False)),
    (RESPONSES, responses_stream(SLY)),
    (CHAT, chat_stream(*["x" * 1000] * 40, usage=OPENAI)),
    (CHAT, b"x" * STREAM_BYTES),
    (CHAT, b": " + b"x" * STREAM_BYTES + chat_stream("a")),
]


@given(st.sampled_from(BODIES), st.data())
def test_how_an_answer_is_cut_makes_no_difference(
    answer: tuple[str, bytes], data: st.DataObject
) -> None:
    path, body = answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=40)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert read(pieces, path) == read([body], path)


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_byte_by_byte_makes_no_difference(path: str, body: bytes) -> None:
    pieces = [body[n : n + 1] for n in range(len(body))]
    assert read(pieces, path) == read([body], path)


def test_only_the_end_of_a_large_answer_is_kept() -> None:
    meter = Meter()
    meter.feed(b'{"data":[')
    for _ in range(1000):
        meter.feed(b"1," * 2048)
    meter.feed(b'1],"usage":{"prompt_tokens":8,"total_tokens":8}}')
    assert meter.usage("/v1/embeddings") == TokenUsage(8, 0, True, False)
    assert meter.size > 4_000_000
    assert sum(map(len, meter._pieces)) <= 2 * JSON_BYTES + 4096


def test_usage_before_what_is_kept_is_unknown() -> None:
    body = b'{"usage":{"prompt_tokens":8},"data":"' + b"x" * JSON_BYTES + b'"}'
    assert read([body]) == NOTHING
