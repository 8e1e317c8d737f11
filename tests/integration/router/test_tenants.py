"""What one tenant or a key with a narrow scope can do to the others: nothing, at any entrance."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from runtime.contract.access import Limits, Scope, Used
from runtime.router.jobs import invokes
from runtime.router.jobs.store import file_rows, held_rows
from runtime.router.jobs.store.database import JobStore
from runtime.router.jobs.store.tenants import Owner
from tests.kits import router_stack as kit
from tests.kits.router_keys import ask, key
from tests.kits.router_stack import Stack, eventually, unary

LATER = {"Prefer": "respond-async"}
LINE = {
    "custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": "alpha", "messages": []},
}  # fmt: skip


KEYS = (
    key("acme", "acme"),
    key("globex", "globex"),
    key("slow", "slowpoke", limits=Limits(requests_per_min=3)),
    key("embed", "acme", scope=Scope(endpoints=("/v1/embeddings",), models=("beta",))),
    key("alph", "acme", scope=Scope(models=("alphx", "bet*"))),
    key("beta", "acme", scope=Scope(models=("beta",))),
)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    log = tmp_path / "access.jsonl"
    async with kit.stack(
        tmp_path, anonymous="off", access_log=str(log), jobs_per_tenant=50
    ) as made:
        engine = await made.engine(unary())
        await made.scheduler.publish(kit.model("alpha", engine), kit.model("beta", engine))
        await made.scheduler.in_force()
        await with_keys(made)
        yield made


async def with_keys(stack: Stack) -> None:
    """Its keys are KEYS, from now on."""
    await stack.scheduler.publish_keys(*KEYS)
    async with asyncio.timeout(kit.DEADLINE_S):
        while (await ask(stack, "acme", "GET", "/v1/models"))[0] != 200:
            await asyncio.sleep(0.02)


def results_bytes(db: sqlite3.Connection) -> int:
    """What all lines' results hold."""
    return db.execute("SELECT ifnull(sum(length(result)), 0) FROM lines").fetchone()[0]


async def submit(stack: Stack, name: str, model: str = "alpha") -> tuple[int, Any, Any]:
    return await ask(stack, name, "POST", f"/invoke/{model}", {"prompt": "x"}, **LATER)


async def upload(
    stack: Stack, name: str, data: bytes = json.dumps(LINE).encode()
) -> tuple[int, Any, Any]:
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", data, filename="in.jsonl")
    return await ask(stack, name, "POST", "/v1/files", form)


async def until_completed(stack: Stack, name: str, job: str) -> None:
    async with asyncio.timeout(kit.DEADLINE_S):
        while (await ask(stack, name, "GET", f"/jobs/{job}"))[1]["status"] != "completed":
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------------- one tenant's queue


