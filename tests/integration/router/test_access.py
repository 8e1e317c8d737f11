"""API keys, tenants, limits and admin roles on real routers and a real scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import openai
import pytest
import requests
from openai import AsyncOpenAI

from runtime.contract.access import KEY_PREFIX, KeySpec, Limits, Scope, StoredKey, Tenant, digest
from tests.kits import router_stack as kit
from tests.kits.checkout import ROOT
from tests.kits.cluster import Cluster, running, wait_until
from tests.kits.router_stack import Stack, eventually, unary

CHAT: Final = "/v1/chat/completions"
TOKEN = KEY_PREFIX + "aaaaaaaaaa-" + "s" * 43
SECRET = "s" * 43


@pytest.fixture(params=["plain", "handed over"])
async def stack(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """A router that lets nobody in without a key, by the front and by aiohttp's server."""
    async with kit.stack(tmp_path, anonymous="off") as made:
        if request.param == "handed over":
            made.make_calls_odd()
        yield made


def key(token: str = TOKEN, **spec: Any) -> StoredKey:
    return StoredKey(
        key_id=token[len(KEY_PREFIX) :][:10], digest=digest(token), created_at=0.0,
        spec=KeySpec(**({"tenant": "acme"} | spec)),
    )  # fmt: skip


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def call(stack: Stack, model: str = "m", path: str = CHAT, **headers: str) -> tuple:
    async with stack.post(path, {"model": model}, headers=headers) as response:
        body = await response.json()
        return response.status, body.get("error", {}).get("code"), response.headers


async def lets_in(stack: Stack, token: str = TOKEN) -> None:
    """Until the router knows the key."""
    async with asyncio.timeout(20):
        while (await call(stack, **bearer(token)))[0] != 200:
            await asyncio.sleep(0.02)


