"""The scheduler over HTTP: specs, starts, plans and drains; its agent is a small web app."""

from __future__ import annotations

import asyncio

import msgspec

from runtime.wire.agent_messages import Inspection, MemoryEstimate, SpecProblem
from runtime.wire.routes import DemandReport
from tests.kits.scheduler_http import GIB, A, Client, leading, scheduler, until


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


async def test_a_drain_names_its_deadline(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        status, answer = await client("POST", "/admin/nodes/n1/drain", {"deadline_s": -1})
        assert (status, answer["error"]["problems"][0]["field"]) == (422, "deadline_s")
        status, node = await client("POST", "/admin/nodes/n1/drain", {"deadline_s": 5})
        assert (status, node["state"]) == (200, "draining")


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
