"""The stub as a process: its start, guard, answers, streams, failures and end."""

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import time
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from runtime.contract.schema import SchemaError
from runtime.engine import guard
from runtime.engine.select import get_engine
from tests.kits.stub_engine import CONTROL, ROUTE, Engine, context, running, spec, until

CHAT: Any = {"model": "m", "messages": [{"role": "user", "content": "alpha beta gamma"}]}

CTX = context(0)


def events(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def test_starts_when_modelled_and_says_what_it_is():
    engine = Engine(start_s=0.5)
    try:
        await until(lambda: engine._is(503))
        status, _ = await engine.post("/v1/chat/completions", CHAT)
        assert status == 503
        await engine.ready()
        async with engine.http.get("/v1/models") as got:
            assert got.headers["x-stoker-engine"] == "stub"
            cards = (await got.json())["data"]
        assert [(c["id"], c["owned_by"]) for c in cards] == [
            ("m", "stoker-stub"),
            ("org/m", "stoker-stub"),
        ]
    finally:
        await engine.close()


async def test_answers_chat_with_the_prompts_words(engine):
    status, body = await engine.post("/v1/chat/completions", {**CHAT, "max_tokens": 5, "n": 3})
    assert status == 200
    assert body["system_fingerprint"] == "stoker-stub"
    assert len(body["choices"]) == 1
    assert body["choices"][0]["message"]["content"] == "alpha beta gamma alpha beta"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    _, again = await engine.post("/v1/chat/completions", {**CHAT, "max_tokens": 5})
    assert again["choices"] == body["choices"]
    _, default = await engine.post("/v1/chat/completions", CHAT)
    assert default["usage"]["completion_tokens"] == 16


async def test_it_takes_null_and_answers_by_its_first_name_as_vllm_does(engine):
    asked = {**CHAT, "model": "org/m", "max_tokens": 1, "stream": None, "stream_options": None}
    status, body = await engine.post("/v1/chat/completions", asked)
    assert (status, body["model"]) == (200, "m")
    status, body = await engine.post("/v1/embeddings", {"model": "org/m", "input": "x"})
    assert (status, body["model"]) == (200, "m")


async def test_streams_one_word_an_event(engine):
    asked = {
        **CHAT, "stream": True, "max_completion_tokens": 3,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    async with engine.http.post("/v1/chat/completions", json=asked) as got:
        assert got.headers["Content-Type"].startswith("text/event-stream")
        found = events(await got.text())
    assert found.pop() == "[DONE]"
    *chunks, usage = [json.loads(event) for event in found]
    assert [c["choices"][0]["delta"]["content"] for c in chunks] == ["alpha", " beta", " gamma"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3


async def test_it_tells_usage_of_a_stream_only_where_it_is_asked_to_as_vllm_does(engine):
    asked = {**CHAT, "stream": True, "max_tokens": 2}
    both = {"include_usage": True, "continuous_usage_stats": True}
    for options, told in (
        (None, 0), ({}, 0), ({"include_usage": None}, 0), ({"include_usage": True}, 1),
        ({"continuous_usage_stats": True}, 0), (both, 3),
    ):  # fmt: skip
        body = {**asked, "stream_options": options}
        async with engine.http.post("/v1/chat/completions", json=body) as got:
            assert (await got.text()).count('"usage"') == told
    body = {**CHAT, "stream_options": {"include_usage": False}}
    status, error = await engine.post("/v1/chat/completions", body)
    assert status == 400
    assert "only be defined when" in error["error"]["message"]


async def test_the_openai_client_is_content_with_it(engine):
    client = openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key=ROUTE, max_retries=0)
    async with client:
        stream = await client.chat.completions.create(**CHAT, stream=True, max_tokens=2)
        words = [chunk.choices[0].delta.content async for chunk in stream]
        assert words == ["alpha", " beta"]
        done = await client.completions.create(model="org/m", prompt="one two", max_tokens=3)
        assert done.choices[0].text == "one two one"
        found = await client.embeddings.create(model="m", input=["a", "b", "a"])
        first, second, third = (item.embedding for item in found.data)
        assert first == third != second
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")


async def test_refuses_bad_bodies_as_openai_does(engine):
    for path, body in [
        ("/v1/chat/completions", {"model": "m"}),
        ("/v1/chat/completions", {**CHAT, "messages": []}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}),
        ("/v1/completions", {"model": "m", "prompt": 7}),
        ("/v1/embeddings", {"model": "m"}),
    ]:
        status, answer = await engine.post(path, body)
        assert (status, answer["error"]["code"]) == (400, 400), (path, body)
        assert answer["error"]["message"].startswith("invalid request body: it is not what")
    for kind in ("text/plain", "", "application/json ; charset=utf-8"):
        headers = {"Authorization": f"Bearer {CONTROL}", "Content-Type": kind}
        chat = json.dumps(CHAT).encode()
        async with engine.http.post("/v1/completions", data=chat, headers=headers) as got:
            answer = await got.json()
            assert (got.status, answer["error"]["code"]) == (400, 400), kind
            assert "Only 'application/json' is allowed" in answer["error"]["message"]


async def test_serves_no_other_model_than_it_was_let_in_for(engine):
    for name, status in (("m", 200), ("other", 403)):
        headers = {"Authorization": f"Bearer {ROUTE}", "X-Stoker-Model": name}
        async with engine.http.post("/v1/chat/completions", json=CHAT, headers=headers) as got:
            assert got.status == status


async def test_is_guarded_like_vllm(engine):
    status, body = await engine.post("/v1/chat/completions", CHAT, key="wrong")
    assert (status, body["error"]["code"]) == (401, 401)
    assert (await engine.post("/v1/chat/completions", CHAT, key=ROUTE))[0] == 200
    assert (await engine.post("/sleep", key=ROUTE))[0] == 403
    headers = {"Authorization": f"Bearer {ROUTE}"}
    for path in ("/metrics", "/is_sleeping", "/stoker/status", "/nothing-here"):
        async with engine.http.get(path, headers=headers) as got:
            assert got.status == 403, path
    assert (await engine.post("/nothing-here"))[0] == 404


async def test_other_routes():
    async with running() as engine:
        _, tokens = await engine.post("/tokenize", {"model": "m", "prompt": "one two one"})
        assert tokens["count"] == 3
        assert tokens["tokens"][0] == tokens["tokens"][2] != tokens["tokens"][1]
        await engine.post("/v1/chat/completions", {**CHAT, "max_tokens": 4})
        async with engine.http.get("/metrics") as got:
            metrics = await got.text()
        assert 'vllm:num_requests_running{model_name="m",engine="stub"} 0' in metrics
        assert 'vllm:generation_tokens_total{model_name="m",engine="stub"} 4' in metrics


async def test_a_client_that_leaves_stops_its_request():
    async with running(token_s=3600) as engine:
        for stream in (True, False):
            before = (await engine.status())["served"]
            asked = asyncio.create_task(
                engine.post("/v1/chat/completions", {**CHAT, "stream": stream}, key=ROUTE)
            )
            await until(lambda: in_flight(engine, 1))
            asked.cancel()
            await until(lambda: in_flight(engine, 0))
            status = await engine.status()
            assert status["served"] == before + 1
            assert status["idle_for_s"] >= 0


async def in_flight(engine, count):
    return (await engine.status())["in_flight"] == count


async def test_sleeps_and_wakes():
    async with running(sleep_s=0, wake_1_s=0, wake_2_s=0) as engine:
        for level in (1, 2):
            assert (await engine.post(f"/sleep?level={level}"))[0] == 200
            async with engine.http.get("/is_sleeping") as got:
                assert await got.json() == {"is_sleeping": True}
            status, body = await engine.post("/v1/chat/completions", CHAT)
            assert (status, body["error"]["message"]) == (503, "the engine is asleep")
            assert await engine.health() == 200
            assert (await engine.post("/wake_up"))[0] == 200
            assert (await engine.post("/v1/chat/completions", CHAT))[0] == 200
        assert (await engine.post("/sleep?level=3"))[0] == 400


async def told(engine):
    """What one completion says."""
    body = {"model": "m", "prompt": "alpha beta", "max_tokens": 1}
    return (await engine.post("/v1/completions", body))[1]["choices"][0]["text"]


async def asleep(engine):
    async with engine.http.get("/is_sleeping") as got:
        return (await got.json())["is_sleeping"]


RELOAD = ("/collective_rpc", {"method": "reload_weights"})
WEIGHTS, KV = ("/wake_up?tags=weights", None), ("/wake_up?tags=kv_cache", None)


@pytest.mark.parametrize(
    ("level", "steps", "well"),
    [
        (1, [("/wake_up", None)], True),
        (1, [WEIGHTS, KV], True),
        (2, [WEIGHTS, RELOAD, KV], True),
        (2, [("/wake_up", None)], False),
        (2, [WEIGHTS, KV], False),
        (2, [WEIGHTS, KV, RELOAD], False),
        (2, [KV, WEIGHTS, RELOAD], False),
    ],
)
async def test_only_the_right_order_brings_the_weights_back(level, steps, well):
    async with running(sleep_s=0, wake_1_s=0, wake_2_s=0) as engine:
        await engine.post(f"/sleep?level={level}&mode=wait")
        for path, body in steps:
            assert (await engine.post(path, body))[0] == 200
        assert not await asleep(engine)
        assert await told(engine) == ("alpha" if well else "!")
        found = (await engine.post("/v1/embeddings", {"model": "m", "input": "alpha"}))[1]
        wrong = (await engine.post("/v1/embeddings", {"model": "m", "input": "!"}))[1]
        assert (found["data"] != wrong["data"]) == well


async def test_it_sleeps_until_its_last_tag_and_cannot_reload_before_its_weights_are_awake():
    async with running(sleep_s=0, wake_2_s=0) as engine:
        await engine.post("/sleep?level=2")
        assert (await engine.post(*RELOAD))[0] == 500
        assert (await engine.post(*WEIGHTS))[1]["status"] == "sleeping"
        assert await asleep(engine)
        await engine.post(*RELOAD)
        assert (await engine.post(*KV))[1]["status"] == "awake"
        assert await told(engine) == "alpha"


async def test_it_can_be_told_to_wake_up_mad():
    async with running(sleep_s=0, wake_1_s=0, wake_gibberish=True) as engine:
        assert await told(engine) == "alpha"
        await engine.post("/sleep?level=1")
        await engine.post("/wake_up")
        assert await told(engine) == "!"


async def test_mode_wait_waits_for_requests_and_mode_abort_ends_them():
    async with running(sleep_s=0, wake_1_s=0, token_s=0.02) as engine:
        for mode, status in (("wait", 200), ("abort", 503)):
            request = asyncio.create_task(
                engine.post("/v1/chat/completions", {**CHAT, "max_tokens": 40}, key=ROUTE)
            )
            await until(lambda: in_flight(engine, 1))
            assert (await engine.post(f"/sleep?level=1&mode={mode}"))[0] == 200
            assert await in_flight(engine, 0)
            assert (await request)[0] == status
            await engine.post("/wake_up")
        assert (await engine.post("/sleep?mode=keep"))[0] == 400


async def test_a_closed_door_is_open_to_the_agent_only():
    async with running() as engine:
        status, answer = await engine.post("/stoker/close")
        assert (status, answer["in_flight"]) == (200, 0)
        status, body = await engine.post("/v1/chat/completions", CHAT, key=ROUTE)
        assert (status, body["error"]["code"]) == (503, 503)
        assert await told(engine) == "alpha"
        assert (await engine.status())["served"] == 0
        assert (await engine.post("/stoker/open", key=ROUTE))[0] == 403
        await engine.post("/stoker/open")
        assert (await engine.post("/v1/chat/completions", CHAT, key=ROUTE))[0] == 200
        assert (await engine.status())["served"] == 1


async def test_sigterm_lets_requests_end_and_exits_0():
    async with running(token_s=0.05) as engine:
        body = {**CHAT, "max_tokens": 20, "stream": True}
        async with engine.http.post("/v1/chat/completions", json=body) as got:
            first = await got.content.readuntil(b"\n\n")
            engine.process.send_signal(signal.SIGTERM)
            rest = await got.content.read()
        found = events((first + rest).decode())
        assert len(found) == 21
        assert found[-1] == "[DONE]"
        status, log = await engine.ended()
        assert status == 0
        assert get_engine("stub").explain_exit(status, log)[0] == "exited"


@pytest.mark.parametrize("kind", ["oom", "bad_model", "crash"])
async def test_fails_to_start_when_told_to(kind):
    engine = Engine(start_s=0, fail_start=kind)
    try:
        status, log = await engine.ended()
    finally:
        await engine.close()
    assert status == 1
    assert "modelled by the stub" in log
    assert get_engine("stub").explain_exit(status, log)[0] == kind


async def test_crashes_after_so_many_requests():
    async with running(crash_after_requests=2) as engine:
        for _ in range(2):
            assert (await engine.post("/v1/chat/completions", CHAT, key=ROUTE))[0] == 200
        assert (await engine.post("/v1/chat/completions", CHAT))[0] == 200, "the agent's own"
        with pytest.raises(aiohttp.ClientError):
            await engine.post("/v1/chat/completions", CHAT, key=ROUTE)
        status, log = await engine.ended()
        assert get_engine("stub").explain_exit(status, log)[0] == "crash"


async def test_fails_every_so_many_requests():
    async with running(fail_every=2) as engine:
        statuses = [(await engine.post("/v1/chat/completions", CHAT, key=ROUTE))[0] for _ in "1234"]
        assert statuses == [200, 500, 200, 500]


B = {"model_path": "b", "names": ["b", "org/b"], "route_key": "b-secret"}


async def test_it_changes_to_another_model():
    async with running(repoint_s=0.05) as engine:
        assert (await engine.post("/stoker/repoint", B, key=ROUTE))[0] == 403
        assert (await engine.post("/stoker/repoint", B))[0] == 409, "the door is open"
        await engine.post("/stoker/close")
        begun = time.monotonic()
        status, told = await engine.post("/stoker/repoint", B)
        assert (status, told) == (200, {"phases": {"reload": 0.05, "renew": 0.0}})
        assert time.monotonic() - begun >= 0.05
        asked = {**CHAT, "max_tokens": 1}
        assert (await engine.post("/v1/chat/completions", asked, key=ROUTE))[0] == 401
        assert (await engine.post("/v1/chat/completions", asked, key="b-secret"))[0] == 503
        assert (await engine.post("/v1/chat/completions", asked))[0] == 404, "its old name"
        status, body = await engine.post("/v1/chat/completions", {**asked, "model": "org/b"})
        assert (status, body["model"]) == (200, "b")
        await engine.post("/stoker/open")
        asked = {**asked, "model": "b"}
        assert (await engine.post("/v1/chat/completions", asked, key="b-secret"))[0] == 200
        async with engine.http.get("/v1/models") as got:
            assert [card["id"] for card in (await got.json())["data"]] == ["b", "org/b"]
        async with engine.http.get("/metrics") as got:
            metrics = await got.text()
        assert 'vllm:num_requests_running{model_name="b",engine="stub"} 0' in metrics
        assert '"m"' not in metrics


@pytest.mark.parametrize("level", [1, 2])
async def test_a_sleeper_changes_to_another_model(level):
    async with running(sleep_s=0, repoint_s=0, wake_1_s=0) as engine:
        await engine.post("/stoker/close")
        await engine.post(f"/sleep?level={level}&mode=wait")
        await engine.post("/wake_up?tags=weights")
        assert (await engine.post("/stoker/repoint", B))[0] == 200
        await engine.post("/wake_up?tags=kv_cache")
        status, body = await engine.post("/v1/completions", {"model": "b", "prompt": "one"})
        assert (status, body["choices"][0]["text"].split()[0]) == (200, "one")


async def test_a_change_without_memory_for_weights_loses_the_engine():
    async with running(sleep_s=0, repoint_s=0) as engine:
        await engine.post("/stoker/close")
        await engine.post("/sleep?level=1&mode=wait")
        status, told = await engine.post("/stoker/repoint", B)
        assert (status, "no weights" in told["error"]) == (500, True)
        await engine.post("/wake_up")
        assert (await engine.post("/stoker/open"))[0] == 409
        assert (await engine.post("/v1/completions", {"model": "m", "prompt": "one"}))[0] == 503


async def test_a_change_may_end_in_nonsense_or_fail():
    async with running(repoint_s=0, repoint_gibberish=True) as engine:
        await engine.post("/stoker/close")
        assert (await engine.post("/stoker/repoint", B))[0] == 200
        asked = {"model": "b", "prompt": "one", "max_tokens": 2}
        _, body = await engine.post("/v1/completions", asked)
        assert body["choices"][0]["text"] == "! !"
    async with running(fail_repoint="refused") as engine:
        await engine.post("/stoker/close")
        assert (await engine.post("/stoker/repoint", B))[0] == 409
        assert (await engine.post("/stoker/open"))[0] == 200
        assert (await engine.post("/v1/chat/completions", CHAT, key=ROUTE))[0] == 200
    async with running(repoint_s=0, fail_repoint="half_way") as engine:
        await engine.post("/stoker/close")
        assert (await engine.post("/stoker/repoint", B))[0] == 500


def shell_key(version="1", ctx=None, model=None, **engine_args):
    args = {"shell": "s", **engine_args}
    model = msgspec.structs.replace(spec(**args), **model or {})
    return get_engine("stub").shell_key(model, msgspec.structs.replace(CTX, **ctx or {}), version)


def test_engines_that_can_be_changed_to_each_other_share_a_key():
    key = shell_key()
    assert int(key, 16) >= 0
    assert key == shell_key(model={"name": "other", "aliases": (), "source": "elsewhere"})
    assert key == shell_key(ctx={"replica_id": "q", "port": 9, "route_key": "k", "model_path": "q"})
    assert key == shell_key(start_s=0.2), "the default, told"
    others = [
        shell_key(shell="t"), shell_key(token_s=1), shell_key(version="2"),
        shell_key(ctx={"device_bytes": 2}), shell_key(ctx={"kv_bytes": 5}),
        shell_key(ctx={"device_kind": "cpu"}), shell_key(model={"env": {"A": "1"}}),
        shell_key(model={"sleep": "off"}), shell_key(model={"media_domains": ("a.org",)}),
        shell_key(model={"tensor_parallel_size": 2}),
    ]  # fmt: skip
    assert len({key, *others}) == len(others) + 1
    assert None not in others


def test_an_engine_that_can_be_changed_to_nothing_has_no_key():
    assert shell_key(shell="") is None
    assert shell_key(enable_lora=True) is None
    assert shell_key(model={"adapters": {"sql": "/a"}}) is None


def test_what_the_agent_asks_of_it():
    ctx = msgspec.structs.replace(CTX, model_path="b", route_key="b-secret")
    model = msgspec.structs.replace(spec(), name="b", aliases=("org/b",))
    body = json.loads(json.dumps(get_engine("stub").repoint(model, ctx)))
    assert body == B
    assert guard.read_repoint(json.dumps(body).encode()) == guard.Repoint(
        "b", ("b", "org/b"), "b-secret"
    )


async def test_a_port_in_use_and_missing_keys_end_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        engine = Engine(port=taken.getsockname()[1])
        try:
            status, log = await engine.ended()
        finally:
            await engine.close()
    assert get_engine("stub").explain_exit(status, log)[0] == "port_in_use"
    env = {"PYTHONPATH": engine.launch.env["PYTHONPATH"]}
    start = functools.partial(subprocess.run, capture_output=True, text=True)
    done = await asyncio.to_thread(start, engine.launch.argv, env=env, cwd="/")
    assert done.returncode == 1
    assert "STOKER_ROUTE_KEY and STOKER_CONTROL_KEY not set" in done.stderr


async def test_a_killed_stub_is_told_from_one_that_ended():
    async with running() as engine:
        os.kill(engine.process.pid, signal.SIGKILL)
        status, log = await engine.ended()
        assert get_engine("stub").explain_exit(status, log)[0] == "killed"


def test_its_arguments_are_checked():
    stub = get_engine("stub")
    problems, against = stub.check_args(spec(start_s=1, fail_start="oom"), "", "")
    assert problems == []
    assert against.startswith("stub ")
    problems, _ = stub.check_args(spec(start=1, token_s=-1, fail_start="fire"), "", "")
    assert [p.field for p in problems] == [
        "engine_args.start",
        "engine_args.token_s",
        "engine_args.fail_start",
    ]
    assert problems[0].fix == "did you mean 'start_s'?"
    with pytest.raises(SchemaError):
        Engine(token_s="fast")
