"""How many tokens a call took, read from its answer as it passes. Pure.

Rules this file keeps:
- the answer is looked at, never changed (but by a `Strip`) or copied whole: only its end is kept;
- the same bytes give the same result however they were cut into pieces;
- a piece costs next to nothing: events are counted many at a time, when pieces are forgotten, or at
  the end where the engine did not say how many tokens there were; JSON is decoded once, after the
  end, and no more of it than what follows the last `usage`;
- what the engine did not say is estimated and said to be so, or None: never a guess as a fact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.call.stream_usage import END, USAGE, Strip

# After `usage` there are few bytes, but for logprobs of the prompt or its text where asked for.
JSON_BYTES = 256 * 1024
STREAM_BYTES = 16 * 1024
_TRIES = 8  # of "usage" in what is kept, from the last one on
_EVENTS_AFTER = 1  # events after an answer's final usage: Anthropic's message_stop

# The beginning of an event that holds an object. A line break is escaped within JSON, so that no
# text of a model looks like one.
_MARK = b"\ndata: {"
_CARRY = len(_MARK) - 1
# How a stream of events begins: data, event, id, retry, or a comment.
_EVENT_STARTS = frozenset(b"deir:")
# Events before the one that has the first token, by path.
_PREAMBLE = {
    "/v1/chat/completions": 1,  # the role
    "/v1/messages": 2,  # message_start, content_block_start
    "/v1/responses": 4,  # created, in_progress, output_item.added, content_part.added
}

_Count = Annotated[int, Meta(ge=0)] | None


class TokenUsage(NamedTuple):
    """What one answer took.

    `exact`: the engine said so. Else `completion_tokens` is the number of a stream's events with
    content: one token each in vLLM by default, fewer than there are with speculative decoding or
    `stream_interval`. None: unknown. `streamed`: it came as a stream of events.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    exact: bool
    streamed: bool


NOTHING = TokenUsage(None, None, False, False)


class _Tokens(Struct):
    """OpenAI's names, and those of its responses and of Anthropic."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    # Anthropic's: `input_tokens` is without them. OpenAI has other names, for what is within.
    cache_creation_input_tokens: _Count = None
    cache_read_input_tokens: _Count = None


class _Outer(Struct):
    usage: _Tokens | None = None


class _Nested(Struct):
    x: _Outer


_outer: Callable[[bytes], _Outer] = outside.reader(_Outer)
_nested: Callable[[bytes], _Nested] = outside.reader(_Nested)


class Meter:
    """Watches one answer: `feed` it the body, piece by piece, then ask for `usage`.

    What `feed` returns is for the caller: the same bytes, unless `strip` takes the usage out of a
    stream.
    """

    __slots__ = ("_carry", "_events", "_gone", "_kept", "_limit", "_most", "_pieces", "_strip")

    def __init__(self, strip: Strip | None = None) -> None:
        self._strip = strip
        self._pieces: list[bytes] = []  # the end of the body
        self._kept = 0  # bytes in them
        self._gone = 0  # bytes before them
        self._limit = 0  # bytes of the end that are needed; 0: no byte has come
        self._most = 0  # bytes kept before some are forgotten
        self._carry: bytes | None = None  # the end of what is forgotten, in a stream
        self._events = 0  # in what is forgotten

    @property
    def size(self) -> int:
        """The body's bytes so far."""
        return self._gone + self._kept

    def feed(self, data: bytes) -> bytes:
        """The next piece of the body, and what the caller gets."""
        self._pieces.append(data)
        self._kept += len(data)
        if self._kept > self._most:
            self._make_room(data)
        strip = self._strip
        if strip is None:
            return data
        # Nearly every piece is whole events without usage, and a call for it would be dear. From
        # the right, CPython 3.11 finds that it is not there in less than half the time.
        if strip.within or data.rfind(USAGE) >= 0 or not data.endswith(END):
            return strip.feed(data)
        return data

    def rest(self) -> bytes:
        """What the caller gets when no more will come."""
        return b"" if self._strip is None else self._strip.rest()

    def usage(self, path: str) -> TokenUsage:
        """What the answer, from the engine's `path`, says so far."""
        body = self._all()
        end = body[-self._limit :]
        if self._carry is None:
            prompt, completion = _last(end, stream=False)
            return (
                NOTHING if prompt is None else TokenUsage(prompt, completion, True, streamed=False)
            )
        prompt, completion = _last(end[_final(end) :], stream=True)
        if prompt is not None:
            return TokenUsage(prompt, completion, True, streamed=True)
        events = self._events + (self._carry + body).count(_MARK)
        completion = max(0, events - _PREAMBLE.get(path.partition("?")[0], 0))
        return TokenUsage(_last(end, stream=True)[0], completion, False, streamed=True)

    def told(self) -> bytes:
        """The end of what the caller was given, as much as is kept."""
        end = self._all()[-self._limit :]
        return end if self._strip is None else self._strip.told(end)

    def _make_room(self, data: bytes) -> None:
        """Forget pieces that lie before what is needed; `data` is the last, or the first of all."""
        if self._limit:
            self._forget()
        elif data[0] in _EVENT_STARTS:
            self._limit, self._carry = STREAM_BYTES, b"\n"
        else:
            self._limit, self._strip = JSON_BYTES, None
        self._most = 2 * self._limit

    def _forget(self) -> None:
        count, size = 0, 0
        for piece in self._pieces:
            if self._kept - size - len(piece) < self._limit:
                break
            size += len(piece)
            count += 1
        if self._carry is not None:
            window = self._carry + b"".join(self._pieces[:count])
            self._events += window.count(_MARK)
            self._carry = window[-_CARRY:]
        del self._pieces[:count]
        self._kept -= size
        self._gone += size

    def _all(self) -> bytes:
        """As much of it as is kept."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


def _final(end: bytes) -> int:
    """Where in `end`, the end of a stream, the events begin that may tell its final usage."""
    at = len(end)
    for _ in range(_EVENTS_AFTER + 1):
        at = max(0, end.rfind(_MARK, 0, at))
    return at


def _last(end: bytes, *, stream: bool) -> tuple[int | None, int]:
    """Prompt and completion tokens as the last usage in `end`, the end of an answer, has them. An
    embedding has a prompt only.

    In `..."usage":{...}, ...}` the rest of the object, with a brace before it, is JSON exactly if
    `usage` is a field of the outermost object. Text cannot pass for it: its quotes are escaped.
    """
    at = len(end)
    for _ in range(_TRIES):
        at = end.rfind(USAGE, 0, at)
        if at < 0:
            break
        stop = end.find(b"\n", at) if stream else len(end)
        if stop < 0:  # cut off within the event
            continue
        rest = end[at:stop]
        tokens = _decoded(rest)
        if tokens is None and stream:
            tokens = _decoded_nested(rest)
        if tokens is not None:
            if tokens.prompt_tokens is not None:
                return tokens.prompt_tokens, tokens.completion_tokens or 0
            if tokens.input_tokens is not None:
                cached = tokens.cache_creation_input_tokens or 0
                cached += tokens.cache_read_input_tokens or 0
                return tokens.input_tokens + cached, tokens.output_tokens or 0
    return None, 0


def _decoded(rest: bytes) -> _Tokens | None:
    try:
        return _outer(b"{" + rest).usage
    except OutsideError:
        return None


def _decoded_nested(rest: bytes) -> _Tokens | None:
    """Within an object of the event: a response that was completed, a message that begins."""
    try:
        return _nested(b'{"x":{' + rest).x.usage
    except OutsideError:
        return None
