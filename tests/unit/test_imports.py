"""Who may import whom, as docs/architecture.md says, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rules.product import sources

ROOT = Path(__file__).parents[2]
OURS = {"runtime", "scheduler", "agent", "cli", "bench", "tests"}
MAY_IMPORT = {
    "runtime": {"runtime"},
    "scheduler": {"scheduler", "runtime"},
    "agent": {"agent", "runtime"},
    "cli": {"cli", "scheduler", "agent", "runtime"},
}
PURE_FOLDERS = (
    "agent/core/", "agent/sim/",
    "scheduler/core/", "scheduler/policy/", "scheduler/signals/", "scheduler/state/",
)  # fmt: skip
PURE = (  # files in folders that are not pure
    "scheduler/admin/view_builders.py", "scheduler/admin/what_if.py", "runtime/footprints.py",
    "runtime/adapters.py", "runtime/outside.py", "agent/engines/wake_canary.py",
    "agent/engines/start_phases.py", "agent/cache/policy.py", "agent/weights/staging_policy.py",
    "agent/devices/host_memory_policy.py", "agent/weights/load_format_policy.py",
    "runtime/router/admission.py", "runtime/router/breaker.py", "runtime/router/sketch.py",
    "runtime/router/limits.py", "runtime/router/keys.py", "runtime/access.py", "scheduler/usage.py",
    "runtime/router/usage.py", "runtime/router/stream_usage.py", "runtime/router/stored.py",
    "runtime/router/fairness.py", "runtime/router/cards.py", "runtime/router/headers.py",
    "runtime/router/forwarded.py", "runtime/router/local.py", "runtime/router/memory.py",
    "runtime/router/paths.py", "runtime/router/patience.py", "runtime/router/refusals.py",
    "runtime/router/error_shapes.py", "runtime/router/microbatch.py",
    "runtime/router/response_cache.py", "runtime/router/affinity.py", "runtime/router/prompt.py",
    "runtime/router/jobs/lines.py", "runtime/router/jobs/plan.py", "runtime/router/jobs/shapes.py",
    "runtime/router/jobs/signing.py", "runtime/sim/loop.py", "runtime/sim/pipe.py",
    "runtime/sim/profile.py", "runtime/sim/timings.py", "runtime/sim/witness.py",
    "scheduler/sim/network.py", "scheduler/sim/control_plane.py", "scheduler/sim/links.py",
    "scheduler/sim/routers.py", "scheduler/sim/rule_checker.py", "scheduler/sim/report.py",
    "scheduler/sim/policy.py", "scheduler/sim/catalog.py", "scheduler/sim/faults.py",
    "scheduler/sim/scenarios.py", "runtime/prewarm.py", "runtime/sizes.py",
    "runtime/engine/exits.py", "runtime/rules.py", "runtime/router/versions.py",
    "runtime/router/forms.py", "runtime/engine_policy.py", "runtime/engine/stub_media.py",
)  # fmt: skip
IMPURE_MODULES = {
    "asyncio", "aiohttp", "time", "random", "uuid", "logging", "datetime", "os", "secrets",
    "socket", "subprocess", "threading",
}  # fmt: skip
# What may be taken of them: a generator that its caller seeded, and a time that its caller gives.
PURE_NAMES = {"random": {"Random"}, "datetime": {"datetime"}}
IMPURE_CALLS = {
    "open", "print", "input", "Random()", "datetime.now", "datetime.utcnow", "datetime.today",
}  # fmt: skip
# module -> the only file that may import it
ONE_IMPORTER = {
    "python_multipart": "runtime/router/forms.py",
    "pynvml": "agent/devices/nvml.py",
    "consul": "runtime/consul.py",
    "huggingface_hub": "agent/cache/hub.py",
    "boto3": "agent/cache/s3.py",
    "opentelemetry": "runtime/router/tracing.py",
}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The full names of all modules that are imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join(parts) + "." if node.level else ""
            yield f"{prefix}{node.module or ''}".rstrip(".")


def impure_imports(tree: ast.AST) -> Iterator[str]:
    """The modules imported, but for those of which PURE_NAMES are taken alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module, names = node.module or "", {name.name for name in node.names}
            yield from () if names <= PURE_NAMES.get(module, set()) else (module,)


