"""The guard inside an engine: who gets in, and what it counts."""

import asyncio
import json

import pytest

from runtime.engine import guard
from runtime.engine.guard import Guard, Keys, refuse
from runtime.router.call.paths import PLAIN_PATHS, ROOT_PATHS
from tests.kits.bearer_headers import cases as bearer_cases

KEYS = Keys(b"route-secret", b"control-secret")
ROUTE, CONTROL = b"Bearer route-secret", b"Bearer control-secret"
INFERENCE = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/embeddings",
    "/v1/responses/resp_1/cancel",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/score",
    "/rerank",
    "/v2/rerank",
    "/classify",
    "/invocations",
    "/inference/v1/generate",
]
STEERING = [
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/metrics",
    "/server_info",
    "/reset_prefix_cache",
    "/docs",
    "/openapi.json",
    "/version",
    "/load",
    "/ping",
    "/pause",
    "/update_weights",
    "/scale_elastic_ep",
    "/inference/v1/abort_requests",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/load_lora_adapter/",
    "/stoker/status",
    "/v1",
    "/tokenizer_info",
    "/a_route_of_a_later_vllm",
]


@pytest.mark.parametrize("path", INFERENCE)
def test_inference_routes_take_either_key(path):
    assert refuse(path, ROUTE, KEYS) is None
    assert refuse(path, CONTROL, KEYS) is None
    assert refuse(path, None, KEYS).status == 401


@pytest.mark.parametrize("path", sorted({*ROOT_PATHS, *PLAIN_PATHS.values()}))
def test_what_the_router_offers_its_key_opens(path):
    """Two lists on purpose, each side decides; but a path on the router's alone is a 403."""
    assert refuse(path, ROUTE, KEYS) is None


@pytest.mark.parametrize("path", STEERING)
def test_all_else_takes_the_control_key_only(path):
    assert refuse(path, CONTROL, KEYS) is None
    refusal = refuse(path, ROUTE, KEYS)
    assert refusal.status == 403
    assert path in refusal.message
    assert refuse(path, None, KEYS).status == 401


def test_health_is_open_and_nothing_near_it():
    assert refuse("/health", None, KEYS) is None
    assert refuse("/health/", None, KEYS).status == 401


@pytest.mark.parametrize(
    "authorization",
    [b"", b"Bearer", b"Bearer ", b"Basic route-secret", b"route-secret", b"Bearer route-secre",
     b"Bearer route-secret2", b"Bearer \xff\xfe"],
)  # fmt: skip
def test_wrong_authorization_is_401(authorization):
    assert refuse("/v1/models", authorization, KEYS).status == 401


def test_the_scheme_is_case_insensitive_as_http_says():
    assert refuse("/v1/models", b"bearer route-secret", KEYS) is None


@pytest.mark.parametrize(("lines", "opens"), bearer_cases("route-secret"))
def test_a_token_is_read_as_everywhere(lines, opens):
    _, _, value = lines.partition(b"\r\n")[0].partition(b":")  # the first header counts
    given = value.strip() if lines.lower().startswith(b"authorization") else None
    assert (refuse("/v1/models", given, KEYS) is None) == opens


def test_refusals_are_openai_shaped():
    error = json.loads(refuse("/sleep", ROUTE, KEYS).body())["error"]
    assert error["code"] == 403
    assert error["type"] == "permission_error"
    assert "control key" in error["message"]


@pytest.mark.parametrize("missing", [guard.ROUTE_KEY_ENV, guard.CONTROL_KEY_ENV])
def test_missing_or_empty_keys_raise(missing, monkeypatch):
    both = {guard.ROUTE_KEY_ENV: "a", guard.CONTROL_KEY_ENV: "b"}
    for environ in ({**both, missing: ""}, {k: v for k, v in both.items() if k != missing}):
        with pytest.raises(RuntimeError, match=missing):
            guard.keys_from(environ)
    monkeypatch.delenv(missing, raising=False)
    with pytest.raises(RuntimeError, match="never serves unguarded"):
        Guard(answer)


