"""What the handlers of files, batches and jobs read of a request, and who its caller is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from runtime import outside
from runtime.contract.access import ANY
from runtime.contract.config import RouterConfig
from runtime.outside import OutsideError
from runtime.router.call.body import check_json
from runtime.router.call.errors import CallError
from runtime.router.call.request import Caller
from runtime.router.callers.keys import Keys, reaches
from runtime.router.jobs import signing
from runtime.router.jobs.store.tenants import Owner
from runtime.router.proxy.responder import CALLER

MAX_BODY_BYTES = 64 * 1024

T = TypeVar("T")


def caller_of(request: web.Request) -> Caller:
    """Whose request it is: all that it makes or asks for is that tenant's."""
    return request[CALLER]


def maker_of(request: web.Request) -> Owner:
    """Who has made what this request makes."""
    caller = request[CALLER]
    return Owner(caller.tenant, caller.key_id)


def owner_of(request: web.Request) -> Owner:
    """Whose things it may see: all of its tenant, or what its key made where that has a scope."""
    caller = request[CALLER]
    narrow = bool(caller.scopes and caller.scopes[0] != ANY)
    return Owner(caller.tenant, caller.key_id if narrow else None)


def check_path(request: web.Request) -> None:
    """Raises CallError (403) where the scope of the caller's key, or tenant, has not this path."""
    if not reaches(request[CALLER], request.path):
        message = f"this API key may not call {request.path}; its scope lists its endpoints"
        raise CallError(403, "not_allowed", message)


@contextlib.asynccontextmanager
async def counted(request: web.Request, keys: Keys) -> AsyncIterator[None]:
    """What is taken in is a request of its caller's while it comes in. Raises CallError (429)."""
    caller = request[CALLER]
    keys.begin(caller, 0, asyncio.get_running_loop().time())
    try:
        yield
    finally:
        keys.end(caller, 0, 0, 0.0)


def too_many(what: str, most: int) -> CallError:
    """A tenant has so many that have not ended already."""
    message = f"{most} {what} of this tenant have not ended yet, as many as one may have here"
    return CallError(429, "too_many_waiting", message, retry_after_s=60.0)


async def body_of(request: web.Request, kind: type[T], read_s: float) -> T:
    """A small JSON body. Raises CallError (400, 408, 413) naming the field."""
    check_json(request.headers.getall("Content-Type", []))
    if request.content_length is not None and request.content_length > MAX_BODY_BYTES:
        raise CallError(413, "body_too_large", f"this body has at most {MAX_BODY_BYTES} bytes")
    try:
        async with asyncio.timeout(read_s):
            return outside.decode(await request.read(), kind)
    except TimeoutError:
        raise CallError(408, "body_timeout", f"the body did not arrive in {read_s:g}s") from None
    except OutsideError as error:
        code = "invalid_json" if error.field is None else "invalid_field"
        message = f"the body {error}"
        raise CallError(400, code, message, param=error.field) from None
    except web.RequestPayloadError as error:
        raise CallError(400, "invalid_body", f"the body cannot be read: {error}") from None


def limit_of(request: web.Request, default: int, most: int) -> int:
    """The query's `limit`. Raises CallError (400)."""
    text = request.query.get("limit", str(default))
    if not text.isdecimal() or not text.isascii() or len(text) > 6 or not 1 <= int(text) <= most:
        message = f"limit must be a number from 1 to {most}, got {text[:80]!r}"
        raise CallError(400, "invalid_field", message, param="limit")
    return int(text)


def webhook_problem(name: str, problem: str) -> CallError:
    """What is wrong with a webhook that was asked for by `name`."""
    return CallError(400, "invalid_webhook", f"{name} {problem}", param=name)


def check_webhook(name: str, url: str | None, settings: RouterConfig) -> None:
    """Raises CallError (400) where this router cannot, or may not, call `url`."""
    if url is None:
        return
    if not settings.webhook_secret:
        raise webhook_problem(name, "cannot be used: this router has no router.webhook_secret")
    problem = signing.url_problem(url, settings.webhook_private)
    if problem is not None:
        raise webhook_problem(name, problem)


def not_found(what: str, name: str) -> CallError:
    """There is none, or it is another tenant's: nobody can tell which."""
    return CallError(404, "not_found", f"there is no {what} {name[:80]!r}", param=f"{what}_id")


def shown(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        headers=headers,
        content_type="application/json",
    )