def is_pure(path: str) -> bool:
    """Whether nothing in the file may touch the world."""
    return path in PURE or path.startswith(PURE_FOLDERS)


def impure_call(node: ast.AST) -> bool:
    """Whether it reads or writes, takes a clock's time, or seeds from the system."""
    if not isinstance(node, ast.Call):
        return False
    bare = "" if node.args or node.keywords else "()"
    called = ast.unparse(node.func)
    return called in IMPURE_CALLS or called + bare in IMPURE_CALLS


def violations(path: str, source: str) -> list[str]:
    """Every rule that the file at `path` (from the root) breaks, in words."""
    tree = ast.parse(source)
    part = path.split("/")[0]
    found = []
    for module in imports(tree, path.rpartition("/")[0].replace("/", ".")):
        top = module.split(".")[0]
        if path == "runtime/wire.py" and top in OURS:
            found.append(f"{path}: wire imports nothing of ours, but it imports {module}")
        elif top in OURS and top not in MAY_IMPORT[part]:
            found.append(f"{path}: {part} may not import {module}")
        if ONE_IMPORTER.get(top, path) != path:
            found.append(f"{path}: only {ONE_IMPORTER[top]} may import {module}")
    if "asyncio.wait_for(" in source:  # on Python 3.11 it can swallow a cancellation
        found.append(f"{path}: asyncio.timeout ends what asyncio.wait_for may let run on")
    if is_pure(path):
        for module in impure_imports(tree):
            if module.split(".")[0] in IMPURE_MODULES:
                found.append(f"{path}: decides, so it may not import {module}")
        for node in ast.walk(tree):
            if impure_call(node):
                found.append(f"{path}: decides, so it may not call {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sources())
def test_file(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_file_that_a_rule_names_is_there() -> None:
    for path in (*PURE, *ONE_IMPORTER.values(), "runtime/wire.py"):
        assert (ROOT / path).is_file(), path


def test_a_file_that_says_it_is_pure_is_held_to_it() -> None:
    for path in sources():
        says = (
            ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        ).split("\n")
        pure = says[0].endswith("Pure.") and not path.endswith("__init__.py")
        assert not pure or is_pure(path), f"{path} says it is pure: add it to PURE"


def test_the_one_importers_do_import() -> None:
    for module, path in ONE_IMPORTER.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert any(name.split(".")[0] == module for name in imports(tree, "")), path


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/wire.py", "from runtime.schema import check"),
        ("runtime/wire.py", "from . import schema"),
        ("runtime/spec.py", "import scheduler.core.decisions"),
        ("runtime/router/api.py", "def f():\n    from agent import core"),
        ("scheduler/admin/api.py", "from agent.core.state_machine import AgentCore"),
        ("agent/node.py", "from scheduler import views"),
        ("agent/node.py", "import cli.main"),
        ("scheduler/core/decisions.py", "import asyncio"),
        ("scheduler/core/decisions.py", "def f():\n    from time import monotonic"),
        ("agent/core/state_machine.py", "import datetime as d"),
        ("agent/core/state_machine.py", "from datetime import date"),
        ("agent/core/state_machine.py", "from datetime import datetime\ndatetime.now(UTC)"),
        ("scheduler/sim/faults.py", "from random import Random\nRandom()"),
        ("scheduler/sim/faults.py", "from random import choice"),
        ("runtime/router/admission.py", "open('x')"),
        ("agent/devices/inventory.py", "import pynvml"),
        ("runtime/registries.py", "from consul.aio import Consul"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scheduler/admin/api.py", "import asyncio\nfrom runtime.wire import encode"),
        (
            "scheduler/core/decisions.py",
            "from scheduler.state import ClusterState\nimport dataclasses",
        ),
        ("scheduler/sim/faults.py", "from random import Random\nRandom('seed 1')"),
        ("runtime/router/api.py", "from . import proxy\nfrom ..wire import encode"),
        ("agent/devices/nvml.py", "import pynvml"),
        ("runtime/registries.py", "from runtime.consul import ConsulRegistry"),
        ("cli/main.py", "from agent.driver import run_agent\nimport scheduler.driver"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []
