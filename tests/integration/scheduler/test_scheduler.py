"""The scheduler for real: HTTP, a registry file, and an agent that is a small web app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
from aiohttp import web
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from yarl import URL

from runtime import outside
from runtime.contract.config import Config, RegistryConfig, SchedulerConfig
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from runtime.wire.agent_messages import (
    AgentCommand,
    CommandReply,
    DeviceReport,
    Heartbeat,
    Inspection,
    MemoryEstimate,
    ReplicaReport,
    SpecProblem,
    StartReplica,
)
from runtime.wire.routes import DemandReport, ModelDemand, RouteTable
from scheduler.access import Access
from scheduler.admin.route_table import ADMIN
from scheduler.main import run_scheduler
from scheduler.store import Store

TOKEN = "secret-token"
SCRAPER = "a-scrapers-token"
GIB = 2**30


@dataclass
class Agent:
    """Obeys at once and reports when told to."""

    url: str = ""
    seq: int = 0
    replicas: dict[str, StartReplica] = field(default_factory=dict)
    refuse: str | None = None
    epoch: int = 0
    inspection: Inspection = field(default_factory=Inspection)
    asked: list[str] = field(default_factory=list)  # but for commands

    async def commands(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        command: AgentCommand = outside.decode(await request.read(), AgentCommand)
        if isinstance(command, StartReplica) and self.refuse is None:
            self.replicas[command.replica_id] = command
        elif not isinstance(command, StartReplica):
            self.replicas.pop(command.replica_id, None)
        reply = CommandReply(ok=self.refuse is None, boot_id=1, seq=self.seq + 1, error=self.refuse)
        return web.Response(body=msgspec.json.encode(reply))

    async def inspect(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(body=msgspec.json.encode(self.inspection))

    async def other(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(status=404)

    async def logs(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        if request.match_info["id"] == "gone-1-1":
            return web.Response(status=404)
        return web.Response(text=f"log of {request.match_info['id']} tail={request.query['tail']}")

    def heartbeat(self) -> Heartbeat:
        self.seq += 1
        device = DeviceReport(
            device_id="g0", index=0, kind="simulated", name="x",
            memory_total_bytes=24 * GIB, memory_used_bytes=0,
        )  # fmt: skip
        replicas = tuple(
            ReplicaReport(
                replica_id=c.replica_id, epoch=c.epoch, model=c.spec.name,
                launch_key=c.spec.launch_key(), device_ids=c.device_ids,
                device_bytes=c.device_bytes, phase="ready", phase_age_s=0.0,
                base_url="http://127.0.0.1:9", key="k",
            )
            for c in self.replicas.values()
        )  # fmt: skip
        return Heartbeat(
            node_id="n1", boot_id=1, seq=self.seq, address=self.url, devices=(device,),
            replicas=replicas, engines={"stub": "1"}, epoch=self.epoch,
        )  # fmt: skip


class Client:
    """The admin API with the token."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def __call__(
        self, method: str, path: str, body: object = None, token: str = TOKEN
    ) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body) if body else None
        headers = {"Authorization": f"Bearer {token}"}
        async with self.session.request(
            method, self.url + path, data=data, headers=headers
        ) as response:
            raw = await response.read()
            is_json = raw[:1] in (b"{", b"[")
            return response.status, msgspec.json.decode(raw) if is_json else raw.decode()

    async def beat(self, agent: Agent) -> None:
        status, _ = await self(
            "POST", "/internal/heartbeat", msgspec.json.encode(agent.heartbeat())
        )
        assert status == 200

    async def demand(self, seq: int, **waiting: int) -> None:
        report = DemandReport(
            router_id="r", boot_id=1, seq=seq, routes_version=2**60,
            models=tuple(ModelDemand(model=n, waiting=c) for n, c in waiting.items()),
        )  # fmt: skip
        status, _ = await self("POST", "/internal/demand", msgspec.json.encode(report))
        assert status == 204

    async def table(self, since: int = 0, wait_s: float = 0) -> RouteTable | None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = f"{self.url}/internal/routes?since={since}&wait_s={wait_s}"
        async with self.session.get(url, headers=headers) as response:
            raw = await response.read()
            return outside.decode(raw, RouteTable) if response.status == 200 else None


async def until(condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    deadline = asyncio.get_running_loop().time() + limit_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"never: {what}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def scheduler(tmp_path, registry: EmbeddedRegistry) -> AsyncIterator[str]:
    config = Config(
        state_dir=str(tmp_path), cluster_token=TOKEN, metrics_token=SCRAPER,
        scheduler=SchedulerConfig(port=0, min_dwell_s=0.0),
        registry=RegistryConfig(file=str(tmp_path / "registry.db")),
    )  # fmt: skip
    stop, ready = asyncio.Event(), asyncio.Event()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    task = asyncio.create_task(run_scheduler(config, registry, stop=stop, on_ready=on_ready))
    await asyncio.wait_for(ready.wait(), 10)
    try:
        yield urls[0]
    finally:
        stop.set()
        await task


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    fake = Agent()
    app = web.Application()
    app.router.add_post("/agent/commands", fake.commands)
    app.router.add_post("/agent/inspect", fake.inspect)
    app.router.add_get("/agent/replicas/{id}/logs", fake.logs)
    app.router.add_route("*", "/{rest:.*}", fake.other)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


@pytest.fixture
async def registry(tmp_path) -> AsyncIterator[EmbeddedRegistry]:
    opened = EmbeddedRegistry(tmp_path / "registry.db")
    yield opened
    await opened.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def leading(client: Client, agent: Agent | None = None) -> None:
    for _ in range(200):
        status, body = await client("GET", "/readyz")
        if status == 200:
            return
        if agent is not None and body["leader"]:
            await client.beat(agent)
        await asyncio.sleep(0.05)
    raise AssertionError(f"never ready: {body}")


A = {"name": "a", "source": "/m", "engine": "stub", "device_memory_bytes": "10GiB"}


async def test_from_a_spec_to_a_route_and_back(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, saved = await client("POST", "/admin/models", A)
        assert (status, saved["created"], saved["model"]["warmth"]) == (201, True, "cold")
        assert (await client("POST", "/admin/models", A))[0] == 409
        assert (await client("PUT", "/admin/models/a", {**A, "idle_s": 9}))[0] == 200
        table = await client.table()
        waiter = asyncio.create_task(client.table(table.version, 10))
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "the agent was told to start")
        started = await waiter
        assert started.models[0].waiting_for == "starting on n1 (g0)"
        await client.beat(agent)
        hot = await client.table(started.version, 10)
        assert hot.models[0].endpoints[0].replica_id == "a-1-1"
        _, listed = await client("GET", "/admin/replicas")
        assert [r["state"] for r in listed["replicas"]] == ["ready"]
        _, devices = await client("GET", "/admin/devices")
        assert devices["devices"][0]["booked_bytes"] == 10 * GIB
        _, log = await client("GET", "/admin/replicas/a-1-1/logs?tail=5")
        assert log == "log of a-1-1 tail=5"
        await client.demand(2)
        assert (await client("POST", "/admin/models/a/unload"))[0] == 202
        await until(lambda: not agent.replicas, "the agent was told to stop")
        assert (await client("POST", "/admin/models/a/unload"))[0] == 202  # what leaves is no bar
        await client.beat(agent)
        assert (await client("GET", "/admin/replicas"))[1]["replicas"] == []
        _, decisions = await client("GET", "/admin/decisions?model=a")
        assert [d["action"] for d in decisions["decisions"]] == ["stop", "start"]
        assert decisions["decisions"][1]["cause"] == "1 request waiting"
        assert (await client("DELETE", "/admin/models/a"))[0] == 204
        assert (await client("GET", "/admin/models"))[1]["models"] == []


async def test_specs_pins_and_cordons_survive_a_restart(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client("POST", "/admin/models", A)
        await client("POST", "/admin/nodes/n1/cordon")
        await client("POST", "/admin/models/a/pin", {"pinned": True})
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        _, health = await client("GET", "/healthz")
        assert health["term"] == 2
        _, model = await client("GET", "/admin/models/a")
        assert model["pinned"] is True
        await client.beat(agent)
        assert (await client("GET", "/admin/nodes"))[1]["nodes"][0]["state"] == "cordoned"
        assert not agent.replicas
        await client("POST", "/admin/nodes/n1/uncordon")
        await until(lambda: agent.replicas, "the pinned model was started")


async def test_bad_specs_are_refused_and_nothing_is_stored(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, body = await client("POST", "/admin/models", {**A, "idle_s": -1, "enigne": "x"})
        assert status == 422
        assert {p["field"] for p in body["error"]["problems"]} == {"idle_s", "enigne"}
        assert "did you mean 'engine'?" in body["error"]["message"]
        unsized = {k: v for k, v in A.items() if k != "device_memory_bytes"}
        agent.inspection = Inspection(estimate_error="/m does not exist")
        status, body = await client("POST", "/admin/models", unsized)
        assert status == 422
        assert "cannot be estimated: /m does not exist; declare it" in body["error"]["message"]
        agent.inspection = Inspection(
            problems=(SpecProblem(field="engine_args.max_len", message="is unknown"),)
        )
        assert (await client("POST", "/admin/models", A))[0] == 422
        assert (await client("GET", "/admin/models"))[1]["models"] == []
        agent.inspection = Inspection(
            estimate=MemoryEstimate(
                weights_bytes=1, kv_bytes=1, overhead_bytes=1, total_bytes=3 * GIB, explanation="x"
            )
        )
        status, saved = await client("POST", "/admin/models", unsized)
        assert (status, saved["model"]["memory_from"]) == (201, "estimated")
        assert saved["model"]["device_memory_bytes"] == 3 * GIB
        status, body = await client("POST", "/admin/models", {**A, "name": "b", "aliases": ["a"]})
        assert status == 409
        assert "is already a name of model 'a'" in body["error"]["message"]


async def test_errors_say_what_to_do(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client("POST", "/admin/models", {**A, "min_replicas": 1})
        status, body = await client("GET", "/admin/models/b", token="wrong")
        assert (status, "Bearer" in body["error"]["message"]) == (401, True)
        status, body = await client("GET", "/admin/models/aa")
        assert (status, body["error"]["close"]) == (404, ["a"])
        status, body = await client("POST", "/admin/models/a/unload")
        assert (status, "lower that first" in body["error"]["message"]) == (409, True)
        status, body = await client("POST", "/admin/models/a/load", {"replicas": 5})
        assert (status, "1 to 1" in body["error"]["message"]) == (422, True)
        assert (await client("POST", "/admin/models", b"{"))[0] == 400
        assert (await client("GET", "/admin/decisions?limit=x"))[0] == 400
        assert (await client("GET", "/admin/nope"))[0] == 404
        assert (await client("POST", "/admin/nodes/zz/drain"))[0] == 404
        status, body = await client("GET", "/admin/replicas/gone-1-1/logs")
        assert status == 404
        status, body = await client("PUT", "/admin/models/zz", A)
        assert (status, "is not the name in the address" in body["error"]["message"]) == (422, True)


async def test_an_agent_that_refuses_a_start_leaves_a_reason(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        agent.refuse = "there is no device g0"
        await client("POST", "/admin/models", A)
        await client("POST", "/admin/models/a/load", {})
        table = await client.table()
        while table.models[0].refusal is None:
            table = await client.table(table.version, 10)
            assert table is not None
        assert table.models[0].refusal == "it did not start: there is no device g0"


async def test_a_second_scheduler_stands_by_and_takes_over(
    tmp_path, agent, registry, session
) -> None:
    second_registry = EmbeddedRegistry(tmp_path / "registry.db")
    async with contextlib.AsyncExitStack() as both:
        both.push_async_callback(second_registry.close)
        async with scheduler(tmp_path, registry) as first_url:
            first = Client(first_url, session)
            await leading(first, agent)
            await first("POST", "/admin/models", A)
            second_url = await both.enter_async_context(scheduler(tmp_path, second_registry))
            second = Client(second_url, session)
            status, body = await second("GET", "/admin/models")
            assert (status, body["error"]["leader"]) == (503, first_url)
            assert (await second("GET", "/readyz"))[0] == 503
        await leading(second, agent)  # the first one left
        _, listed = await second("GET", "/admin/models")
        assert [model["name"] for model in listed["models"]] == ["a"]
        assert (await second("GET", "/healthz"))[1]["term"] == 2


async def test_the_openapi_document_is_valid_and_describes_every_route(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, document = await client("GET", "/openapi.json")
        assert status == 200
        validate(document)
        assert document["openapi"].startswith("3.1")
        described = {
            (method.upper(), path) for path, ops in document["paths"].items() for method in ops
        }
        assert described == {(r.method, r.path) for r in ADMIN}
        for method, path in described:  # each is served, and guarded as the document says
            answer, body = await client(
                method, path.format(name="x", id="x", device="x"), token="wrong"
            )
            open_to_all = document["paths"][path][method.lower()].get("security") == []
            assert answer == (200 if open_to_all else 401), (method, path)
            if not open_to_all:
                as_described(document, body)


async def test_refusals_are_what_the_openapi_document_says(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        _, document = await client("GET", "/openapi.json")
        calls = [
            (404, "GET", "/admin/models/{name}", None),
            (404, "DELETE", "/admin/models/{name}", None),
            (404, "POST", "/admin/models/{name}/unload", None),
            (422, "POST", "/admin/models", {"name": "a b", "sorce": 1}),
            (400, "POST", "/admin/models", b"{"),
            (422, "PUT", "/admin/models/{name}", {"name": "other", "source": "/m"}),
            (404, "POST", "/admin/models/{name}/load", {"replicas": 1}),
            (404, "POST", "/admin/nodes/{id}/cordon", None),
            (404, "POST", "/admin/nodes/{id}/devices/{device}/quarantine", {"reason": "x"}),
            (404, "POST", "/admin/plan", {"load": "x"}),
            (422, "POST", "/admin/plan", {"load": 3}),
            (400, "GET", "/admin/decisions?limit=x", None),
            (400, "GET", "/admin/decisions?limit=0.5", None),
            (400, "GET", "/admin/coldstarts?limit=-1", None),
            (422, "POST", "/admin/cache/pull", {"source": 3}),
        ]
        for expected, method, path, body in calls:
            status, answer = await client(method, path.format(name="x", id="x", device="x"), body)
            assert status == expected, (method, path, answer)
            operation = document["paths"][path.partition("?")[0]][method.lower()]
            assert str(status) in operation["responses"], (method, path)
            as_described(document, answer)


async def test_a_token_that_is_no_text_is_a_401(tmp_path, registry) -> None:
    async with scheduler(tmp_path, registry) as url:
        for token in (b"\xff", b"stoker-admin-0123456789-\xff\xfe", b""):
            reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            head = b"GET /admin/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            writer.write(head + b"Authorization: Bearer " + token + b"\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
            writer.close()


async def test_a_body_nested_too_deep_is_a_400_everywhere(tmp_path, agent, registry, session):
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        posts = [(r.method, r.path) for r in ADMIN if r.method in ("POST", "PUT")]
        posts += [("POST", f"/internal/{name}") for name in ("heartbeat", "demand", "usage")]
        for method, path in posts:
            path = path.format(name="x", id="x", device="x")
            for deep in (1_000, 100_000):
                body = b'{"x":' + b"[" * deep + b"]" * deep + b"}"
                status, answer = await client(method, path, body)
                assert status in (400, 404, 202, 200), (method, path, answer)
            assert status != 200 or path.endswith(("load", "unload", "cordon", "uncordon"))


def as_described(document, error) -> None:
    """Every refusal is the document's `Error`, and says something."""
    Draft202012Validator({"$ref": "#/components/schemas/Error", **document}).validate(error)
    assert error["error"]["message"]


async def test_what_the_scheduler_tells_of_the_cluster_needs_a_token(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        for path in ("/metrics", "/openapi.json"):
            assert (await client("GET", path, token=""))[0] == 401
            assert (await client("GET", path, token="wrong"))[0] == 401
        _, made = await client("POST", "/admin/tokens", {"name": "prometheus", "role": "viewer"})
        assert (await client("GET", "/metrics", token=made["token"]))[0] == 200
        assert (await client("GET", "/metrics", token=SCRAPER))[0] == 200
        for path in ("/openapi.json", "/admin/models", "/internal/keys", "/metrics/"):
            assert (await client("GET", path, token=SCRAPER))[0] in (401, 404), path
        async with scheduler(tmp_path, registry) as other:  # it stands by
            standing_by = Client(other, session)
            for token in (SCRAPER, made["token"], TOKEN):
                status, metrics = await standing_by("GET", "/metrics", token=token)
                assert status == 200, metrics
            assert "stoker_scheduler_leader 0.0" in metrics
            assert (await standing_by("GET", "/metrics", token=""))[0] == 401


@pytest.mark.parametrize(
    "name", ["cluster", " Cluster ", "canary", "switch", "a\nb", " ", "x" * 97]
)
async def test_a_token_is_not_named_as_another_in_the_audit_trail(
    tmp_path, agent, registry, session, name
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, body = await client("POST", "/admin/tokens", {"name": name, "role": "admin"})
        assert (status, body["error"]["problems"][0]["field"]) == (422, "name")
        assert (await client("GET", "/admin/tokens"))[1]["tokens"] == []


async def test_metrics_are_served(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        _, metrics = await client("GET", "/metrics")
        assert "stoker_scheduler_leader 1.0" in metrics
        assert 'stoker_device_memory_total_bytes{device="g0",node="n1"}' in metrics
        assert 'llm_gpu_memory_bytes{gpu="g0",node="n1"}' in metrics


async def test_added_means_that_the_routers_know_it(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        table = await client.table()
        report = DemandReport(router_id="r", boot_id=1, seq=1, routes_version=table.version)
        await client("POST", "/internal/demand", msgspec.json.encode(report))
        adding = asyncio.create_task(client("POST", "/admin/models", A))
        newer = await client.table(table.version, 10)
        done, _ = await asyncio.wait([adding], timeout=0.3)
        assert not done  # the router has the table, but has not said that it routes by it
        report = DemandReport(router_id="r", boot_id=1, seq=2, routes_version=newer.version)
        await client("POST", "/internal/demand", msgspec.json.encode(report))
        assert (await asyncio.wait_for(adding, 1))[0] == 201


async def test_a_plan_answers_and_changes_nothing(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client("POST", "/admin/models", {**A, "device_memory_bytes": "20GiB"})
        b = {**A, "name": "b", "device_memory_bytes": "20GiB"}
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "a was started")
        await client.beat(agent)
        await client.demand(2)
        status, plan = await client("POST", "/admin/plan", {"add": b})
        assert status == 200, plan
        assert [(s["action"], s["model"]) for s in plan["steps"]] == [
            ("evict", "a"),
            ("start", "b"),
        ]
        assert all(wait_s > 0 for wait_s in plan["expected_wait_s"].values())
        _, models = await client("GET", "/admin/models")
        assert [(m["name"], m["warmth"]) for m in models["models"]] == [("a", "hot")]
        assert list(agent.replicas) == ["a-1-1"]
        for body, named in (
            ({}, "body"),
            ({"load": "a", "replicas": 0}, "replicas"),
            ({"add": {**b, "idle_s": -1}}, "idle_s"),
        ):
            status, answer = await client("POST", "/admin/plan", body)
            assert status == 422
            assert answer["error"]["problems"][0]["field"] == named
        assert (await client("POST", "/admin/plan", {"load": "aa"}))[0] == 404
        assert (await client("POST", "/admin/plan", {"remove_node": "n2"}))[0] == 404


async def test_a_quarantine_survives_a_restart_and_is_released_once(
    tmp_path, agent, registry, session
) -> None:
    device = "/admin/nodes/n1/devices/g0"
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        assert (await client("POST", f"{device}/release"))[0] == 409
        assert (await client("POST", "/admin/nodes/n1/devices/g9/quarantine"))[0] == 404
        status, _ = await client("POST", f"{device}/quarantine", {"reason": "smells of smoke"})
        assert status == 200

        async def kept() -> bool:
            return bool((await registry.list("stoker/quarantine/"))[0])

        for _ in range(200):
            if await kept():
                break
            await asyncio.sleep(0.02)
        assert await kept()
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        await client.beat(agent)
        _, devices = await client("GET", "/admin/devices")
        assert devices["devices"][0]["quarantined"] == "smells of smoke"
        _, saved = await client("POST", "/admin/models", A)
        assert "no healthy device" in saved["model"]["problem"]
        _, metrics = await client("GET", "/metrics")
        assert 'stoker_device_quarantined{device="g0",node="n1"} 1.0' in metrics
        assert (await client("POST", f"{device}/release"))[0] == 200
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "the released device is used")


async def test_a_drain_names_its_deadline(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, answer = await client("POST", "/admin/nodes/n1/drain", {"deadline_s": -1})
        assert (status, answer["error"]["problems"][0]["field"]) == (422, "deadline_s")
        status, node = await client("POST", "/admin/nodes/n1/drain", {"deadline_s": 5})
        assert (status, node["state"]) == (200, "draining")


async def test_a_leader_of_a_new_registry_outranks_the_one_its_agents_remember(
    tmp_path, agent, registry, session
) -> None:
    agent.epoch = 7  # its registry was lost, and with it the term
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)

        async def term() -> int:
            return (await client("GET", "/healthz"))[1]["term"]

        for _ in range(400):
            with contextlib.suppress(AssertionError):
                await client.beat(agent)
            if await term() > 7:
                break
            await asyncio.sleep(0.05)
        assert await term() == 8
        await leading(client, agent)
        await client("POST", "/admin/models", A)
        await client.demand(1, a=1)
        await until(lambda: agent.replicas, "the agent was told to start")
        assert next(iter(agent.replicas.values())).epoch == 8


@pytest.mark.parametrize(
    "replica_id",
    ["../../agent/cache?x=", "../../agent/cache/offer?source=hf:a/b&asked=main&x=", "..", "a/b",
     "a?b", "a#b", "a%2Fb", "a b", "x" * 201, "-a", "\u00e4", "a\n"],
)  # fmt: skip
async def test_a_replicas_log_is_all_that_its_address_reaches(
    tmp_path, agent, registry, session, replica_id
) -> None:
    """A viewer's word in the address must not become another GET of the agent."""
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        agent.asked.clear()
        address = f"{url}/admin/replicas/{quote(replica_id, safe='')}/logs"
        async with session.get(
            URL(address, encoded=True), headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            assert response.status == 404, await response.text()
        assert agent.asked == []


@pytest.mark.parametrize(
    "model",
    ["hf:org/name@v1/../../../etc", "hf:../x", "s3://bucket/a/../../b", "../etc", "/models/../etc",
     "hf:org/name@v1?x=", "", "a\u0000b"],
)  # fmt: skip
async def test_a_source_that_leaves_its_place_reaches_no_cache(
    tmp_path, agent, registry, session, model
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        agent.asked.clear()
        status, body = await client("POST", "/admin/cache/pull", {"model": model})
        assert (status, body["error"]["problems"][0]["field"]) == (422, "model")
        for method, path in (("DELETE", "/admin/cache"), ("POST", "/admin/cache/verify")):
            status, _ = await client(method, f"{path}?model={quote(model, safe='')}")
            assert status in (400, 422)
        assert agent.asked == []


async def test_a_token_names_no_other_entry_of_the_registry(tmp_path, registry, session) -> None:
    """One that stands by looks a token up in the registry by the id within it."""
    asked = []
    get = registry.get

    async def noted(key: str):
        asked.append(key)
        return await get(key)

    registry.get = noted
    access = Access(Store(registry, "stoker"), lambda: 0.0)
    for word in ("../leader0", "?recurse00", "a/b/c/d/e/", "leader%00x", "." * 10, "a" * 9 + "\n"):
        assert await access.admin(f"stoker-admin-{word}-{'x' * 43}", leads=False) is None
    assert asked == []
    assert await access.admin(f"stoker-admin-abcdefghij-{'x' * 43}", leads=False) is None
    assert asked == ["stoker/tokens/abcdefghij"]


async def test_a_plan_asks_nodes_to_fetch_nothing(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        agent.asked.clear()
        spec = {**A, "name": "zz", "adapters": {"x": "hf:attacker/adapter"}}
        status, body = await client("POST", "/admin/plan", {"add": spec})
        assert status == 200, body
        assert agent.asked == ["/agent/inspect?fetch=0"]
        status, body = await client("PUT", "/admin/models/zz", spec)
        assert status == 201, body
        assert agent.asked == ["/agent/inspect?fetch=0", "/agent/inspect?fetch=1"]


class FullDisk(EmbeddedRegistry):
    """Can be read; whatever is written fails."""

    async def acquire(self, *_: object, **__: object) -> None:  # type: ignore[override]
        raise RegistryError("cannot put leader: database or disk is full")


async def test_a_scheduler_that_can_not_lead_says_what_it_fails_of(tmp_path) -> None:
    registry = FullDisk(tmp_path / "registry.db")
    async with (
        scheduler(tmp_path, registry) as url,
        aiohttp.ClientSession() as session,
        asyncio.timeout(60),
    ):
        client = Client(url, session)
        status, body = await client("GET", "/admin/models")
        while "disk is full" not in body["error"]["message"]:
            assert (status, body["error"]["message"]) == (503, "this scheduler is not the leader")
            await asyncio.sleep(0.05)
            status, body = await client("GET", "/admin/models")
        assert status == 503
        assert body["error"]["message"] == (
            "this scheduler is not the leader: the registry does not answer: cannot put leader:"
            " database or disk is full"
        )
    await registry.close()
