"""One inference call, and whose it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.contract.access import ANY, Scope
from runtime.router.admission.key_limits import Account
from runtime.router.admission.route_choice import Attempt
from runtime.router.call.body import Head


@dataclass(slots=True, eq=False)
class Caller:
    """Who calls: made once a key (`callers/keys.py`), shared by all its calls.

    `tenant` is whom queues are fair to, by `weight`, and caches are kept for; `priority` as in
    `RequestProfile`; `accounts` are what its calls are charged to; `scopes` all have to allow a
    call.
    """

    tenant: str = "anonymous"
    key_id: str | None = None
    priority: int = 0
    weight: float = 1.0
    accounts: tuple[Account, ...] = ()
    scopes: tuple[Scope, ...] = (ANY,)
    known: dict[tuple[str, ...], bool] = field(default_factory=dict)  # answers of `keys.may`


ANONYMOUS = Caller()


@dataclass(slots=True)  # frozen would cost a microsecond
class Call:
    """`path` is the engine's raw request target, `model` the caller's word, `headers` the
    caller's own, `head` what was read of the body."""

    request_id: str
    model: str
    path: str
    headers: Iterable[tuple[bytes, bytes]]
    body: bytes
    streams: bool  # the answer will be server-sent events
    head: Head
    caller: Caller = ANONYMOUS
    version: str = ""  # of the model that serves it
    address: str = ""  # whom the answer goes to
    asked: str = ""  # the path the caller wrote, where it is not `path`
    attempt: Attempt | None = None  # a route chose `model`
    counted: bool = False  # as a request, when its caller left it here
