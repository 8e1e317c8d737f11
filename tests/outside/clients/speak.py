"""How a client's script is talked to: a JSON line in is one call, one out is what came of it.

    {"base_url", "key", "model", "prompt", "max_tokens", "stream", "timeout_s" or null, "api"}
    {"text", "pieces", "error": null or {"kind", "status" or null, "message"}, "took_s"}

A script hands `serve` one function that makes the call with its library, with that library's own
defaults (its retries too), and yields the answer's pieces. Whatever it raises is the error.
"""

import asyncio
import json
import os
import sys
import time


def serve(call):
    """Answer each line of stdin by `call`, an async generator of pieces of text."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(asyncio.run(_one(call, asked))), file=_OUT, flush=True)


async def _one(call, asked):
    began, pieces, error = time.monotonic(), [], None
    try:
        async for piece in call(asked):
            pieces.append(piece or "")
    except Exception as raised:
        error = {
            "kind": type(raised).__name__,
            "status": _status(raised),
            "message": str(raised)[:2000],
        }
    took_s = round(time.monotonic() - began, 3)
    return {
        "text": "".join(pieces), "pieces": len(pieces), "error": error, "took_s": took_s,
    }  # fmt: skip


def _status(raised):
    """The HTTP status that an exception knows, or one of those that led to it."""
    seen = 0
    while raised is not None and seen < 8:
        for name in ("status_code", "code"):
            value = getattr(raised, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
        raised, seen = raised.__cause__ or raised.__context__, seen + 1
    return None


# What a library prints to stdout must not be taken for an answer.
_OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
