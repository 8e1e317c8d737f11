"""Every line of the admin API's table: served, guarded and refused as its OpenAPI document says."""

from __future__ import annotations

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from scheduler.admin.route_table import ADMIN
from tests.kits.scheduler_http import Client, leading, scheduler


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
