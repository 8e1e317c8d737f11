"""One sleep, wake, re-point or canary of one engine, through its HTTP control routes.

Rules this file keeps:
- before an engine is told to sleep its door is shut and nothing is in flight: a sleep ends no
  request; the door opens again when the canary has passed;
- an engine serves another model only once that model's canary has passed, behind a shut door;
- vLLM's order after level 2: weights, reload, KV cache; its parameters are in the query string;
- asleep means that the device memory was seen free, wherever it can be measured;
- whatever goes wrong is said in words: Untouched where the engine serves on, RungFailed else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
from msgspec import Struct

from agent.core.periods import DRAIN_PROBE_S
from agent.devices.device_watch import DeviceWatch
from agent.engines import wake_canary
from agent.engines.wake_canary import WakeCanary
from runtime import outside, places
from runtime.engine import guard
from runtime.outside import OutsideError
from runtime.sizes import sizes_apart
from runtime.wire.agent_messages import StartReplica

FREE_S = 10.0  # how long freed device memory may take to be seen free
_FREE_POLL_S = 0.1
_CALL_S = 120.0  # the core gives up sooner
_ASK_S = 30.0


class EngineError(Exception):
    """A control route failed; the message says which and how. `status`: its HTTP status."""

    def __init__(self, words: str, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


class Untouched(Exception):
    """An engine was not put to sleep, and serves on as before; the message says why."""


class RungFailed(Exception):
    """An engine did not sleep or wake as it should and must be restarted; the message says why."""


class Controls:
    """The control routes of one engine."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, control_key: str) -> None:
        self._session = session
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {control_key}"}

    async def post(self, path: str, body: object = None, timeout_s: float = _CALL_S) -> Any:
        """The JSON answer, None where there is none. Raises EngineError."""
        return await self._call("POST", path, body, timeout_s)

    async def get(self, path: str, timeout_s: float = _ASK_S) -> Any:
        """As `post`."""
        return await self._call("GET", path, None, timeout_s)

    async def tell(self, path: str, body: object) -> None:
        """A `post` whose answer is not JSON, or does not matter. Raises EngineError."""
        await self._send("POST", path, body, _ASK_S)

    async def _call(self, method: str, path: str, body: object, timeout_s: float) -> Any:
        text = await self._send(method, path, body, timeout_s)
        try:
            return outside.json_document(text) if text else None
        except OutsideError:
            raise EngineError(f"{method} {path} answers no JSON: {text[:100]!r}") from None

    async def _send(self, method: str, path: str, body: object, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._base_url + path, json=body, headers=self._headers, timeout=timeout
            ) as reply:
                text = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineError(f"{method} {path}: {error or type(error).__name__}") from None
        if reply.status != 200:
            shown = text[:300].decode(errors="replace")
            raise EngineError(f"{method} {path} answers {reply.status}: {shown}", reply.status)
        return text


async def is_sleeping(controls: Controls) -> bool | None:
    """What the engine says itself; None if it does not answer."""
    try:
        answer = await controls.get("/is_sleeping")
        return bool(answer["is_sleeping"])
    except (EngineError, TypeError, KeyError):
        return None


async def take_canary(controls: Controls, model: str) -> WakeCanary:
    """The canary of a model as it answers now, an empty one where it has none. Raises
    EngineError."""
    for path, body in wake_canary.ASKS:
        body = {"model": model, **body}
        try:
            return wake_canary.read(path, body, await controls.post(path, body, _ASK_S))
        except ValueError:
            continue
        except EngineError as error:
            if error.status is None or error.status >= 500:
                raise
    return WakeCanary()


# ------------------------------------------------------------------------------ sleep


class Memory(Struct, frozen=True):
    """Bytes in use on a replica's devices: its own (None: not measured), and everybody's."""

    own: int | None
    all: int


Measure = Callable[[], Awaitable[Memory]]


async def put_to_sleep(
    controls: Controls, level: int, booked_bytes: int, measure: Measure | None
) -> int:
    """Put a drained engine to sleep; what it still holds on all its devices. Without `measure`
    nothing is verified, and 0 returned. Raises Untouched or RungFailed."""
    await _shut_the_door(controls)
    before = await measure() if measure else None
    try:
        await controls.post(places.url("", "sleep", level=level, mode="wait"))
    except EngineError as error:
        raise RungFailed(str(error)) from None
    if await is_sleeping(controls) is not True:
        raise RungFailed("it was told to sleep, but says that it does not")
    if measure is None or before is None:
        return 0
    return await _see_free(measure, before, booked_bytes)


async def _shut_the_door(controls: Controls) -> None:
    try:
        status = await controls.post(guard.CLOSE_PATH, timeout_s=_ASK_S)
        in_flight = int(status["in_flight"])
    except (EngineError, TypeError, KeyError, ValueError) as error:
        await _open_again(controls)
        raise Untouched(f"its door could not be shut: {error}") from None
    if in_flight:
        await _open_again(controls)
        raise Untouched(f"{in_flight} requests came in at the last moment")


