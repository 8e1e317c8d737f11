"""Who may import whom, as docs/architecture.md says, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.kits.checkout import ROOT
from tests.unit.rules.product import sources

OURS = {"runtime", "scheduler", "agent", "cli", "bench", "tests"}
MAY_IMPORT = {
    "runtime": {"runtime"},
    "scheduler": {"scheduler", "runtime"},
    "agent": {"agent", "runtime"},
    "cli": {"cli", "scheduler", "agent", "runtime"},
}
# All of a pure folder is pure; so is any other file whose first paragraph says "Pure.".
PURE_FOLDERS = (
    "agent/core/", "agent/sim/", "runtime/sim/",
    "scheduler/core/", "scheduler/policy/", "scheduler/signals/", "scheduler/state/",
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
WIRE = "runtime/wire/"
# module -> the only file that may import it
ONE_IMPORTER = {
    "python_multipart": "runtime/router/call/multipart.py",
    "pynvml": "agent/devices/nvml.py",
    "consul": "runtime/registry/consul.py",
    "huggingface_hub": "agent/cache/hub.py",
    "boto3": "agent/cache/s3.py",
    "opentelemetry": "runtime/router/observe/tracing.py",
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


def is_pure(path: str, tree: ast.Module) -> bool:
    """Whether nothing in the file may touch the world."""
    opening = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    is_file = not path.endswith("__init__.py")  # that one speaks of the others
    return path.startswith(PURE_FOLDERS) or (is_file and "Pure." in opening)


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
        if path.startswith(WIRE) and top in OURS and not module.startswith("runtime.wire"):
            found.append(f"{path}: wire imports nothing of ours, but it imports {module}")
        elif top in OURS and top not in MAY_IMPORT[part]:
            found.append(f"{path}: {part} may not import {module}")
        if ONE_IMPORTER.get(top, path) != path:
            found.append(f"{path}: only {ONE_IMPORTER[top]} may import {module}")
    if "asyncio.wait_for(" in source:  # on Python 3.11 it can swallow a cancellation
        found.append(f"{path}: asyncio.timeout ends what asyncio.wait_for may let run on")
    if is_pure(path, tree):
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
    for path in (*ONE_IMPORTER.values(), f"{WIRE}names.py"):
        assert (ROOT / path).is_file(), path


def test_the_pure_folders_are_there() -> None:
    for folder in PURE_FOLDERS:
        assert list((ROOT / folder).glob("*.py")), folder


def test_the_one_importers_do_import() -> None:
    for module, path in ONE_IMPORTER.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert any(name.split(".")[0] == module for name in imports(tree, "")), path


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/wire/names.py", "from runtime.contract.schema import check"),
        ("runtime/wire/names.py", "from .. import places"),
        ("runtime/contract/spec_file.py", "import scheduler.core.decisions"),
        ("runtime/router/front/api.py", "def f():\n    from agent import core"),
        ("scheduler/admin/api.py", "from agent.core.state_machine import AgentCore"),
        ("agent/node.py", "from scheduler import views"),
        ("agent/node.py", "import cli.main"),
        ("scheduler/core/decisions.py", "import asyncio"),
        ("scheduler/core/decisions.py", "def f():\n    from time import monotonic"),
        ("agent/core/state_machine.py", "import datetime as d"),
        ("agent/core/state_machine.py", "from datetime import date"),
        ("agent/core/state_machine.py", "from datetime import datetime\ndatetime.now(UTC)"),
        ("scheduler/state/node.py", "from random import Random\nRandom()"),
        ("scheduler/state/node.py", "from random import choice"),
        ("runtime/outside.py", '"""Decodes. Pure."""\nopen("x")'),
        ("agent/devices/inventory.py", "import pynvml"),
        ("runtime/registry/open.py", "from consul.aio import Consul"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scheduler/admin/api.py", "import asyncio\nfrom runtime.wire.names import Name"),
        (
            "scheduler/core/decisions.py",
            "from scheduler.state import ClusterState\nimport dataclasses",
        ),
        ("scheduler/state/node.py", "from random import Random\nRandom('seed 1')"),
        ("runtime/outside.py", '"""Reads, and is not\n\nPure."""\nopen("x")'),
        ("runtime/router/front/api.py", "from . import proxy\nfrom ..wire.names import Name"),
        ("agent/devices/nvml.py", "import pynvml"),
        ("runtime/registry/open.py", "from runtime.registry.consul import ConsulRegistry"),
        ("cli/main.py", "from agent.driver import run_agent\nimport scheduler.driver"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []
