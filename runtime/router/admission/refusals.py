"""Why a request is not served, in words for its caller: every one that admission gives. Pure.

Rule this file keeps: it is said which limit ended the request, what it waited for, and when to come
back where that is known; what waiting cannot change is `final`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from runtime.contract.schema import close_names
from runtime.router.admission.fairness import RequestProfile
from runtime.wire.routes import ModelRoute

UNKNOWN = "model_not_found"  # whoever tells it adds the names that its caller may see
RETRY_AFTER_S = 5.0  # where neither the scheduler nor an estimate says better


class Refused(NamedTuple):
    """The request has ended; `status` is an HTTP status, `message` is for its caller."""

    request_id: str
    status: int
    code: str
    message: str
    retry_after_s: float | None = None
    param: str | None = None
    final: bool = False


NO_TABLE = "this router has not heard from the scheduler yet"


def no_table(request_id: str) -> Refused:
    """Refuse while the router can't tell which models there are."""
    return Refused(request_id, 503, "no_routes", NO_TABLE, 1.0)


def unknown(request_id: str, model: str) -> Refused:
    """No model, alias or adapter has that name. Which one was meant is added where it is told, as
    it depends on what the caller may see."""
    message = f"there is no model {model!r}"
    return Refused(request_id, 404, UNKNOWN, message, None, "model", final=True)


def meant(model: str, known: Iterable[str]) -> str:
    """The end of that message: those of `known`, names that its caller may see, that are close."""
    close = close_names(model, known)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def removed(request_id: str, model: str) -> Refused:
    """The refusal of a request whose model was removed while it waited."""
    message = f"model {model!r} was removed while the request waited"
    return Refused(request_id, 404, UNKNOWN, message, None, "model", final=True)


def unavailable(request_id: str, route: ModelRoute) -> Refused:
    """The scheduler says that nothing can be held for this model."""
    message = f"model {route.name!r} cannot be served: {route.refusal}"
    if route.refusal_final:
        return Refused(request_id, 503, "model_unavailable", message, final=True)
    return Refused(request_id, 503, "model_unavailable", message, _back_in_s(route))


def queue_full(request_id: str, route: ModelRoute) -> Refused:
    """As many wait as may."""
    message = (
        f"{route.max_queue} requests already wait for model {route.name!r}, its max_queue; "
        "try again later"
    )
    return Refused(request_id, 429, "queue_full", message, _back_in_s(route))


def shed(request_id: str, route: ModelRoute) -> Refused:
    """The refusal of a request that left a full queue for one that goes before it."""
    message = (
        f"{route.max_queue} requests wait for model {route.name!r}, its max_queue, and others go "
        "before this one; try again later"
    )
    return Refused(request_id, 429, "shed", message, _back_in_s(route))


def not_in_time(request_id: str, route: ModelRoute, profile: RequestProfile) -> Refused:
    """The refusal of a request that would surely wait longer than it may."""
    message = (
        f"model {route.name!r} will take about {route.eta_s:.0f}s to be ready, and this request "
        f"may wait {_limit(route, profile)}; it is being made ready for a later one"
    )
    return Refused(request_id, 503, "not_in_time", message, route.eta_s)


def held_too_long(request_id: str, route: ModelRoute, profile: RequestProfile) -> Refused:
    """The refusal of a request that waited as long as it may."""
    state = f" ({route.waiting_for})" if route.waiting_for else ""
    message = f"model {route.name!r} was not ready within {_limit(route, profile)}{state}"
    return Refused(request_id, 504, "hold_timeout", message, _back_in_s(route))


def no_budget(request_id: str, model: str, reason: str) -> Refused:
    """The refusal of a request whose replica failed, as too many others' did."""
    message = (
        f"model {model!r}: {reason}; not tried again, too many requests already were in "
        "the last seconds"
    )
    return Refused(request_id, 503, "retry_budget_spent", message, 1.0)


def gave_up(request_id: str, model: str, reason: str, attempts: int) -> Refused:
    """Every replica that it was sent to failed."""
    message = (
        f"model {model!r}: {reason}; gave up after {attempts} attempts that produced no answer"
    )
    return Refused(request_id, 502, "replica_failed", message)


def adapter_late(request_id: str, route: ModelRoute) -> Refused:
    """The replica it met was started before the model had adapters."""
    message = f"no replica of {route.name!r} takes adapters yet: one that does will replace it"
    return Refused(request_id, 503, "adapter_not_ready", message, RETRY_AFTER_S, "model")


def _back_in_s(route: ModelRoute) -> float:
    if route.retry_after_s is not None:
        return route.retry_after_s
    return RETRY_AFTER_S if route.eta_s is None else route.eta_s


def _limit(route: ModelRoute, profile: RequestProfile) -> str:
    """How long it may wait, and what says so."""
    if profile.wait_s is None or profile.wait_s >= route.hold_s:
        return f"{route.hold_s:g}s, the model's hold_s"
    return profile.limit or f"{profile.wait_s:g}s"
