"""What a router holds for its callers comes out of one budget: a second way to hold it fails.

Bodies are read, and answers gathered, in the places listed here alone, each with how it is bounded.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from runtime.router.callers.memory import Memory, MemoryFull
from tests.unit.rules.product import sources, text

READS = frozenset({"read", "text", "json", "post", "multipart", "readany", "read_chunk"})
GATHERS = frozenset({"bytearray", "BytesIO", "Collected", "Recorder", "StreamReader"})

KNOWN = {
    "runtime/router/front/api.py": "Memory.take before it is read",
    "runtime/router/proxy/batcher.py": "Collected takes from the budget",
    "runtime/router/proxy/responder.py": "Collected takes from the budget",
    "runtime/router/jobs/send.py": "Memory.taken for the body, Collected for the answer",
    "runtime/router/jobs/handlers/upload.py": "Memory.taken, for FLUSH_BYTES and a piece",
    "runtime/router/jobs/handlers/requests.py": "at most MAX_BODY_BYTES, 64 KiB",
    "runtime/router/proxy/exchange.py": "Recorder keeps ENTRY_BYTES at most, of the cache's bound",
}


def holds(tree: ast.AST) -> set[str]:
    """How a module gathers bytes of callers or for them."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            found |= {called.id} & GATHERS
        elif isinstance(called, ast.Attribute) and called.attr in READS:
            owner = ast.unparse(called.value)
            if owner in ("request", "part") or owner.startswith("request."):
                found.add(f"{owner}.{called.attr}")
    return found


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sources("runtime/router"):
        yield path, ast.parse(text(path))


def test_bodies_are_held_in_known_places_alone() -> None:
    strange = {name: holds(tree) for name, tree in modules() if holds(tree) and name not in KNOWN}
    assert not strange, "hold it by runtime/router/callers/memory.py's Memory"
    assert not set(KNOWN) - {name for name, tree in modules() if holds(tree)}


def test_a_planted_violation_is_found() -> None:
    planted = ast.parse(
        "async def f(request):\n    x = bytearray()\n    x += await request.read()\n"
    )
    assert holds(planted) == {"bytearray", "request.read"}


def test_the_budget_holds_and_nothing_is_lost_of_it() -> None:
    memory = Memory(100)
    memory.take(60)
    with pytest.raises(MemoryFull, match=r"60 bytes .* 100 .*router\.held_bytes"):
        memory.take(41)
    with memory.taken(40), pytest.raises(MemoryFull):
        memory.take(1)
    memory.give(60)
    assert memory.used == 0


def test_one_tenants_waiting_requests_hold_half_at_most() -> None:
    memory = Memory(100)
    a, b = memory.waiting("a", 50), memory.waiting("b", 50)
    with a, b, pytest.raises(MemoryFull), memory.waiting("a", 1):
        raise AssertionError("let in")
    with memory.waiting("a", 50):
        assert memory.used == 0  # who waits was taken before
