"""What opens the scheduler's doors, and what a word in an address or a token cannot reach."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import pytest
from yarl import URL

from scheduler.access import Access
from scheduler.store import Store
from tests.kits.bearer_headers import cases, status_of
from tests.kits.scheduler_http import SCRAPER, TOKEN, Client, leading, scheduler


async def test_a_token_that_is_no_text_is_a_401(tmp_path, registry) -> None:
    async with scheduler(tmp_path, registry) as url:
        for token in (b"\xff", b"stoker-admin-0123456789-\xff\xfe", b""):
            reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            head = b"GET /admin/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            writer.write(head + b"Authorization: Bearer " + token + b"\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
            writer.close()


async def test_a_token_is_read_as_everywhere(tmp_path, agent, registry, session) -> None:
    async with scheduler(tmp_path, registry) as url:
        client = Client(url, session)
        await leading(client, agent)
        _, made = await client("POST", "/admin/tokens", {"name": "ann", "role": "viewer"})
        for path, token in (
            ("/admin/models", TOKEN),
            ("/admin/models", made["token"]),
            ("/metrics", SCRAPER),
        ):
            for lines, opens in [*cases(token), (f"Authorization: {token}".encode(), False)]:
                assert await status_of(url, path, lines) == (200 if opens else 401), (path, lines)


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
