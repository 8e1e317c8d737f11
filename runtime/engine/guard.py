"""Who may call an engine: an ASGI middleware inside vLLM, and the same rule for the stub.

vLLM loads it with `--middleware runtime.engine.guard.Guard`. The keys come from the environment.

Rules this file keeps:
- a path is for the control key unless it is on the list here: a route that a new vLLM adds is shut;
- `/health` alone is open: it says nothing but "alive";
- the control key's own requests are not work: the agent's canary neither counts nor is kept out;
- closed, before a sleep and until a wake has passed its canary, it lets no client's request in;
- nothing is answered, not even to the control key, while the engine changes to another model, and
  never again after a change that stopped half-way;
- the standard library and `runtime/bearer.py` alone, per request a lookup and two compares.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from runtime import bearer

ROUTE_KEY_ENV = "STOKER_ROUTE_KEY"
CONTROL_KEY_ENV = "STOKER_CONTROL_KEY"
STATUS_PATH = "/stoker/status"
CLOSE_PATH = "/stoker/close"
OPEN_PATH = "/stoker/open"
REPOINT_PATH = "/stoker/repoint"
REPOINT_BYTES = 64 * 1024  # of the request's body
CLOSED = "the engine is asleep, or about to sleep"
MODEL_HEADER = (
    b"x-stoker-model"  # the name that a router let a request in for; callers can't set it
)
CLOSED_HEADER = b"x-stoker-closed"  # tells a router that the request was not let in
_SHUT = (CLOSED_HEADER, b"1")

_OPEN = frozenset({"/health"})
# What vLLM 0.32 serves outside /v1/ that answers a client; all else there steers the engine.
_INFERENCE = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/generative_scoring",
        "/v2/rerank",
        "/v2/embed",
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
    }
)
_CONTROL_BELOW_V1 = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Keys(NamedTuple):
    """The two secrets of one engine."""

    route: bytes
    control: bytes


class Repoint(NamedTuple):
    """What an engine shall serve from now on."""

    model_path: str
    names: tuple[str, ...]
    route_key: str


class RepointRefused(Exception):
    """An engine that can't serve that model; nothing of it was touched. The message says why."""


