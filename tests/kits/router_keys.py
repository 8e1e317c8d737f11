"""Callers' keys for the router's tests, and calls with them."""

from __future__ import annotations

import json
from typing import Any

from runtime.contract.access import KEY_PREFIX, KeySpec, StoredKey, digest
from tests.kits.router_stack import Stack


def token(name: str) -> str:
    return KEY_PREFIX + name.ljust(10, "0") + "-" + "s" * 43


def key(name: str, tenant: str, **spec: Any) -> StoredKey:
    return StoredKey(
        key_id=name.ljust(10, "0"), digest=digest(token(name)), created_at=0.0,
        spec=KeySpec(tenant=tenant, **spec),
    )  # fmt: skip


async def ask(
    stack: Stack, name: str, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, Any]:
    """Status, body and headers of a call by the key of that name."""
    given = {"Authorization": f"Bearer {token(name)}", **headers}
    data = body
    if isinstance(body, dict):
        data = json.dumps(body)
        given["Content-Type"] = "application/json"
    url = stack.url + path
    async with stack.session.request(method, url, data=data, headers=given) as response:
        text = await response.read()
        try:
            return response.status, json.loads(text), response.headers
        except ValueError:
            return response.status, text, response.headers