# ------------------------------------------------------------------------------ the ASGI app


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inner"})


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv(guard.ROUTE_KEY_ENV, KEYS.route.decode())
    monkeypatch.setenv(guard.CONTROL_KEY_ENV, KEYS.control.decode())


def scope(path, authorization=None, **more):
    headers = [(b"host", b"x")] + ([(b"authorization", authorization)] if authorization else [])
    return {"type": "http", "path": path, "headers": headers, **more}


async def call(app, *args, sends=b"", **more):
    """(status, headers, body) of one request."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": sends, "more_body": False}

    await app(scope(*args, **more), receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def status_of(app):
    _, _, body = await call(app, guard.STATUS_PATH, CONTROL)
    return json.loads(body)


async def test_lets_in_and_keeps_out(keys):
    app = Guard(answer)
    assert (await call(app, "/health"))[2] == b"inner"
    assert (await call(app, "/v1/models", ROUTE))[2] == b"inner"
    status, headers, body = await call(app, "/v1/models")
    assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
    assert int(headers[b"content-length"]) == len(body)
    assert (await call(app, "/sleep", ROUTE))[0] == 403
    assert (await call(app, "/sleep", CONTROL))[2] == b"inner"


async def test_a_root_path_opens_no_control_route(keys):
    app = Guard(answer)
    assert (await call(app, "/v1/sleep", ROUTE, root_path="/v1"))[0] == 403
    assert (await call(app, "/v1/sleep", ROUTE, root_path=""))[0] == 200  # vLLM answers 404
    assert (await call(app, "/api/v1/models", ROUTE, root_path="/api"))[0] == 200


async def test_counts_inference_while_it_runs_and_however_it_ends(keys):
    inside, go = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive, send):
        inside.set()
        await go.wait()
        if scope["path"] == "/v1/fail":
            raise LookupError
        await answer(scope, receive, send)

    app = Guard(slow)
    assert await status_of(app) == {"in_flight": 0, "served": 0, "idle_for_s": None}

    task = asyncio.create_task(call(app, "/v1/completions", ROUTE))
    await inside.wait()
    assert await status_of(app) == {"in_flight": 1, "served": 0, "idle_for_s": 0.0}
    go.set()
    await task
    status = await status_of(app)
    assert (status["in_flight"], status["served"]) == (0, 1)
    assert status["idle_for_s"] >= 0

    with pytest.raises(LookupError):
        await call(app, "/v1/fail", ROUTE)
    assert (await status_of(app))["served"] == 2

    go.clear()
    inside.clear()
    task = asyncio.create_task(call(app, "/v1/completions", ROUTE))
    await inside.wait()
    task.cancel()  # what a server does when the client hangs up
    with pytest.raises(asyncio.CancelledError):
        await task
    status = await status_of(app)
    assert (status["in_flight"], status["served"]) == (0, 3)


async def test_refused_and_listing_requests_are_not_work(keys):
    app = Guard(answer)
    await call(app, "/v1/completions")
    await call(app, "/v1/models", ROUTE)
    await call(app, "/metrics", CONTROL)
    assert (await status_of(app))["served"] == 0


async def test_the_agents_own_requests_are_not_work(keys):
    app = Guard(answer)
    assert (await call(app, "/v1/completions", CONTROL))[2] == b"inner"
    assert (await status_of(app))["served"] == 0


async def test_a_closed_door_keeps_clients_out_and_counts_who_is_in(keys):
    inside, go = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive, send):
        inside.set()
        await go.wait()
        await answer(scope, receive, send)

    app = Guard(slow)
    request = asyncio.create_task(call(app, "/v1/completions", ROUTE))
    await inside.wait()
    assert (await call(app, guard.CLOSE_PATH, ROUTE))[0] == 403
    _, _, body = await call(app, guard.CLOSE_PATH, CONTROL)
    assert json.loads(body)["in_flight"] == 1
    go.set()
    status, _, body = await call(app, "/v1/completions", ROUTE)
    assert (status, json.loads(body)["error"]["code"]) == (503, 503)
    assert (await request)[0] == 200
    assert (await call(app, "/v1/completions", CONTROL))[0] == 200
    assert (await call(app, "/v1/models", ROUTE))[0] == 200
    await call(app, guard.OPEN_PATH, CONTROL)
    assert (await call(app, "/v1/completions", ROUTE))[0] == 200
    assert (await status_of(app))["served"] == 2


WANTED = {"model_path": "/b", "names": ["b", "org/b"], "route_key": "other-secret"}


class Shell(Guard):
    """A guard whose engine can be changed; it waits until it is let."""

    def __init__(self, app, error=None):
        super().__init__(app)
        self.error, self.wanted = error, []
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def change_to(self, wanted, scope):
        self.wanted.append(wanted)
        self.begun.set()
        await self.go.wait()
        if self.error:
            raise self.error
        return {"reload": 1.0}


def repoint(app, authorization=CONTROL, **more):
    body = more.pop("sends", json.dumps(WANTED).encode())
    return call(app, guard.REPOINT_PATH, authorization, method="POST", sends=body, **more)


async def test_another_model_is_served_under_its_own_route_key(keys):
    app = Shell(answer)
    assert (await repoint(app, ROUTE))[0] == 403
    status, _, body = await repoint(app)
    assert (status, "door is open" in json.loads(body)["error"]) == (409, True)
    await call(app, guard.CLOSE_PATH, CONTROL)
    work = asyncio.create_task(repoint(app))
    await app.begun.wait()
    # In the middle nobody is answered, and nobody opens the door.
    assert (await call(app, "/v1/completions", ROUTE))[0] == 503
    status, headers, _ = await call(app, "/v1/completions", CONTROL)
    assert (status, headers[guard.CLOSED_HEADER]) == (503, b"1")
    assert (await call(app, guard.OPEN_PATH, CONTROL))[0] == 409
    assert (await repoint(app))[0] == 409
    app.go.set()
    status, _, body = await work
    assert (status, json.loads(body)) == (200, {"phases": {"reload": 1.0}})
    assert app.wanted == [guard.Repoint("/b", ("b", "org/b"), "other-secret")]
    for path in ("/v1/models", "/v1/completions"):
        assert (await call(app, path, ROUTE))[0] == 401
    assert (await call(app, "/v1/completions", CONTROL))[0] == 200, "the agent's canary"
    assert (await call(app, "/v1/completions", b"Bearer other-secret"))[0] == 503
    assert (await call(app, guard.OPEN_PATH, CONTROL))[0] == 200
    assert (await call(app, "/v1/completions", b"Bearer other-secret"))[0] == 200


async def test_no_change_while_a_request_is_in_flight(keys):
    inside, go = asyncio.Event(), asyncio.Event()

    async def slow(scope, receive, send):
        inside.set()
        await go.wait()
        await answer(scope, receive, send)

    app = Shell(slow)
    app.go.set()
    request = asyncio.create_task(call(app, "/v1/completions", ROUTE))
    await inside.wait()
    await call(app, guard.CLOSE_PATH, CONTROL)
    status, _, body = await repoint(app)
    assert (status, json.loads(body)) == (409, {"error": "requests are in flight: 1"})
    go.set()
    assert (await request)[0] == 200
    assert (await repoint(app))[0] == 200


async def test_a_refused_change_leaves_the_engine_as_it_was(keys):
    app = Shell(answer, guard.RepointRefused("another architecture"))
    app.go.set()
    await call(app, guard.CLOSE_PATH, CONTROL)
    status, _, body = await repoint(app)
    assert (status, json.loads(body)) == (409, {"error": "another architecture"})
    await call(app, guard.OPEN_PATH, CONTROL)
    assert (await call(app, "/v1/completions", ROUTE))[0] == 200


async def test_an_engine_that_stopped_half_way_never_serves_again(keys):
    app = Shell(answer, OSError("no such file"))
    app.go.set()
    await call(app, guard.CLOSE_PATH, CONTROL)
    status, _, body = await repoint(app)
    assert status == 500
    assert "half-way" in (words := json.loads(body)["error"])
    assert "no such file" in words
    assert (await call(app, guard.OPEN_PATH, CONTROL))[0] == 409
    assert (await call(app, "/v1/completions", CONTROL))[0] == 503
    assert (await repoint(app))[0] == 409


async def test_a_change_is_ended_though_the_agent_left(keys):
    app = Shell(answer)
    await call(app, guard.CLOSE_PATH, CONTROL)
    work = asyncio.create_task(repoint(app))
    await app.begun.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    app.go.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (await call(app, "/v1/models", b"Bearer other-secret"))[0] == 200


WRONG: list[dict[str, object]] = [
    {"more": 1}, {"names": []}, {"names": "b"}, {"names": [""]}, {"names": [1]},
    {"model_path": ""}, {"model_path": None}, {"route_key": ""}, {"route_key": 7},
]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"[" * 60_000, b"x" * (guard.REPOINT_BYTES + 1),
        *(json.dumps(WANTED | wrong).encode() for wrong in WRONG),
        json.dumps({"model_path": "/b", "names": ["b"]}).encode(),
    ],
)  # fmt: skip
async def test_a_body_that_says_no_model_changes_nothing(keys, body):
    app = Shell(answer)
    await call(app, guard.CLOSE_PATH, CONTROL)
    status, _, told = await repoint(app, sends=body)
    assert status == 400
    assert json.loads(told)["error"]
    assert app.wanted == []


async def test_the_plain_guard_says_that_its_engine_cannot_be_changed(keys):
    app = Guard(answer)
    await call(app, guard.CLOSE_PATH, CONTROL)
    status, _, body = await repoint(app)
    assert (status, "can't be changed" in json.loads(body)["error"]) == (409, True)
    assert (await call(app, guard.REPOINT_PATH, CONTROL, method="GET"))[0] == 405


async def test_websockets_are_refused_and_lifespan_passes(keys):
    seen, sent = [], []

    async def inner(scope, receive, send):
        seen.append(scope["type"])

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    app = Guard(inner)
    headers = [(b"authorization", CONTROL)]
    await app({"type": "websocket", "path": "/v1/realtime", "headers": headers}, receive, send)
    assert [m["type"] for m in sent] == ["websocket.close"]
    await app({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]


@pytest.mark.parametrize(
    ("let_in_for", "asked", "served"),
    [
        (b"m:sql", "m:sql", True),
        (b"m:sql", "m:secret", False),
        (b"m:sql", "m", False),
        (b"m", "m:secret", False),
        (b"m:sql", None, True),  # then the engine serves its own base
        (None, "m:secret", True),  # no router: the agent's own request
    ],
)
async def test_a_request_is_served_by_the_model_it_was_let_in_for(keys, let_in_for, asked, served):
    said = []

    async def inner(scope, receive, send):
        said.append(await asyncio.create_task(look()))  # frameworks make tasks of their own

    async def look():
        return guard.other_model(asked)

    named = [] if let_in_for is None else [(guard.MODEL_HEADER, let_in_for)]
    headers = [(b"authorization", ROUTE), *named]
    app = Guard(inner)
    scope = {"type": "http", "path": "/v1/completions", "headers": headers}
    await app(scope, None, None)
    assert [words is None for words in said] == [served]


def test_idle_time_comes_from_the_clock():
    now = [100.0]
    activity = guard.Activity(clock=lambda: now[0])
    activity.begin()
    activity.end()
    now[0] = 130.0
    assert activity.status() == {"in_flight": 0, "served": 1, "idle_for_s": 30.0}
