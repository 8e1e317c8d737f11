"""How many tokens a call took, read from its answer as it passes. Pure.

Rules this file keeps:
- the answer is looked at, never changed (but by a `Strip`) or copied whole: only its end is kept;
- the same bytes give the same result however they were cut into pieces;
- a piece costs a count of one mark; JSON is decoded once, after the end, and no more of it than
  what stands behind the last `usage`;
- what the engine did not say is estimated and said to be so, or None: never a guess as a fact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from runtime import outside
from runtime.outside import OutsideError
from runtime.router.stream_usage import END, USAGE, Strip

# Behind `usage` there are few bytes, but for logprobs of the prompt or its text where asked for.
JSON_BYTES = 256 * 1024
STREAM_BYTES = 16 * 1024
_TRIES = 8  # of "usage" in what is kept, from the last one on
_BEHIND = 1  # events behind an answer's final usage: Anthropic's message_stop

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


class Usage(NamedTuple):
    """What one answer took.

    `exact`: the engine said so. Else `completion_tokens` is the number of a stream's events with
    content: one token each in vLLM by default, fewer than there are with speculative decoding or
    `stream_interval`. None: unknown. `events` are a stream's, 0 for any other answer.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    exact: bool
    events: int


NOTHING = Usage(None, None, False, 0)


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

    `size` is the body's bytes so far. What `feed` returns is for the caller: the same bytes, unless
    `strip` takes the usage out of a stream.
    """

    __slots__ = ("_carry", "_events", "_kept", "_limit", "_pieces", "_strip", "size")

    def __init__(self, strip: Strip | None = None) -> None:
        self.size = 0
        self._strip = strip
        self._pieces: list[bytes] = []  # the end of the body
        self._kept = 0  # bytes in them
        self._limit = 0  # 0: no byte has come
        self._carry: bytes | None = None  # the end of the last piece, in a stream
        self._events = 0

    def feed(self, data: bytes) -> bytes:
        """The next piece of the body, and what the caller gets."""
        if not self._limit:
            if not data:
                return data
            if data[0] in _EVENT_STARTS:
                self._limit, self._carry = STREAM_BYTES, b"\n"
            else:
                self._limit = JSON_BYTES
        size = len(data)
        self.size += size
        self._kept += size
        self._pieces.append(data)
        if self._kept > 2 * self._limit:
            self._forget()
        if self._carry is not None:
            window = self._carry + data
            self._events += window.count(_MARK)
            self._carry = window[-_CARRY:]
            strip = self._strip
            # Nearly every piece is whole events without usage: a call for it would be dear.
            if strip is not None and (strip.within or USAGE in data or not data.endswith(END)):
                return strip.feed(data)
        return data

    def rest(self) -> bytes:
        """What the caller gets when no more will come."""
        return b"" if self._strip is None else self._strip.rest()

    def usage(self, path: str) -> Usage:
        """What the answer, from the engine's `path`, says so far."""
        end = self._end()
        if self._carry is None:
            prompt, completion, _ = _last(end, stream=False)
            return NOTHING if prompt is None else Usage(prompt, completion, True, 0)
        prompt, completion, at = _last(end, stream=True)
        if prompt is not None and end.count(_MARK, at) <= _BEHIND:
            return Usage(prompt, completion, True, self._events)
        completion = max(0, self._events - _PREAMBLE.get(path.partition("?")[0], 0))
        return Usage(prompt, completion, False, self._events)

    def _forget(self) -> None:
        """All pieces that lie before what is kept."""
        gone = 0
        for piece in self._pieces:
            if self._kept - len(piece) < self._limit:
                break
            self._kept -= len(piece)
            gone += 1
        del self._pieces[:gone]

    def told(self) -> bytes:
        """The end of what the caller was given, as much as is kept."""
        end = self._end()
        return end if self._strip is None else self._strip.told(end)

    def _end(self) -> bytes:
        """The body's end, as much as is kept."""
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return body[-self._limit :] if len(body) > self._limit else body


def _last(end: bytes, *, stream: bool) -> tuple[int | None, int, int]:
    """Prompt and completion tokens as the last usage in `end`, the end of an answer, has them, and
    where it stands. An embedding has a prompt only.

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
                return tokens.prompt_tokens, tokens.completion_tokens or 0, at
            if tokens.input_tokens is not None:
                cached = tokens.cache_creation_input_tokens or 0
                cached += tokens.cache_read_input_tokens or 0
                return tokens.input_tokens + cached, tokens.output_tokens or 0, at
    return None, 0, 0


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
