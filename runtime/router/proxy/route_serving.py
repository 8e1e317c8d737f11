"""Serves a request that asked for a route: by a target, by those that stand in, and in a mirror.

Rules this file keeps:
- the body is re-encoded with the model's name, and nothing else of it is changed;
- what the caller gets if no model of the chain can be had is the first one's error;
- a request is mirrored once it is over, if it was let in: the mirror never slows or fails it. The
  mirror's answer is read and thrown away, it takes only what nobody else wants, and one too many
  (MIRRORS_AT_ONCE, or a body over MIRROR_BODY_BYTES) is not made, but counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from random import random

from runtime.router.admission.fairness import BACKGROUND
from runtime.router.admission.gate import Gate
from runtime.router.admission.route_choice import FALLS_BACK, Attempt, Way
from runtime.router.call.body import with_model
from runtime.router.call.errors import CallError
from runtime.router.call.multipart import read_form
from runtime.router.call.outcome import BROKEN_OFF, Outcome
from runtime.router.call.request import Call, Caller
from runtime.router.proxy.responder import Client
from runtime.router.proxy.upstream import Headers, Reply

log = logging.getLogger("stoker.router")

Serve = Callable[[Call, Client], Awaitable[None]]  # raises CallError

MIRRORS_AT_ONCE = 32
MIRROR_BODY_BYTES = 1024 * 1024


class RouteServing:
    """Takes calls by route to `serve`, once for each model that is tried."""

    def __init__(self, gate: Gate, serve: Serve) -> None:
        self._serve = serve
        self._loop = gate.loop
        self._versions = gate.versions
        self._mirrors: set[asyncio.Task[None]] = set()

    async def serve(self, way: Way, call: Call, client: Client) -> None:
        """Answer `client`. Raises CallError while it has been told nothing."""
        chain = way.chain(way.choose(_sticky_key(way.sticky, call), random()))
        refused = await self._by_one_of(chain, way, call, client)
        let_in = refused is None or refused.code in FALLS_BACK
        if way.mirror is not None and let_in and random() < way.mirror.share:
            self._mirror(way, way.mirror.model, call)
        if refused is None:
            return
        if not client.begun:
            raise refused
        with contextlib.suppress(ConnectionError):  # it hung up
            await client.write(refused.last_event(call.path, call.request_id))

    async def _by_one_of(
        self, chain: tuple[str, ...], way: Way, call: Call, client: Client
    ) -> CallError | None:
        """Answered by the first model that can; else the first one's error."""
        first: CallError | None = None
        for model in chain:
            tried = self._for(way, model, call, again=first is not None, spare=len(chain) > 1)
            try:
                await self._serve(tried, client)
                return None
            except CallError as error:
                first = first or error
                if error.code not in FALLS_BACK:
                    break
                log.info("request %s: not by %s: %s", call.request_id, model, error)
        return first

    def ended(self, outcome: Outcome) -> None:
        """One attempt is over."""
        attempt, ttft_s = outcome.call.attempt, outcome.ttft_s
        assert attempt is not None
        sent_s = None if ttft_s is None else ttft_s - outcome.held_s
        attempt.tally.ended(outcome.status, sent_s, outcome.error != BROKEN_OFF)

    def close(self) -> None:
        """End every mirror."""
        for task in self._mirrors:
            task.cancel()

    def _for(self, way: Way, model: str, call: Call, again: bool, spare: bool) -> Call:
        """The call as it is for this model."""
        kind = _header(call, b"content-type") or ""
        if kind.lower().startswith("multipart/"):
            body, head = read_form(call.body, kind).with_model(model), call.head
        else:
            body, head = with_model(call.body, model)
        tally = self._versions.tally(way.route, model)
        attempt = Attempt(way.route, call.model, tally, again, spare)
        return dataclasses.replace(
            call, model=model, body=body, head=head, version=way.version(model), attempt=attempt
        )

    # -------------------------------------------------------------------------------- mirrors

    def _mirror(self, way: Way, model: str, call: Call) -> None:
        if len(self._mirrors) >= MIRRORS_AT_ONCE or len(call.body) > MIRROR_BODY_BYTES:
            self._versions.mirrors_dropped[way.route] += 1
            return
        task = self._loop.create_task(self._shadow(way, model, call))
        self._mirrors.add(task)
        task.add_done_callback(self._mirrors.discard)

    async def _shadow(self, way: Way, model: str, call: Call) -> None:
        """Nobody pays for it, and no key's scope is asked: the operator wants it."""
        try:
            copy = self._for(way, model, call, again=False, spare=False)
            copy.request_id += "-mirror"
            copy.caller = Caller(call.caller.tenant, priority=BACKGROUND)
            await self._serve(copy, _Nobody())
        except CallError as error:
            log.info("request %s-mirror: %s", call.request_id, error)
        except Exception:
            log.exception("request %s-mirror failed inside the router", call.request_id)


class _Nobody:
    """A client that reads everything and keeps nothing."""

    begun = False

    async def begin(self, status: int, headers: Headers) -> None:
        self.begun = True

    async def write(self, data: bytes) -> None: ...

    async def relay(self, reply: Reply, first: bytes) -> None:
        while await reply.read():
            pass

    def break_off(self) -> None: ...


def _sticky_key(sticky: str, call: Call) -> str | None:
    """What the caller is known by; None: nothing, or the route does not care."""
    if sticky == "off":
        return None
    if sticky == "user":
        user = call.head.user
        return user if isinstance(user, str) and user else None
    return _header(call, sticky.partition(":")[2].lower().encode()) or None


def _header(call: Call, lower: bytes) -> str | None:
    for name, value in call.headers:
        if len(name) == len(lower) and name.lower() == lower:
            return value.decode("latin-1")
    return None
