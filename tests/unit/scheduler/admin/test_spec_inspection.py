"""What the scheduler says of a spec that no node has looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from runtime.wire.model_spec import ModelSpec
from scheduler.admin.spec_inspection import inspect_spec

SPEC = ModelSpec(name="m", source="/m")
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.mark.parametrize(
    ("nodes", "said"),
    [((), "no node is up"), (("gpu-1",), "node gpu-1 could not check it: Cannot connect to host")],
)
async def test_why_it_cannot_be_estimated_is_the_nodes_own_reason(
    nodes: tuple[str, ...], said: str
) -> None:
    known = {name: SimpleNamespace(node_id=name, live=True) for name in nodes}
    async with aiohttp.ClientSession() as http:
        core: Any = SimpleNamespace(state=SimpleNamespace(nodes=known))
        agents: Any = SimpleNamespace(address=lambda node_id: NOBODY, http=http)
        found = await inspect_spec(core, agents, SPEC, fetch=False)
    [problem] = found.problems
    assert problem.field == "device_memory_bytes"
    assert f"cannot be estimated: {said}" in problem.message