async def test_a_tenants_queue_keeps_no_other_tenant_waiting(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More jobs than are looked at wait, and those that are sent have no end."""
    monkeypatch.setattr(invokes, "KNOWN", 2)
    stack.engines[0].answer = kit.never
    stuck = [await submit(stack, "acme") for _ in range(20)]
    assert {status for status, _, _ in stuck} == {202}
    await eventually(lambda: stack.engines[0].received, "not sent")
    stack.engines[0].answer = unary()
    _, job, _ = await submit(stack, "globex")
    await until_completed(stack, "globex", job["id"])


async def test_accepting_a_job_is_a_request_and_running_it_is_not_another(stack: Stack) -> None:
    made = [await submit(stack, "slow") for _ in range(5)]
    assert [status for status, _, _ in made] == [202, 202, 202, 429, 429]
    assert made[3][1]["error"]["code"] == "rate_limit_exceeded"
    assert int(made[3][2]["Retry-After"]) > 1
    for _, job, _ in made[:3]:
        await until_completed(stack, "slow", job["id"])
    assert (await upload(stack, "slow"))[0] == 429


async def test_a_tenant_has_so_many_jobs_at_most(stack: Stack) -> None:
    stack.engines[0].answer = kit.never
    made = await asyncio.gather(*(submit(stack, "acme") for _ in range(50)))
    assert {status for status, _, _ in made} == {202}
    status, error, headers = await submit(stack, "acme")
    assert (status, error["error"]["code"]) == (429, "too_many_waiting")
    assert "50 jobs" in error["error"]["message"]
    assert headers["Retry-After"]
    assert (await submit(stack, "globex"))[0] == 202


async def test_a_tenant_that_fills_its_share_of_the_store_keeps_no_other_out(
    tmp_path: Path,
) -> None:
    settings = {"anonymous": "off", "store_max_bytes": 800_000, "store_tenant_share": 0.5}
    async with kit.stack(tmp_path, **settings) as stack:
        await stack.serve("alpha", await stack.engine(unary()))
        await with_keys(stack)
        status, file, _ = await upload(stack, "acme", b"x" * 390_000)
        assert status == 200
        refused = [
            await upload(stack, "acme", b"x" * 10_000),
            await ask(
                stack, "acme", "POST", "/invoke/alpha", {"prompt": "x" * 10_000}, **LATER
            ),
        ]  # fmt: skip
        for status, error, headers in refused:
            assert (status, error["error"]["code"]) == (507, "store_share_full")
            assert "400000 (router.store_tenant_share)" in error["error"]["message"]
            assert headers["x-should-retry"] == "false"
        assert (await upload(stack, "globex", b"x" * 100_000))[0] == 200
        _, job, _ = await submit(stack, "globex")
        await until_completed(stack, "globex", job["id"])
        assert (await ask(stack, "acme", "DELETE", f"/v1/files/{file['id']}"))[0] == 200
        assert (await upload(stack, "acme", b"x" * 10_000))[0] == 200


async def test_a_tenant_far_beyond_its_share_of_the_store_waits_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results may take it beyond its share, and then no further."""
    monkeypatch.setattr(invokes, "PER_MODEL", 1)
    settings = {"anonymous": "off", "store_max_bytes": 800_000, "store_tenant_share": 0.25}
    async with kit.stack(tmp_path, **settings) as stack:
        engine = await stack.engine(kit.never)
        await stack.serve("alpha", engine)
        await with_keys(stack)
        jobs = [(await submit(stack, "acme"))[1]["id"] for _ in range(2)]
        await eventually(lambda: engine.received, "not sent")
        other = JobStore(tmp_path / "jobs.db", 2**30)  # as another worker
        file = await other.write(file_rows.begin, "file-1", Owner("acme"), time.time())
        await other.write(file_rows.add_chunks, file, 0, b"x" * 300_000)

        async def waits_for() -> str:
            return (await ask(stack, "acme", "GET", f"/jobs/{jobs[1]}"))[1]["waits_for"] or ""

        async with asyncio.timeout(kit.DEADLINE_S):
            while "router.store_tenant_share" not in await waits_for():
                await asyncio.sleep(0.02)
        engine.answer = unary()
        await ask(stack, "acme", "DELETE", f"/jobs/{jobs[0]}")  # the one that hangs
        _, job, _ = await submit(stack, "globex")
        await until_completed(stack, "globex", job["id"])
        assert "router.store_tenant_share" in await waits_for()
        await other.write(file_rows.delete, file)
        await other.close()
        await until_completed(stack, "acme", jobs[1])


async def test_the_lines_of_batches_count_before_they_are_taken_in(tmp_path: Path) -> None:
    """One file makes many batches, each with lines of its own, which a cancelled one keeps."""
    settings = {"anonymous": "off", "store_max_bytes": 2_000_000, "store_tenant_share": 0.25}
    async with kit.stack(tmp_path, **settings) as stack:
        await stack.serve("alpha", await stack.engine(kit.never))
        await with_keys(stack)
        text = b"\n".join(json.dumps(LINE | {"custom_id": f"{n}"}).encode() for n in range(500))
        _, file, _ = await upload(stack, "acme", text)
        asked = {
            "input_file_id": file["id"], "endpoint": LINE["url"], "completion_window": "24h",
        }  # fmt: skip
        made = [(await ask(stack, "acme", "POST", "/v1/batches", asked))[1] for _ in range(8)]
        batches = []
        async with asyncio.timeout(kit.DEADLINE_S):
            for batch in made:
                while batch["status"] == "validating":
                    await asyncio.sleep(0.02)
                    _, batch, _ = await ask(stack, "acme", "GET", f"/v1/batches/{batch['id']}")
                await ask(stack, "acme", "POST", f"/v1/batches/{batch['id']}/cancel")
                batches.append(batch)
        assert [batch["status"] for batch in batches[:2]] == ["in_progress"] * 2
        assert batches[-1]["status"] == "failed"
        (error,) = batches[-1]["errors"]["data"]
        assert error["code"] == "store_share_full"
        assert "500000 (router.store_tenant_share)" in error["message"]
        assert (await upload(stack, "globex", b"x" * 500))[0] == 200
        other = JobStore(tmp_path / "jobs.db", 2**30)
        # A line of a cancelled batch has a result too, which is let in beyond the share: how many
        # have one depends on whether the next batch is read before the last is cancelled.
        taken_in = await other.read(held_rows.of, "acme") - await other.read(results_bytes)
        assert taken_in < 600_000
        await other.close()


# ---------------------------------------------------------------------- a narrow scope


async def test_a_scope_holds_at_the_entrances_of_files_batches_and_jobs(stack: Stack) -> None:
    _, file, _ = await upload(stack, "acme")
    asked = {
        "input_file_id": file["id"], "endpoint": LINE["url"], "completion_window": "24h",
    }  # fmt: skip
    _, batch, _ = await ask(stack, "acme", "POST", "/v1/batches", asked)
    _, job, _ = await submit(stack, "acme")
    await until_completed(stack, "acme", job["id"])
    paths = [f"/v1/files/{file['id']}", f"/v1/batches/{batch['id']}"]
    for method, path in (
        ("POST", "/v1/batches"), ("GET", "/v1/files"), ("GET", "/v1/batches"),
        ("GET", paths[0] + "/content"), ("DELETE", paths[0]), ("GET", paths[0]),
        ("POST", paths[1] + "/cancel"), ("GET", paths[1]),
    ):  # fmt: skip
        status, error, _ = await ask(stack, "embed", method, path, asked)
        assert (status, error["error"]["code"]) == (403, "not_allowed"), path
    assert (await upload(stack, "embed"))[0] == 403
    assert (await submit(stack, "embed"))[1]["error"]["code"] == "not_allowed"
    assert (await submit(stack, "beta"))[0] == 403
    assert (await submit(stack, "beta", "beta"))[0] == 202
    for name in ("embed", "beta", "globex"):  # others' things are not there
        for method in ("GET", "DELETE"):
            assert (await ask(stack, name, method, f"/jobs/{job['id']}"))[0] == 404
    for path in paths:
        assert (await ask(stack, "beta", "GET", path))[0] == 404
    assert (await ask(stack, "beta", "GET", "/v1/files"))[1]["data"] == []
    assert (await ask(stack, "beta", "GET", "/v1/batches"))[1]["data"] == []
    assert (await ask(stack, "beta", "POST", "/v1/batches", asked))[0] == 404
    assert len((await ask(stack, "acme", "GET", "/v1/files"))[1]["data"]) >= 1


async def test_a_key_with_a_scope_sees_what_it_made_and_a_wide_one_all(stack: Stack) -> None:
    _, file, _ = await upload(stack, "beta")
    _, job, _ = await submit(stack, "beta", "beta")
    for name, status in (("beta", 200), ("acme", 200), ("globex", 404)):
        assert (await ask(stack, name, "GET", f"/v1/files/{file['id']}"))[0] == status
        assert (await ask(stack, name, "GET", f"/jobs/{job['id']}"))[0] == status
    listed = (await ask(stack, "beta", "GET", "/v1/files"))[1]["data"]
    assert [one["id"] for one in listed] == [file["id"]]


async def test_the_access_log_says_whose_every_call_was(stack: Stack, tmp_path: Path) -> None:
    await upload(stack, "acme")
    await upload(stack, "embed")
    await submit(stack, "globex")
    log = tmp_path / "access.jsonl"

    def written() -> list[tuple[str, str, str, int]]:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [(x["path"], x["tenant"], x["key_id"], x["status"]) for x in lines if x["key_id"]]

    await eventually(lambda: len([x for x in written() if x[0] != "/v1/models"]) >= 3, "not logged")
    assert {
        ("/v1/files", "acme", "acme000000", 200), ("/v1/files", "acme", "embed00000", 403),
        ("/invoke/alpha", "globex", "globex0000", 202),
    } <= set(written())  # fmt: skip


# ---------------------------------------------------------------------- without a key


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:8080"},
        {"Origin": "https://evil.example", "Content-Type": "text/plain"},
        {"X-Forwarded-For": "203.0.113.9"},
        {"Forwarded": "for=203.0.113.9"},
    ],
)
async def test_without_a_key_only_this_host_calls(tmp_path: Path, headers: dict[str, str]) -> None:
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()))
        body = {"model": "m", "messages": []}
        async with stack.post("/v1/chat/completions", body) as response:
            assert response.status == 200
        async with stack.post("/v1/chat/completions", body, headers=headers) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "not_local"
        for path in ("/v1/models", "/v1/files", "/metrics", "/jobs/job_1"):
            async with stack.session.get(stack.url + path, headers=headers) as response:
                assert response.status == 403, path
        async with stack.session.get(stack.url + "/healthz", headers=headers) as response:
            assert response.status == 200
        assert len(stack.engines[0].received) == 1


