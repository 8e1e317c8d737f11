"""What is left of a packed body whose request was answered before it was read.

aiohttp reads what is left for up to 10 s, so that the caller gets the answer and not a reset. Of a
gzip bomb every byte of those is unpacked without a pause: one call, without a key, would hold up
the whole process.
"""

from __future__ import annotations

from aiohttp import hdrs, web


async def drop_packed(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Unpack nothing more of a body that was not read, and close its connection.

    For `Application.on_response_prepare`.
    """
    content = request.content
    if hdrs.CONTENT_ENCODING in request.headers and not content.is_eof():
        response.force_close()
        content.set_exception(TimeoutError("the answer did not wait for the body"))
