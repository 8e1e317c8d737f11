"""Which replica keeps which response of the Responses API, and for whom. Pure.

An engine keeps responses in the memory of its process, by an id alone: it knows no tenants.

Rules this file keeps:
- a tenant's response is no other tenant's, and an id belongs to the tenant whose it was first;
- so many are remembered of a tenant, and of all; what was asked for longest ago goes first.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

from runtime.router.call.body import Head
from runtime.router.call.errors import CallError, no_response

MOST = 20_000  # remembered, of some 500 bytes each
MOST_OF_TENANT = 5_000
_GOOD_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
# As vLLM begins an answer, or the first event of a stream: the id is its first string of that name.
_ID_IN_ANSWER = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,128})"')
_BEGINNING_BYTES = 1024


class Made(NamedTuple):
    """`model` answered, on that replica; `asked` is the name its caller used."""

    tenant: str
    model: str
    asked: str
    replica_id: str


def is_id(word: str) -> bool:
    """Whether it can be the id of a response."""
    return _GOOD_ID.fullmatch(word) is not None


def id_in(beginning: bytes) -> str | None:
    """The id of a response of which an engine's answer begins like that."""
    found = _ID_IN_ANSWER.search(beginning, 0, _BEGINNING_BYTES)
    return found[1].decode() if found else None


class MadeResponses:
    """What one router knows of them."""

    def __init__(self, most: int = MOST, most_of_tenant: int = MOST_OF_TENANT) -> None:
        self._most = most
        self._most_of_tenant = most_of_tenant
        self._made: dict[str, Made] = {}
        self._of: dict[str, OrderedDict[str, None]] = {}  # tenant -> ids, the oldest first

    def __len__(self) -> int:
        return len(self._made)

    def keep(self, response_id: str, made: Made) -> None:
        """Remember which replica made a response."""
        known = self._made.get(response_id)
        if known is not None and known.tenant != made.tenant:
            return
        self._made[response_id] = made
        ids = self._of.setdefault(made.tenant, OrderedDict())
        ids[response_id] = None
        ids.move_to_end(response_id)
        if len(ids) > self._most_of_tenant:
            self._forget_oldest(made.tenant)
        elif len(self._made) > self._most:
            self._forget_oldest(max(self._of, key=lambda tenant: len(self._of[tenant])))

    def find(self, tenant: str, response_id: str) -> Made | None:
        """Who keeps it; None: nobody that is known, or it is another tenant's."""
        made = self._made.get(response_id)
        if made is None or made.tenant != tenant:
            return None
        self._of[tenant].move_to_end(response_id)
        return made

    def named(self, head: Head) -> list[str]:
        """The responses that a call names and nobody here knows: another worker may."""
        names = (head.previous_response_id, head.request_id)
        return [name for name in names if name is not None and name not in self._made]

    def seen(self, response_id: str) -> Made | None:
        """Who made it, whosever it is: for another worker."""
        return self._made.get(response_id)

    def check(self, head: Head, tenant: str, keyed: bool) -> None:
        """An engine goes on with any response that it keeps, whoever had it made. Raises CallError:
        404 where nobody knows that `tenant` had it made, 400 where a new one's id is another's.
        Without keys (not `keyed`) all callers are one, and an older response may be gone on with.
        """
        before, named = head.previous_response_id, head.request_id
        if before is not None and keyed and self.find(tenant, before) is None:
            raise no_response(before, param="previous_response_id")
        if named is not None and self._is_anothers(tenant, named):
            message = f"request_id {named[:128]!r} is taken; choose another"
            raise CallError(400, "invalid_field", message, param="request_id")

    def _is_anothers(self, tenant: str, response_id: str) -> bool:
        made = self._made.get(response_id)
        return made is not None and made.tenant != tenant

    def _forget_oldest(self, tenant: str) -> None:
        ids = self._of[tenant]
        gone, _ = ids.popitem(last=False)
        del self._made[gone]
        if not ids:
            del self._of[tenant]