async def test_the_first_key_ends_calls_without_one(tmp_path: Path) -> None:
    async with kit.stack(tmp_path) as stack:
        await stack.serve("m", await stack.engine(unary()))
        await stack.scheduler.publish_keys(*KEYS)
        async with asyncio.timeout(kit.DEADLINE_S):
            while True:
                async with stack.post("/v1/chat/completions", {"model": "m"}) as response:
                    if response.status == 401:
                        break
        assert (await ask(stack, "acme", "GET", "/v1/models", Host="any.example"))[0] == 200


async def test_engines_get_no_credentials_of_callers_and_hints_name_no_others_model(
    stack: Stack,
) -> None:
    secret = {"Cookie": "a=b", "X-Forwarded-For": "1.2.3.4", "X-Amz-Security-Token": "t"}
    body, given = {"model": "alpha", "messages": []}, {**secret, "X-Session-Id": "s"}
    assert (await ask(stack, "acme", "POST", "/v1/chat/completions", body, **given))[0] == 200
    (received,) = stack.engines[0].received
    assert [received.header(name) for name in secret] == [None] * 3
    assert received.header("X-Session-Id") == "s"
    for path in ("/v1/models/alphx", "/models/alphx/v1/models"):
        assert "'alpha'" not in str((await ask(stack, "beta", "GET", path))[1])
        assert "'alpha'" in str((await ask(stack, "acme", "GET", path))[1])