async def _open_again(controls: Controls) -> None:
    with suppress(EngineError):  # then its health check fails too
        await controls.post(guard.OPEN_PATH, timeout_s=_ASK_S)


async def _see_free(measure: Measure, before: Memory, booked_bytes: int) -> int:
    """What stays, once at least half of what was used is free. Raises RungFailed."""
    deadline = time.monotonic() + FREE_S
    while True:
        now = await measure()
        if before.own and now.own is not None:
            used, left = before.own, now.own
        else:  # a container sees no process on the devices: all there is, is what they lost
            used, left = booked_bytes, max(0, booked_bytes - (before.all - now.all))
        if left <= used / 2:
            return left
        if time.monotonic() >= deadline:
            shown = sizes_apart(left, used)
            raise RungFailed(
                f"{FREE_S:.0f} s after it fell asleep its devices still show {shown[0]}"
                f" of {shown[1]} of it"
            )
        await asyncio.sleep(_FREE_POLL_S)


def measure_of(watch: DeviceWatch, command: StartReplica) -> Measure:
    """Read the replica's devices again."""

    async def measure() -> Memory:
        await watch.read()
        own = watch.used_bytes(command.replica_id)
        used = sum(d.memory_used_bytes for d in watch.last() if d.device_id in command.device_ids)
        return Memory(own, used)

    return measure


# ------------------------------------------------------------------------------ wake


async def wake(controls: Controls, level: int, known: WakeCanary | None) -> dict[str, float]:
    """Wake an engine, hear its canary and open its door; the seconds of each phase.

    One that does not sleep has its canary to pass only. Raises RungFailed.
    """
    phases: dict[str, float] = {}
    try:
        if await is_sleeping(controls) is not False:
            await _take_memory(controls, level, phases)
            if await is_sleeping(controls) is not False:
                raise RungFailed("it was woken, but does not say that it is awake")
        await _open(controls, known, phases)
    except (EngineError, ValueError) as error:
        raise RungFailed(str(error)) from None
    return phases


async def _open(controls: Controls, known: WakeCanary | None, phases: dict[str, float]) -> None:
    """Open its door, once its canary has passed. Raises RungFailed where it answers otherwise,
    EngineError or ValueError where not at all."""
    if known and known.path:
        began = time.monotonic()
        answer = await controls.post(known.path, known.body, _ASK_S)
        now = wake_canary.read(known.path, known.body, answer)
        phases["canary"] = time.monotonic() - began
        if words := wake_canary.difference(known, now):
            raise RungFailed(f"its canary failed: {words}")
    await controls.post(guard.OPEN_PATH, timeout_s=_ASK_S)


async def _take_memory(controls: Controls, level: int, phases: dict[str, float]) -> None:
    began = time.monotonic()
    if level == 1:
        await controls.post("/wake_up")
    else:
        await controls.post("/wake_up?tags=weights")
        reload_began = time.monotonic()
        await controls.post("/collective_rpc", {"method": "reload_weights"})
        phases["reload"] = time.monotonic() - reload_began
        await controls.post("/wake_up?tags=kv_cache")
    phases["wake"] = time.monotonic() - began - phases.get("reload", 0.0)


# ------------------------------------------------------------------------------ re-point


async def repoint(
    controls: Controls, level: int, body: object, known: WakeCanary
) -> dict[str, float]:
    """Point an engine at another model, asleep at `level` or awake (0), and open its door once
    `known`, that model's canary, has passed; the seconds of each phase. Raises RungFailed."""
    phases: dict[str, float] = {}
    try:
        if level:
            await _timed(phases, "wake", controls.post("/wake_up?tags=weights"))
        else:
            await _timed(phases, "drain", _see_no_request(controls))
        answer = await _timed(phases, "repoint", controls.post(guard.REPOINT_PATH, body))
        phases |= _seconds(answer)
        if level:
            await _timed(phases, "wake", controls.post("/wake_up?tags=kv_cache"))
            if await is_sleeping(controls) is not False:
                raise RungFailed("it was woken, but does not say that it is awake")
        await _open(controls, known, phases)
    except (EngineError, ValueError) as error:
        raise RungFailed(str(error)) from None
    return phases


async def _see_no_request(controls: Controls) -> None:
    """Shut the door, and wait for what came in at the last moment. The core gives up sooner than
    this does. Raises EngineError."""
    while True:
        status = await controls.post(guard.CLOSE_PATH, timeout_s=_ASK_S)
        if not isinstance(status, dict) or not isinstance(status.get("in_flight"), int):
            raise EngineError("it does not say what is in flight")
        if not status["in_flight"]:
            return
        await asyncio.sleep(DRAIN_PROBE_S)


async def _timed(phases: dict[str, float], name: str, work: Awaitable[Any]) -> Any:
    began = time.monotonic()
    result = await work
    phases[name] = phases.get(name, 0.0) + time.monotonic() - began
    return result


def _seconds(answer: Any) -> dict[str, float]:
    """The engine's own phases, where it tells them."""
    told = answer.get("phases") if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        return {}
    return {str(name): float(s) for name, s in told.items() if isinstance(s, int | float)}
