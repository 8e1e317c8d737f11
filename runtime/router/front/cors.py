"""Which web pages may call this router from a browser (`router.cors_origins`); none by default.

Rules this file keeps:
- what is allowed is an origin, never a cookie: a page still needs a key where callers need one;
- every answer says that it depends on the origin, refused ones too.
"""

from __future__ import annotations

from aiohttp import web

ANY = "*"
MAX_AGE_S = 600
_EXPOSED = (
    "X-Request-ID, Retry-After, retry-after-ms, x-should-retry, X-Stoker-Model, X-Stoker-Cache,"
    " x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests,"
    " x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Cors:
    """The answer's headers by the request's origin. Without `origins` it changes nothing."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._any = ANY in origins
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    def allows(self, origin: str) -> bool:
        """Whether pages of `origin`, as a browser writes it, may call."""
        return bool(origin) and (self._any or origin.lower() in self._origins)

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it calls; None: that is not asked here."""
        wish = request.headers.get("Access-Control-Request-Method")
        allowed = self.allows(request.headers.get("Origin", ""))
        if request.method != "OPTIONS" or wish is None or not allowed:
            return None
        headers = {"Access-Control-Max-Age": str(MAX_AGE_S), "Access-Control-Allow-Methods": wish}
        for name in ("Headers", "Private-Network"):
            asked = request.headers.get(f"Access-Control-Request-{name}")
            if asked is not None:
                headers[f"Access-Control-Allow-{name}"] = asked
        return web.Response(status=204, headers=headers)

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add what a browser wants to know to any answer: aiohttp's `on_response_prepare`."""
        self.mark_for(request.headers.get("Origin", ""), response)

    def mark_for(self, origin: str, response: web.StreamResponse) -> None:
        """The same for an answer to a page of that origin, which no application prepares."""
        if not self._origins:
            return
        vary = response.headers.get("Vary")
        response.headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
        if self.allows(origin):
            response.headers["Access-Control-Allow-Origin"] = ANY if self._any else origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