class Refusal(NamedTuple):
    """Why a request is not let in: an HTTP status and its words."""

    status: int
    message: str

    def body(self) -> bytes:
        """The refusal as OpenAI's error JSON."""
        kinds = {401: "authentication_error", 503: "ServiceUnavailableError"}
        kind = kinds.get(self.status, "permission_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.status}
        return json.dumps({"error": error}).encode()


_let_in_for: ContextVar[str] = ContextVar("let_in_for", default="")


def let_in_for(name: bytes) -> None:
    """What follows in this task is a request that a router let in for that model ("": any)."""
    _let_in_for.set(name.decode(errors="replace"))


def other_model(asked: str | None) -> str | None:
    """Why a request for `asked` is not served: it was let in for another; None: it is.

    So a body that two parsers read differently reaches no adapter that nobody checked.
    """
    name = _let_in_for.get()
    if not name or not asked or asked == name:
        return None
    return (
        f"the router let this request in for model {name!r}, but its body asks for {asked[:80]!r}"
    )


def keys_from(environ: Mapping[str, str]) -> Keys:
    """The keys the agent gave this process. Raises RuntimeError where one is missing or empty."""
    missing = [name for name in (ROUTE_KEY_ENV, CONTROL_KEY_ENV) if not environ.get(name)]
    if missing:
        raise RuntimeError(
            f"{' and '.join(missing)} not set: an engine never serves unguarded;"
            " the agent sets both when it starts an engine"
        )
    return Keys(environ[ROUTE_KEY_ENV].encode(), environ[CONTROL_KEY_ENV].encode())


def is_inference(path: str) -> bool:
    """Whether `path` answers a client, so that the route key opens it."""
    if path.startswith("/v1/"):
        return not path.startswith(_CONTROL_BELOW_V1)
    return path in _INFERENCE


def counts(path: str) -> bool:
    """Whether a request to `path` is work: listing the models is not, so it keeps none awake."""
    return is_inference(path) and path != "/v1/models"


def refuse(path: str, authorization: bytes | None, keys: Keys) -> Refusal | None:
    """None lets the request in. `authorization` is the raw header value, None where absent."""
    if path in _OPEN:
        return None
    given = bearer.token_of(authorization or b"")
    if not given:
        return Refusal(401, "this engine needs 'Authorization: Bearer <key>'")
    if hmac.compare_digest(given, keys.control):
        return None
    if not hmac.compare_digest(given, keys.route):
        return Refusal(401, "the key is not one of this engine's")
    if is_inference(path):
        return None
    return Refusal(403, f"{path} needs the control key; the route key opens inference only")


def read_repoint(body: bytes) -> Repoint:
    """What the agent asks for. Raises ValueError saying what is wrong with the body."""
    if len(body) > REPOINT_BYTES:
        raise ValueError(f"the body may have at most {REPOINT_BYTES} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not valid JSON") from None
    if not isinstance(found, dict) or set(found) != set(Repoint._fields):
        raise ValueError(f"the body must be an object of {', '.join(Repoint._fields)}")
    path, names, key = (found[name] for name in Repoint._fields)
    if not (isinstance(names, list) and names and all(_is_text(name) for name in names)):
        raise ValueError("names must be a list of one text or more")
    if not (_is_text(path) and _is_text(key)):
        raise ValueError("model_path and route_key must be texts")
    return Repoint(path, tuple(names), key)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def holds_control(authorization: bytes | None, keys: Keys) -> bool:
    """Whether the request is the agent's own."""
    return hmac.compare_digest(bearer.token_of(authorization or b""), keys.control)


class Activity:
    """What an engine is busy with, so that its agent can see when it is drained.

    `closed`: no client's request is let in. `changing`: why nobody's is; "": they may be.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_end: float | None = None
        self.in_flight = 0
        self.served = 0
        self.closed = False
        self.changing = ""

    def steer(self, path: str) -> tuple[int, dict[str, Any]] | None:
        """Carry out one of the `/stoker/` routes: (HTTP status, answer); None for other paths."""
        if path not in (STATUS_PATH, CLOSE_PATH, OPEN_PATH):
            return None
        if path == OPEN_PATH and self.changing:
            return 409, {"error": self.changing}
        if path != STATUS_PATH:
            self.closed = path == CLOSE_PATH
        return 200, self.status()

    async def repoint(
        self, body: bytes, change: Callable[[Repoint], Awaitable[dict[str, float]]]
    ) -> tuple[Repoint | None, int, dict[str, Any]]:
        """(the model that is served from now on, or None; HTTP status; answer).

        `change` answers what took how long. Where it raises anything but RepointRefused, nobody is
        let in again.
        """
        try:
            wanted = read_repoint(body)
        except ValueError as error:
            return None, 400, {"error": str(error)}
        if why := self._not_now():
            return None, 409, {"error": why}
        self.changing = "the engine is changing to another model"
        try:
            phases = await change(wanted)
        except RepointRefused as error:
            self.changing = ""
            return None, 409, {"error": str(error)}
        except BaseException as error:
            self.changing = f"the engine stopped half-way to another model: {error!r}"
            if not isinstance(error, Exception):
                raise
            return None, 500, {"error": self.changing}
        self.changing = ""
        return wanted, 200, {"phases": phases}

    def _not_now(self) -> str:
        if self.changing:
            return self.changing
        if self.in_flight:
            return f"requests are in flight: {self.in_flight}"
        return "" if self.closed else f"the door is open: POST {CLOSE_PATH} first"

    def begin(self) -> None:
        """A request came in."""
        self.in_flight += 1

    def end(self) -> None:
        """Count a request as over: answered, failed, or its client left."""
        self.in_flight -= 1
        self.served += 1
        self._last_end = self._clock()

    def status(self) -> dict[str, Any]:
        """`idle_for_s` is 0 while anything is in flight, None where there never was a request."""
        idle = None if self._last_end is None else self._clock() - self._last_end
        return {
            "in_flight": self.in_flight,
            "served": self.served,
            "idle_for_s": 0.0 if self.in_flight else idle,
        }


class Guard:
    """The middleware. Raises RuntimeError where a key is missing: nothing is then served."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._keys = keys_from(os.environ)
        self._activity = Activity()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "not served here"})
        else:
            await self._app(scope, receive, send)

    async def change_to(self, wanted: Repoint, scope: Scope) -> dict[str, float]:
        """Serve another model from now on; answers what took how long, in seconds.

        Raises RepointRefused where nothing was touched, anything else where it is half-way.
        """
        raise RepointRefused("this engine can't be changed to another model")

    async def _repoint(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        async def change(wanted: Repoint) -> dict[str, float]:
            return await self.change_to(wanted, scope)

        if scope["method"] != "POST":
            return 405, {"error": "POST only"}
        body = await _body(receive, REPOINT_BYTES)
        wanted, status, answer = await self._activity.repoint(body, change)
        if wanted:
            self._keys = self._keys._replace(route=wanted.route_key.encode())
        return status, answer

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, authorization = _route_path(scope), _header(scope, b"authorization")
        let_in_for(_header(scope, MODEL_HEADER) or b"")
        refusal = refuse(path, authorization, self._keys)
        if refusal:
            await _reply(send, refusal.status, refusal.body())
        elif (steered := self._activity.steer(path)) is not None:
            await _reply(send, steered[0], json.dumps(steered[1]).encode())
        elif path == REPOINT_PATH:
            # A task of its own: what was begun is ended, though whoever asked for it left.
            work = asyncio.create_task(self._repoint(scope, receive))
            status, answer = await asyncio.shield(work)
            await _reply(send, status, json.dumps(answer).encode())
        elif counts(path) and self._activity.changing:
            await _reply(send, 503, Refusal(503, self._activity.changing).body(), _SHUT)
        elif not counts(path) or holds_control(authorization, self._keys):
            await self._app(scope, receive, send)
        elif self._activity.closed:
            await _reply(send, 503, Refusal(503, CLOSED).body(), _SHUT)
        else:
            self._activity.begin()
            try:
                await self._app(scope, receive, send)
            finally:
                self._activity.end()


def _route_path(scope: Scope) -> str:
    """The path as the app routes it: without the root path, or `--root-path /v1` opened all."""
    path: str = scope["path"]
    root = scope.get("root_path") or ""
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


def _header(scope: Scope, wanted: bytes) -> bytes | None:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return None


async def _body(receive: Receive, most: int) -> bytes:
    """A request's body, or its beginning where it has more than `most` bytes."""
    body = b""
    while len(body) <= most:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):  # also where the caller left
            break
    return body


async def _reply(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers.extend(more)
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
