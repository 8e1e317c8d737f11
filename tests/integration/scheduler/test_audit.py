"""Each change of the admin API is in the audit trail, or its operation says why it is not."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
import pytest

from runtime.wire.routes import DemandReport
from scheduler.admin.guard import HUNG_UP
from scheduler.admin.route_table import ADMIN, Operation, Unaudited
from tests.kits.scheduler_http import A, Agent, Client, leading, scheduler, until

ROUTE = {"name": "r", "targets": [{"model": "a"}, {"model": "b", "weight": 0}]}
CANARY = {"model": "b", "steps": [10, 40], "interval_s": 600, "min_requests": 5}
DEVICE = "/admin/nodes/{id}/devices/{device}"


@dataclass(frozen=True)
class Change:
    """A good call of an operation, and what its entry says; {id}, {name}: of what was made last."""

    method: str
    path: str
    body: object = None
    name: str = "a"
    query: str = ""
    reason: str = "by the admin API"


# In the order they are made; every operation that changes something is here.
CHANGES = (
    Change("POST", "/admin/models", A),
    Change("PUT", "/admin/models/{name}", {**A, "name": "b"}, name="b"),
    Change("POST", "/admin/plan", {"load": "a"}),
    Change("POST", "/admin/models/{name}/pin", {"pinned": True}, reason="pinned"),
    Change("POST", "/admin/models/{name}/pin", {"pinned": False}, reason="unpinned"),
    Change("POST", "/admin/models/{name}/prewarm", {"rung": "staged"}),
    Change("POST", "/admin/models/{name}/load", {}),
    Change("POST", "/admin/replicas/{id}/unload"),
    Change("POST", "/admin/models/{name}/unload"),
    Change("POST", "/admin/nodes/{id}/cordon"),
    Change("POST", "/admin/nodes/{id}/uncordon"),
    Change("POST", "/admin/nodes/{id}/drain", {"deadline_s": 5}, reason="within 5 s"),
    Change("POST", f"{DEVICE}/quarantine", {"reason": "it smells"}, reason="it smells"),
    Change("POST", f"{DEVICE}/release"),
    Change("POST", "/admin/cache/pull", {"model": "hf:org/name"}),
    Change("POST", "/admin/cache/verify", query="?model=hf:org/name"),
    Change("DELETE", "/admin/cache", query="?model=hf:org/name"),
    Change("PUT", "/admin/routes/{name}", {**ROUTE, "canary": CANARY}, "r", reason="added"),
    Change("POST", "/admin/routes/{name}/promote", {"reason": "good"}, "r", reason="good"),
    Change("PUT", "/admin/routes/{name}", ROUTE, "r", reason="changed"),
    Change("POST", "/admin/routes/{name}/switch", {"to": "b"}, "r",
           reason="warming b: 1 ready within 600 s"),
    Change("POST", "/admin/routes/{name}/rollback", {"reason": "bad"}, "r",
           reason="the switch to b was called off: bad"),
    Change("DELETE", "/admin/routes/{name}", None, "r", reason="removed"),
    Change("POST", "/admin/keys", {"tenant": "t"}),
    Change("PUT", "/admin/keys/{id}", {"tenant": "t", "note": "n"}),
    Change("POST", "/admin/keys/{id}/rotate", {}),
    Change("DELETE", "/admin/keys/{id}"),
    Change("PUT", "/admin/tenants/{name}", {"name": "t"}, "t"),
    Change("DELETE", "/admin/tenants/{name}", None, "t"),
    Change("POST", "/admin/tokens", {"name": "ann", "role": "viewer"}),
    Change("DELETE", "/admin/tokens/{id}"),
    Change("DELETE", "/admin/models/{name}", None, "b"),
)  # fmt: skip


def operation(change: Change) -> Operation:
    return next(o for o in ADMIN if (o.method, o.path) == (change.method, change.path))


def test_every_change_is_made_here() -> None:
    assert {(c.method, c.path) for c in CHANGES} == {
        (o.method, o.path) for o in ADMIN if o.method != "GET"
    }


async def test_each_change_is_in_the_trail_or_says_why_it_is_not(
    tmp_path, agent: Agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        made = "n1"  # the id of what the next change is about
        for change in CHANGES:
            if "replicas/{id}" in change.path:
                await until(lambda: agent.replicas, "a was told to start")
                await client.beat(agent)
                made = next(iter(agent.replicas))
            elif "nodes/{id}" in change.path:
                made = "n1"
            path = change.path.format(id=made, name=change.name, device="g0")
            _, before = await client("GET", "/admin/audit")
            status, answer = await client(change.method, path + change.query, change.body)
            assert status < 300, (change, answer)
            _, after = await client("GET", "/admin/audit")
            new = after["audit"][: len(after["audit"]) - len(before["audit"])]
            made = made_id(answer) or made
            if isinstance(operation(change).audit, Unaudited):
                assert new == [], change
                continue
            (entry,) = new
            assert (entry["who"], entry["reason"]) == ("cluster", change.reason), change
            by_guard = operation(change).audit == "guard"
            subject = path if by_guard else "route r"
            subject += f"/{made_id(answer) or change.name}" if created(change) else ""
            assert entry["subject"] == subject
            if by_guard:
                assert entry["action"] == operation(change).handler.rpartition(".")[2]
            assert "token" not in str(entry.get("new"))


def created(change: Change) -> bool:
    """Whether what was made has an address of its own, below the one that was called."""
    return change.path in ("/admin/models", "/admin/keys", "/admin/tokens")


def made_id(answer: object) -> str | None:
    """The id of the key or token that an answer tells of."""
    if not isinstance(answer, dict):
        return None
    return answer.get("key", {}).get("key_id") or answer.get("info", {}).get("token_id")


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_what_was_refused_is_not_in_the_trail(
    tmp_path, agent, registry, session, token
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        assert (await client("POST", "/admin/models", A, token=token))[0] == 401
        assert (await client("POST", "/admin/models", {**A, "idle_s": -1}))[0] == 422
        assert (await client("DELETE", "/admin/models/a"))[0] == 404
        assert (await client("GET", "/admin/audit"))[1]["audit"] == []


async def test_a_change_whose_caller_hung_up_is_in_the_trail(
    tmp_path, agent, registry, session
) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        table = await client.table()
        report = DemandReport(router_id="r", boot_id=1, seq=1, routes_version=table.version)
        await client("POST", "/internal/demand", msgspec.json.encode(report))
        adding = asyncio.create_task(client("POST", "/admin/models", A))
        assert await client.table(table.version, 60) is not None  # it is stored, and in force
        adding.cancel()  # while it waits for the router to say so too
        with contextlib.suppress(asyncio.CancelledError):
            await adding
        async with asyncio.timeout(60):
            while not (trail := (await client("GET", "/admin/audit"))[1]["audit"]):
                await asyncio.sleep(0.05)
        assert [m["name"] for m in (await client("GET", "/admin/models"))[1]["models"]] == ["a"]
        assert [(e["who"], e["action"], e["subject"], e["reason"]) for e in trail] == [
            ("cluster", "create_model", "/admin/models/a", HUNG_UP)
        ]