async def test_an_unknown_model_hints_at_no_name_outside_of_the_keys_scope(stack: Stack) -> None:
    """By the error of admission: the scope allows the name that was asked for."""
    body = {"model": "alphx", "messages": []}
    for name, hinted in (("alph", False), ("acme", True)):
        status, error, _ = await ask(stack, name, "POST", "/v1/chat/completions", body)
        assert (status, error["error"]["code"]) == (404, "model_not_found")
        assert ("'alpha'" in error["error"]["message"]) is hinted
    body["model"] = "betx"
    _, error, _ = await ask(stack, "alph", "POST", "/v1/chat/completions", body)
    assert "did you mean 'beta'" in error["error"]["message"]


async def test_who_hangs_up_before_the_first_byte_pays_for_the_engines_work(stack: Stack) -> None:
    """Its prompt of 500 tokens and some for the time, not the 100,000 that it might have had."""
    stack.engines[0].answer = kit.never
    body: dict[str, Any] = {"model": "alpha", "messages": [{"role": "user", "content": "x" * 2000}]}
    body["max_tokens"] = 100_000
    call = asyncio.create_task(ask(stack, "globex", "POST", "/v1/chat/completions", body))
    await eventually(lambda: stack.engines[0].received, "not sent")
    call.cancel()

    def used() -> Used:
        return stack.scheduler.usage.totals(0.0).get("tenant:globex", Used())

    await eventually(lambda: used().gpu_ms, "the end was not reported")
    assert 500 <= used().tokens < 50_000


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("odd", [False, True])
async def test_requests_that_wait_hold_no_more_than_the_budget(tmp_path: Path, odd: bool) -> None:
    """By the front and by aiohttp's server; what leaves makes room again."""
    async with kit.stack(tmp_path, held_bytes=4 * 2**20) as stack:
        if odd:
            stack.make_calls_odd()
        await stack.serve("cold", warmth="cold")
        body = {"model": "cold", "messages": [{"role": "user", "content": "x" * 900_000}]}
        url = "/v1/chat/completions"

        async def held() -> int:
            async with stack.post(url, body) as response:
                if response.status == 503:
                    error = (await response.json())["error"]
                    assert error["code"] == "memory_full"
                    assert "router.held_bytes" in error["message"]
                    assert response.headers["Retry-After"]
                return response.status

        calls = [asyncio.create_task(held()) for _ in range(12)]
        await eventually(lambda: sum(c.done() for c in calls) >= 10, "more are held than may be")
        assert {c.result() for c in calls if c.done()} == {503}
        await stack.serve("cold", await stack.engine(unary()))
        async with asyncio.timeout(kit.DEADLINE_S):
            assert {await call for call in calls} == {200, 503}
        assert await held() == 200


async def test_a_body_larger_than_the_budget_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with kit.stack(tmp_path, held_bytes=2**20) as stack:
        await stack.serve("m", await stack.engine(unary()))
        async with stack.post("/v1/chat/completions", b" " * 3 * 2**20) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (
                503, "memory_full",
            )  # fmt: skip
        async with stack.post("/v1/chat/completions", {"model": "m"}) as response:
            assert response.status == 200
