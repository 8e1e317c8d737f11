"""Other policies know the seam, the state and shared judgements; nothing of the core's insides."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits.checkout import ROOT

ALLOWED = ("scheduler.policy.", "scheduler.state.", "scheduler.signals.", "scheduler.sim.traces")
POLICIES = sorted(
    path for path in (ROOT / "bench/policies").glob("*.py") if path.name != "workloads.py"
)


def names(source: str) -> Iterator[str]:
    """Whatever a file imports, in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def beyond_the_seam(source: str) -> list[str]:
    """What of the scheduler a policy imports and should not."""
    return [
        name
        for name in names(source)
        if name.split(".")[0] == "scheduler"
        and (not name.startswith(ALLOWED) or any(part[0] == "_" for part in name.split(".")))
    ]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_a_policy_imports_only_the_seam_and_the_state(path: Path) -> None:
    assert beyond_the_seam(path.read_text()) == []


def test_there_are_policies_to_look_at() -> None:
    assert {path.name for path in POLICIES} >= {"base.py", "simple.py", "clairvoyant.py"}


@pytest.mark.parametrize(
    "line",
    [
        "from scheduler.core.decisions import Core",
        "import scheduler.core.planner",
        "from scheduler import core",
        "def f():\n    from scheduler.driver import Driver",
        "from scheduler.policy.placement import _priced",
    ],
)
def test_a_planted_import_is_found(line: str) -> None:
    assert beyond_the_seam("from scheduler.policy.choices import Scale") == []
    assert len(beyond_the_seam(line)) == 1
