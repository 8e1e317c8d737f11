"""What a request's prompt is worth to the router: about how many tokens, and how it begins. Pure.

Rules this file keeps:
- nothing is parsed that `read_head` has not read: a key is the checksum of the body's raw bytes;
- what a caller writes only ever changes which replica it gets: hints of the wrong type are no
  hints, and two prompts of one checksum merely share a replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

from runtime.router.call.body import Head
from runtime.router.call.token_meter import TokenUsage

BYTES_PER_TOKEN = 4
ANSWER_TOKENS = 256  # where the caller sets no limit
ANSWER_TOKENS_PER_S = 50  # of an answer of which nothing was heard
MEDIA_TOKENS = 1500  # a picture of a megapixel or two, or a minute of sound
MEDIA_BYTES = 8 * 1024  # less is counted as text
_MEDIA = (b";base64,", b'"data":"', b'"data": "')  # before what is written in base64
MOST_TOKENS = 1_000_000  # a limit above this says nothing of the answer
FIRST_CUT_BYTES = 1024  # about 256 tokens: less is read again in some 25 ms
LAST_CUT_BYTES = 128 * 1024
SESSION_HEADER = b"x-session-id"
# Where a prompt begins in the body, by the engine's request target; other targets have no prompt
# that an engine would cache. Inside of a JSON string the quotes would be escaped.
_FIELDS = {
    "/v1/chat/completions": b'"messages"',
    "/v1/completions": b'"prompt"',
    "/v1/messages": b'"messages"',
    "/v1/responses": b'"input"',
}


def prompt_tokens(body: bytes) -> int:
    """About how many tokens an engine reads of a body: a picture, a recording or a form's file is
    some MEDIA_TOKENS, however many bytes it has."""
    size = len(body)
    if size < MEDIA_BYTES:
        return size // BYTES_PER_TOKEN
    if body.startswith(b"--"):  # a form
        return min(size // BYTES_PER_TOKEN, MEDIA_TOKENS)
    text, count = size, 0
    for mark in _MEDIA:
        at = body.find(mark)
        while at >= 0:
            begins = at + len(mark)
            ends = body.find(b'"', begins)
            ends = ends if ends >= 0 else size
            if ends - begins >= MEDIA_BYTES and body.find(b" ", begins, ends) < 0:
                text -= ends - begins
                count += 1
            at = body.find(mark, ends)
    return text // BYTES_PER_TOKEN + count * MEDIA_TOKENS


def tokens_of(body: bytes, head: Head) -> int:
    """About how many tokens an engine reads and writes for a body; at least 1.

    Example: 2,000 bytes with max_tokens 100 are 2,000 / 4 + 100 = 600; without it 500 + 256 = 756.
    """
    limit = head.max_completion_tokens
    if limit is None:
        limit = head.max_tokens
    if type(limit) is not int or not 0 <= limit <= MOST_TOKENS:
        limit = ANSWER_TOKENS
    size = len(body)
    read = size // BYTES_PER_TOKEN if size < MEDIA_BYTES else prompt_tokens(body)
    return max(1, read + limit)


def taken_tokens(
    body: bytes, expected: int, usage: TokenUsage, *, answered: bool, worked_s: float
) -> int:
    """What a call that is over is charged where `expected` tokens were paid for.

    `answered`: an answer had begun: what the engine said, or else what was expected. `worked_s`:
    how long an engine worked for a caller who hung up before that: its prompt and
    ANSWER_TOKENS_PER_S, at most what was expected. Else nothing: the failure was ours.

    Example: a prompt of 2,000 bytes whose caller hung up after 2 s took 500 + 2 * 50 tokens.
    """
    if answered:
        if usage.completion_tokens is None:
            return expected
        read = usage.prompt_tokens
        return (prompt_tokens(body) if read is None else read) + usage.completion_tokens
    if worked_s <= 0:
        return 0
    return min(expected, prompt_tokens(body) + round(worked_s * ANSWER_TOKENS_PER_S))


def keys_of(
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    head: Head,
    model: str,
    tenant: str,
) -> tuple[int, ...]:
    """32-bit keys of the prompt's longer and longer beginnings; empty: it is too short to matter.

    One key for each of the first 1, 2, 4 ... 128 KiB that the prompt fills: a key stands for half
    of what the next one stands for, and the last for more than half of a prompt of up to 256 KiB.
    Where the caller says what belongs together (the header x-session-id, or else
    `prompt_cache_key` or `user` in the body) there is one key alone, of its tenant's session: the
    checksum's complement, so below zero.
    """
    field = _FIELDS.get(path)
    if field is None:
        return ()
    session = _session(headers) or _said(head.prompt_cache_key) or _said(head.user)
    if session:
        return (~crc32(session, crc32(f"{model}\0{tenant}\0".encode())),)
    begins = body.find(field)
    size = len(body) - begins
    if begins < 0 or size < FIRST_CUT_BYTES:
        return ()
    view = memoryview(body)
    keys = []
    key, done, cut = crc32(model.encode()), 0, FIRST_CUT_BYTES
    while cut <= size and cut <= LAST_CUT_BYTES:
        key = crc32(view[begins + done : begins + cut], key)
        keys.append(key)
        done, cut = cut, 2 * cut
    return tuple(keys)


def _session(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name, value in headers:
        if len(name) == len(SESSION_HEADER) and name.lower() == SESSION_HEADER:
            return value
    return b""


def _said(value: object) -> bytes:
    return value.encode(errors="surrogatepass") if isinstance(value, str) else b""