async def test_a_key_is_needed_and_never_reaches_the_engine_or_a_log(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = await stack.engine(unary())
    await stack.serve("m", engine)
    assert (await call(stack))[:2] == (503, "no_keys")
    await stack.scheduler.publish_keys(key())
    await lets_in(stack)
    assert (await call(stack, **{"X-Api-Key": TOKEN}))[0] == 200
    status, code, headers = await call(stack)
    assert (status, code, headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert (await call(stack, **bearer(TOKEN[:-1] + "x")))[:2] == (401, "invalid_api_key")
    assert not [r for r in engine.received if SECRET in str(r.headers)]
    assert SECRET not in caplog.text
    assert SECRET not in (await stack.metrics())
    await eventually((stack.state_dir / "keys.json").exists, "the keys are kept")
    kept = (stack.state_dir / "keys.json").read_text()
    assert SECRET not in kept
    assert digest(TOKEN) in kept
    assert (stack.state_dir / "keys.json").stat().st_mode & 0o077 == 0


async def test_a_revoked_key_opens_nothing_more(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    await stack.scheduler.publish_keys(key())
    await lets_in(stack)
    await stack.scheduler.publish_keys()
    async with asyncio.timeout(20):
        while (await call(stack, **bearer()))[:2] != (401, "invalid_api_key"):
            await asyncio.sleep(0.02)


async def test_scopes_of_models_and_endpoints(stack: Stack) -> None:
    engine = await stack.engine(unary())
    await stack.scheduler.publish(kit.model("m", engine), kit.model("secret", engine))
    await stack.scheduler.in_force()
    scope = Scope(models=("m",), endpoints=("/v1/chat/*",))
    await stack.scheduler.publish_keys(key(scope=scope))
    await lets_in(stack)
    assert (await call(stack, "secret", **bearer()))[:2] == (403, "not_allowed")
    assert (await call(stack, path="/v1/completions", **bearer()))[:2] == (403, "not_allowed")
    invoked = stack.post("/invoke/m", {"prompt": "x"}, headers=bearer())
    async with invoked as response:  # it stands for /v1/completions
        assert response.status == 403
    async with stack.session.get(stack.url + "/v1/models", headers=bearer()) as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["m"]
    async with stack.session.get(stack.url + "/v1/models/secret", headers=bearer()) as response:
        assert response.status == 403
    assert len(engine.received) == len([r for r in engine.received if r.json()["model"] == "m"])


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/{}", None),
        ("GET", "/models/{}/v1/models", None),
        ("GET", "/models/m/v1/models/{}", None),
        ("POST", "/models/{}/v1/chat/completions", {"messages": []}),
        ("POST", "/invoke/{}", {"prompt": "x"}),
        ("POST", CHAT, {"model": "{}"}),
        ("POST", "/v1/completions", {"model": "{}"}),
        ("POST", "/v1/embeddings", {"model": "{}"}),
        ("POST", "/v1/responses", {"model": "{}"}),
        ("POST", "/v1/messages", {"model": "{}"}),
        ("POST", "/v1/messages/count_tokens", {"model": "{}"}),
    ],
)
async def test_nobody_can_tell_a_model_outside_of_the_scope_from_none(
    stack: Stack, method: str, path: str, body: dict[str, object] | None
) -> None:
    engine = await stack.engine(unary())
    await stack.scheduler.publish(
        kit.model("m", engine, adapters=("m:theirs",)),
        kit.model("secret", engine, aliases=("hidden",)),
        kit.model("base", engine, adapters=("base:mine", "base:theirs")),
    )
    await stack.scheduler.in_force()
    await stack.scheduler.publish_keys(key(scope=Scope(models=("m", "base:mine"))))
    await lets_in(stack)

    async def told(name: str, later: bool) -> tuple[int, str, list[str]]:
        headers = bearer() | ({"Prefer": "respond-async"} if later else {})
        sent = body and json.loads(json.dumps(body).replace("{}", name))
        url = stack.url + path.replace("{}", name)
        async with stack.session.request(method, url, json=sent, headers=headers) as response:
            text, request_id = await response.text(), response.headers["X-Request-ID"]
            said = text.replace(request_id, "ID").replace(name, "NAME")
            return response.status, said, [n for n in response.headers if n != "Content-Length"]

    for later in (False, True) if "invoke" in path else (False,):
        status, said, headers = await told("nothere", later)
        assert status == 403, said
        for name in ("secret", "hidden", "base", "base:theirs"):
            assert await told(name, later) == (status, said, headers), name
    assert {r.json().get("model") for r in engine.received if r.body} <= {"m"}


async def test_requests_beyond_a_limit_get_429_with_when_to_come_back(stack: Stack) -> None:
    await stack.serve("m", await stack.engine(unary()))
    await stack.scheduler.publish_keys(key(), key(OTHER, limits=Limits(requests_per_min=3)))
    await lets_in(stack)
    answers = [await call(stack, **bearer(OTHER)) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429]
    assert answers[0][2]["x-ratelimit-limit-requests"] == "3"
    assert [a[2]["x-ratelimit-remaining-requests"] for a in answers[:3]] == ["2", "1", "0"]
    assert answers[3][1] == "rate_limit_exceeded"
    assert 1 <= int(answers[3][2]["Retry-After"]) <= 20
    assert (await call(stack, **bearer()))[0] == 200  # nobody else's affair


OTHER = KEY_PREFIX + "bbbbbbbbbb-" + "t" * 43


async def test_concurrent_requests_of_a_tenant(stack: Stack) -> None:
    hold = asyncio.Event()

    async def held(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        await unary()(received, writer)

    engine = await stack.engine(held)
    await stack.serve("m", engine)
    tenant = Tenant(name="acme", limits=Limits(concurrent=1))
    await stack.scheduler.publish_keys(key(), key(OTHER), tenants=(tenant,))
    first = asyncio.create_task(lets_in(stack))
    await eventually(lambda: engine.received, "the first call")
    assert (await call(stack, **bearer(OTHER)))[:2] == (429, "concurrency_limit")
    hold.set()
    await first
    assert (await call(stack, **bearer(OTHER)))[0] == 200


async def test_tenants_share_a_busy_model_and_priority_goes_first(tmp_path: Path) -> None:
    """One flooding tenant with ten calls in the queue, one of another tenant, one urgent one."""
    step = asyncio.Semaphore(0)

    async def one_by_one(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await step.acquire()
        await unary()(received, writer)

    urgent = KEY_PREFIX + "cccccccccc-" + "u" * 43
    async with kit.stack(tmp_path, anonymous="off", max_in_flight=1) as stack:
        engine = await stack.engine(one_by_one)
        await stack.serve("m", engine, target_concurrency=1)
        await stack.scheduler.publish_keys(
            key(), key(OTHER, tenant="small"), key(urgent, tenant="urgent", priority="high")
        )

        async def ask(word: str, token: str) -> int:
            async with stack.post(CHAT, {"model": "m", "x": word}, headers=bearer(token)) as answer:
                return answer.status

        step.release()
        await lets_in(stack)
        calls = [asyncio.create_task(ask(f"flood{i}", TOKEN)) for i in range(10)]
        await eventually(lambda: stack.scheduler.waiting() == 9, "the flood waits")
        calls += [asyncio.create_task(ask("small", OTHER)), asyncio.create_task(ask("now", urgent))]
        await eventually(lambda: stack.scheduler.waiting() == 11, "all wait")
        for _ in calls:
            step.release()
        assert await asyncio.gather(*calls) == [200] * 12
        order = [r.json()["x"] for r in engine.received if "x" in r.json()]
        assert order[0].startswith("flood")
        assert order[1] == "now"
        assert "small" in order[2:4]


async def test_a_client_that_waits_too_short_is_told_at_once(stack: Stack) -> None:
    await stack.serve("m", eta_s=40.0)
    await stack.scheduler.publish_keys(key())
    impatient = {"x-stainless-read-timeout": "10", **bearer()}
    async with asyncio.timeout(20):
        while (answer := await call(stack, **impatient))[0] != 503 or answer[1] == "no_keys":
            await asyncio.sleep(0.02)
    assert (answer[1], answer[2]["Retry-After"]) == ("not_in_time", "40")
    await eventually(lambda: stack.scheduler.waiting() == 1, "it is asked for all the same")


async def test_a_batch_goes_by_the_key_that_left_it(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow(received: kit.Received, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await unary(b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}')(received, writer)

    lines = [
        {"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": {"model": m, "messages": []}}
        for n, m in enumerate(["m", "secret", "m", "m"])
    ]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    async with kit.stack(tmp_path, anonymous="off", batch_concurrency=1) as stack:
        engine = await stack.engine(slow)
        await stack.scheduler.publish(kit.model("m", engine), kit.model("secret", engine))
        await stack.scheduler.in_force()
        await stack.scheduler.publish_keys(
            key(scope=Scope(models=("m",))), key(OTHER, tenant="other")
        )
        mine = AsyncOpenAI(base_url=stack.url + "/v1", api_key=TOKEN, max_retries=0)
        others = AsyncOpenAI(base_url=stack.url + "/v1", api_key=OTHER, max_retries=0)
        async with mine, others:
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(openai.APIStatusError):
                        file = await mine.files.create(file=("in", data), purpose="batch")
                        break
                    await asyncio.sleep(0.02)
            batch = await mine.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            with pytest.raises(openai.NotFoundError):
                await others.batches.retrieve(batch.id)
            with pytest.raises(openai.NotFoundError):
                await others.files.content(file.id)
            await eventually(lambda: engine.received, "the first line")
            await stack.scheduler.publish_keys(key(OTHER, tenant="acme"))  # mine is revoked
            await eventually(lambda: not lets(stack, TOKEN), "the router knows")
            go.set()
            async with asyncio.timeout(20):  # another key of the tenant sees it through
                while (batch := await others.batches.retrieve(batch.id)).status != "completed":
                    await asyncio.sleep(0.02)
            results = (await others.files.content(batch.error_file_id)).text.splitlines()
    codes = {r["custom_id"]: r["error"]["code"] for r in map(json.loads, results)}
    assert codes == {"c1": "not_allowed", "c2": "invalid_api_key", "c3": "invalid_api_key"} or (
        codes == {f"c{n}": "invalid_api_key" for n in (1, 2, 3)}
    )
    assert len(engine.received) == 1


def lets(stack: Stack, token: str) -> bool:
    """Whether the kept table has the key."""
    return digest(token) in (stack.state_dir / "keys.json").read_text()


async def test_the_metrics_need_a_token_too(stack: Stack) -> None:
    async with stack.session.get(stack.url + "/metrics") as response:
        assert response.status == 401
    async with stack.session.get(stack.url + "/metrics", headers=bearer(kit.TOKEN)) as response:
        assert response.status == 200
    async with stack.session.get(stack.url + "/healthz") as response:
        assert response.status == 200


async def test_keys_outlive_scheduler_and_router(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, anonymous="off") as stack:
        await stack.serve("m", await stack.engine(unary()))
        await stack.scheduler.publish_keys(key())
        await lets_in(stack)
        await stack.scheduler.stop()
        stack.registry.down = True
        assert (await call(stack, **bearer()))[0] == 200
        await stack.ask_to_stop()
        await stack.start_router(anonymous="off")
        assert (await call(stack, **bearer()))[0] == 200
        assert (await call(stack))[0] == 401


# --------------------------------------------------------------------------- the whole cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("access") / "state"
    with running(folder, "--devices", "simulated:1x24GiB", STOKER_ROUTER_ANONYMOUS="off") as made:
        made.add_stub("tiny")
        made.add_stub("other")
        yield made


def answers(url: str, token: str, statuses: tuple[int, ...]) -> bool:
    return ask(url, token).status_code in statuses


def ask(url: str, token: str, model: str = "tiny") -> requests.Response:
    body: dict[str, Any] = {"model": model, "prompt": "one two", "max_tokens": 4}
    return requests.post(f"{url}/v1/completions", json=body, headers=bearer(token), timeout=60)


def test_a_keys_whole_life_by_the_cli(cluster: Cluster) -> None:
    told = (cluster.state_dir.parent / "state.up.log").read_text()
    assert "callers need an API key" in told
    none_before = not json.loads(cluster.stoker("key", "ls", "--json"))["keys"]
    options = ("--note", "ci", "--model", "tiny", "--json")
    made = json.loads(cluster.stoker("key", "create", "acme", *options))
    token = made["token"]
    assert token.startswith(KEY_PREFIX)
    assert made["first"] == none_before
    assert not json.loads(cluster.stoker("key", "create", "acme", "--json"))["first"]
    key_id = token[len(KEY_PREFIX) :][:10]
    wait_until(lambda: ask(cluster.router, token).status_code == 200, "the key opens")
    assert ask(cluster.router, token, "other").status_code == 403
    assert requests.post(cluster.router + CHAT, json={"model": "tiny"}).status_code == 401
    listed = cluster.stoker("key", "ls")
    assert key_id in listed
    assert token[-43:] not in listed + cluster.stoker("key", "ls", "--json")

    cluster.stoker("key", "set", key_id, "--rpm", "100000")
    rotated = cluster.stoker("key", "rotate", key_id, "--grace", "1h").strip()
    wait_until(lambda: ask(cluster.router, rotated).status_code == 200, "the new secret opens")
    answer = ask(cluster.router, token)
    assert answer.status_code == 200  # within its grace
    assert answer.headers["x-ratelimit-limit-requests"] == "100000"
    last = cluster.stoker("key", "rotate", key_id, "--grace", "0s").strip()
    wait_until(lambda: ask(cluster.router, rotated).status_code == 401, "the old one is shut")
    assert ask(cluster.router, last).status_code == 200

    cluster.kill_part("scheduler")
    wait_until(lambda: cluster.try_admin("/admin/keys"), "the scheduler is back")
    assert key_id in cluster.stoker("key", "ls")
    assert ask(cluster.router, last).status_code == 200
    cluster.stoker("key", "rm", key_id)
    wait_until(lambda: ask(cluster.router, last).status_code == 401, "the key is revoked")
    everything = b"".join(p.read_bytes() for p in cluster.state_dir.rglob("*") if p.is_file())
    for secret in (token, rotated, last):
        assert secret[-43:].encode() not in everything


def test_use_is_counted_and_outlives_the_scheduler(cluster: Cluster) -> None:
    token = cluster.stoker("key", "create", "counted").strip()
    wait_until(lambda: ask(cluster.router, token).status_code == 200, "the key opens")

    def used() -> dict:
        accounts = json.loads(cluster.stoker("usage", "--json"))["accounts"]
        return next((a for a in accounts if a["account"] == "tenant:counted"), {})

    wait_until(lambda: used().get("requests", 0) >= 1 and used()["in_flight"] == 0, "it is told")
    before = used()
    assert before["gpu_s"] > 0
    time.sleep(6)  # it is stored each 5 s
    cluster.kill_part("scheduler")
    wait_until(lambda: cluster.try_admin("/admin/usage"), "the scheduler is back")
    after = wait_until(used, "the use is known still")
    assert after["requests"] >= before["requests"]
    assert "tenant:counted" in cluster.stoker("usage")


def test_two_routers_hold_a_tenant_to_one_limit(cluster: Cluster, tmp_path: Path) -> None:
    config = (cluster.state_dir / "up.toml").read_text()
    mine = tmp_path / "second"
    mine.mkdir()
    (mine / "second.toml").write_text(config)
    environ = os.environ | {
        "STOKER_CONFIG": str(mine / "second.toml"),
        "STOKER_ROUTER_PORT": "0",
        "STOKER_STATE_DIR": str(mine),
        "STOKER_REGISTRY_FILE": str(cluster.state_dir / "registry.db"),
    }  # fmt: skip
    argv = [sys.executable, "-m", "cli.main", "router", "--json"]
    second = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ)
    try:
        url = json.loads(second.stdout.readline())["url"]
        token = cluster.stoker("key", "create", "shared", "--tokens-per-day", "40").strip()
        for router in (cluster.router, url):
            wait_until(partial(answers, router, token, (200, 429)), "the key opens")
        # Each call costs tokens; whichever router takes them, in the end both refuse.
        for router in (cluster.router, url):
            wait_until(partial(answers, router, token, (429,)), "the quota is spent")
        refused = ask(url, token)
        assert refused.json()["error"]["code"] == "quota_exceeded"
        assert int(refused.headers["Retry-After"]) >= 1
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(30)


def test_roles_of_admin_tokens(cluster: Cluster) -> None:
    tokens = {
        role: cluster.stoker("token", "create", f"the-{role}", "--role", role).strip()
        for role in ("viewer", "operator", "admin")
    }
    admin = cluster.up["admin"]

    def status(role: str, method: str, path: str, body: Any = None) -> int:
        url, headers = admin + path, bearer(tokens[role])
        return requests.request(method, url, json=body, headers=headers, timeout=30).status_code

    spec = {"name": "x", "source": "/stub", "engine": "stub", "device_memory_bytes": "1GiB"}
    load, keys = ("POST", "/admin/models/tiny/load", {"replicas": 1}), ("POST", "/admin/keys")
    allowed = {
        "viewer": [200, 403, 403, 403, 403],
        "operator": [200, 202, 403, 403, 403],
        "admin": [200, 202, 201, 201, 200],
    }
    for role, expected in allowed.items():
        got = [
            status(role, "GET", "/admin/models"),
            status(role, *load),
            status(role, "POST", "/admin/models", spec),
            status(role, *keys, {"tenant": "t"}),
            status(role, "GET", "/admin/tokens"),
        ]
        assert got == expected, role
    rule = {"name": "pub-x", "targets": [{"model": "tiny"}]}
    puts = [status(role, "PUT", "/admin/routes/pub-x", rule) for role in allowed]
    assert puts == [403, 403, 201]
    assert status("admin", "POST", "/admin/keys", {"tenant": "anonymous"}) == 422
    for role in tokens:  # what parts say to each other is theirs alone
        assert status(role, "GET", "/internal/keys") == 401
        assert status(role, "GET", "/internal/routes") == 401
    listed = json.loads(cluster.stoker("token", "ls", "--json"))["tokens"]
    viewer = next(t["token_id"] for t in listed if t["name"] == "the-viewer")
    cluster.stoker("token", "rm", viewer)
    assert status("viewer", "GET", "/admin/models") == 401
    trail = cluster.admin("GET", "/admin/audit?limit=500")["audit"]
    assert {"create_token", "delete_token", "create_key"} <= {entry["action"] for entry in trail}
    assert ("the-admin", "create_key") in {(entry["who"], entry["action"]) for entry in trail}
    made = {
        e["subject"] for e in trail if e["who"] == "the-admin" and e["action"] == "create_model"
    }
    assert made == {f"/admin/models/{spec['name']}"}
    for action in ("create_key", "create_token"):  # each is named by its id, not by its secret
        subjects = [e["subject"] for e in trail if e["action"] == action]
        assert len(set(subjects)) == len(subjects)
    assert not [secret for secret in tokens.values() if secret[-43:] in json.dumps(trail)]


def test_what_is_wrong_is_named(cluster: Cluster) -> None:
    assert "no key 'nope'" in cluster.stoker("key", "rm", "nope", status=1)
    assert "tenant" in cluster.stoker("key", "create", "no spaces please", status=1)
    assert "begin with '/'" in cluster.stoker(
        "key", "create", "t", "--endpoint", "v1/chat", status=1
    )
    cluster.stoker("key", "create", "busy")
    cluster.stoker("tenant", "set", "busy", "--weight", "2", "--rpm", "5")
    assert "5 req/min" in cluster.stoker("tenant", "ls")
    assert "has 1 keys" in cluster.stoker("tenant", "rm", "busy", status=1)
