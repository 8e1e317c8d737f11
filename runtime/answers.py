"""JSON answers of our HTTP servers."""

from __future__ import annotations

import msgspec
from aiohttp import web

from runtime.outside import JSON_TYPE


def json_answer(body: object, status: int = 200) -> web.Response:
    """`body`, one of our structs or what JSON has, as JSON."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type=JSON_TYPE)
