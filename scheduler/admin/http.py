"""What the admin API's handlers share: errors, answers, and how bodies and queries are read.

Rule this file keeps: a body or a query that is refused names every field that is wrong.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import msgspec
from aiohttp import web

from runtime import outside
from runtime.contract.schema import SchemaError, check
from runtime.outside import OutsideError
from runtime.wire.agent_messages import SpecProblem
from scheduler.admin import views as v
from scheduler.errors import ChangeRefused, Conflict, Invalid, NotFound
from scheduler.leadership import Leadership

S = TypeVar("S", bound=msgspec.Struct)
WHO = web.RequestKey("who", str)  # the name of the token that was sent
# For the audit trail: the address of what was made, if it is not the request's; and why it was.
SUBJECT = web.RequestKey("subject", str)
WHY = web.RequestKey("why", str)


_STATUS: dict[type[ChangeRefused], int] = {NotFound: 404, Conflict: 409, Invalid: 422}


class AdminError(Exception):
    """Answered as `views.Error` with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        problems: tuple[SpecProblem, ...] = (),
        close: tuple[str, ...] = (),
        leader: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = v.Error(
            error=v.ErrorBody(message=message, problems=problems, close=close, leader=leader)
        )


def reply(body: msgspec.Struct, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


def refusal(error: ChangeRefused) -> AdminError:
    """The answer that says it."""
    return AdminError(_STATUS[type(error)], str(error), problems=error.problems, close=error.close)


def decode_body(data: bytes, kind: type[S]) -> S:
    """The bytes of a body as `kind`. Raises AdminError (400)."""
    try:
        return outside.decode(data, kind)
    except OutsideError as error:
        raise AdminError(400, f"the body {error}") from None


async def read_json(request: web.Request) -> Any:
    """The body's JSON, {} for an empty one. Raises AdminError (400)."""
    try:
        return outside.json_document(await request.read() or b"{}")
    except OutsideError as error:
        raise AdminError(400, f"the body {error}") from None


async def read_body(request: web.Request, kind: type[S]) -> S:
    """The body as `kind`. Raises AdminError (400, 422) naming each wrong field."""
    raw = await read_json(request)
    try:
        return check(raw, kind)
    except SchemaError as error:
        raise AdminError(422, str(error), problems=error.problems) from None


def whole_number(request: web.Request, name: str, default: int) -> int:
    """As `number`, where a part of one means nothing."""
    text = request.query.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise AdminError(400, f"{name}: must be a whole number of at least 0 (got {text[:80]!r})")
    return int(text)


def number(request: web.Request, name: str, default: float) -> float:
    """A number of at least 0 in the query. Raises AdminError (400)."""
    text = request.query.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**53:
        raise AdminError(400, f"{name}: must be a number of at least 0 (got {text[:80]!r})")
    return value


async def not_leading(leadership: Leadership) -> NoReturn:
    """Raises AdminError (503): another scheduler leads, named where it is known."""
    leader = await leadership.leader_url()
    why = f": {leadership.why_not_leading}" if leadership.why_not_leading else ""
    raise AdminError(503, f"this scheduler is not the leader{why}", leader=leader)
