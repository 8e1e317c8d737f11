"""Clients that nobody here wrote, each put through the same situations, against a real `stoker up`.

The clients of `IN_DEV` are installed with the tests; the others are where `scripts/setup.sh
outside` puts them, and are skipped, saying so, where that was not run. With
STOKER_WRITE_CLIENTS_TABLE=1 the table goes to docs/clients.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kits.checkout import ROOT
from tests.kits.cluster import Cluster, running
from tests.outside.situations import SITUATIONS
from tests.outside.table import NOT_TRIED, Cell, written
from tests.outside.talk import CLIENTS, Script

OUTSIDE = Path(os.environ.get("STOKER_OUTSIDE_VENV", ROOT / ".venv-outside"))


class Client(NamedTuple):
    """One row of the table. `package` is the one whose version is shown."""

    title: str
    script: str
    package: str
    api: str
    unfit: tuple[str, ...] = ()  # situations it has no part in, each with its reason in UNFIT


# Why a client is not put through a situation.
UNFIT = {
    "pydantic-ai-anthropic": "with this Anthropic SDK it ends in a TypeError of its own, unsent",
    "instructor": "where the engine dies it asks for the whole object again, until it is one",
}
CLIENTS_TRIED = {
    "openai": Client("openai, Python: chat", "openai_python.py", "openai", "chat"),
    "openai-completions": Client(
        "openai, Python: completions", "openai_python.py", "openai", "completions"
    ),
    "openai-responses": Client(
        "openai, Python: Responses", "openai_python.py", "openai", "responses"
    ),
    "anthropic": Client("anthropic, Python", "anthropic_python.py", "anthropic", ""),
    "litellm": Client("LiteLLM", "litellm_python.py", "litellm", ""),
    "langchain-openai": Client(
        "LangChain, OpenAI", "langchain_python.py", "langchain-openai", "openai"
    ),
    "langchain-anthropic": Client(
        "LangChain, Anthropic", "langchain_python.py", "langchain-anthropic", "anthropic"
    ),
    "llama-index": Client(
        "LlamaIndex", "llama_index_python.py", "llama-index-llms-openai-like", ""
    ),
    "pydantic-ai": Client(
        "Pydantic AI, OpenAI", "pydantic_ai_python.py", "pydantic-ai-slim", "chat"
    ),
    "pydantic-ai-anthropic": Client(
        "Pydantic AI, Anthropic",
        "pydantic_ai_python.py",
        "pydantic-ai-slim",
        "anthropic",
        tuple(SITUATIONS),
    ),
    "instructor": Client("Instructor", "instructor_python.py", "instructor", "", ("dies",)),
    "openai-node": Client("openai, Node: chat", "openai_node.mjs", "openai", "chat"),
    "openai-node-responses": Client(
        "openai, Node: Responses", "openai_node.mjs", "openai", "responses"
    ),
    "anthropic-node": Client("anthropic, Node", "anthropic_node.mjs", "@anthropic-ai/sdk", ""),
    "ai-sdk": Client("Vercel AI SDK: chat", "ai_sdk_node.mjs", "ai", "chat"),
    "ai-sdk-responses": Client("Vercel AI SDK: Responses", "ai_sdk_node.mjs", "ai", "responses"),
}
IN_DEV = ("openai", "openai-completions", "openai-responses", "anthropic")
INSTALLED = (OUTSIDE / "bin" / "python").exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("clients") / "s"
    with running(state, "--devices", "simulated:2x24GiB", STOKER_ROUTER_ANONYMOUS="off") as made:
        made.add_stub("warm", 2, min_replicas=1, engine_args={"token_s": 0.02, "says_once": True})
        yield made


@pytest.fixture(scope="module")
def key(cluster: Cluster) -> str:
    return cluster.admin("POST", "/admin/keys", {"tenant": "outside"})["token"]


@pytest.fixture(scope="module")
def cells() -> Iterator[dict[tuple[str, str], Cell]]:
    """What was seen, by row and column."""
    found: dict[tuple[str, str], Cell] = {}
    yield found
    if os.environ.get("STOKER_WRITE_CLIENTS_TABLE"):
        versions = {c.title: _version(c) for c in CLIENTS_TRIED.values()}
        tables: dict[str, list[str]] = {}
        for situation in SITUATIONS.values():
            tables.setdefault(situation.table, []).append(situation.title)
        reasons = {CLIENTS_TRIED[name].title: why for name, why in UNFIT.items()}
        page = written(versions, tables, found, reasons)
        (ROOT / "docs" / "clients.md").write_text(page)


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], Script]]:
    """The running script of a client; one at a time."""
    running_scripts: dict[str, Script] = {}

    def get(name: str) -> Script:
        client = CLIENTS_TRIED[name]
        if client.script not in running_scripts:
            for old in running_scripts.values():
                old.close()
            running_scripts.clear()
            running_scripts[client.script] = _start(name)
        return running_scripts[client.script]

    yield get
    for left in running_scripts.values():
        left.close()


def _start(name: str) -> Script:
    script = CLIENTS_TRIED[name].script
    if script.endswith(".mjs"):
        modules = OUTSIDE / "node"
        return Script(["node", script], {"STOKER_NODE_CLIENTS": str(modules)})
    python = str(OUTSIDE / "bin" / "python") if INSTALLED else sys.executable
    return Script([python, script], {"PYTHONPATH": str(CLIENTS)})


def _version(client: Client) -> str:
    if client.script.endswith(".mjs"):
        about = OUTSIDE / "node" / "node_modules" / client.package / "package.json"
        return json.loads(about.read_text())["version"] if about.exists() else "-"
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    python = OUTSIDE / "bin" / "python"
    if not python.exists():
        return _own_version(client.package)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "-"


def _own_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def test_the_other_clients() -> None:
    """One skip that says what the short form leaves out."""
    others = [name for name in CLIENTS_TRIED if name not in IN_DEV]
    if not INSTALLED:
        pytest.skip(f"not tried without `scripts/setup.sh outside`: {', '.join(others)}")
    assert (OUTSIDE / "node" / "node_modules").is_dir(), "there is no npm: install nodejs and npm"


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", CLIENTS_TRIED if INSTALLED else IN_DEV)
def test_client(
    name: str,
    situation: str,
    cluster: Cluster,
    key: str,
    script: Callable[[str], Script],
    cells: dict[tuple[str, str], Cell],
) -> None:
    client, tried = CLIENTS_TRIED[name], SITUATIONS[situation]
    where = (client.title, tried.title)
    if situation in client.unfit:
        cells[where] = Cell(NOT_TRIED, True)
        pytest.skip(f"{name} has no part in {situation}: {UNFIT[name]}")
    with tried.model(cluster) as model:
        told = script(name).ask(tried.asked(cluster.router, key, model, client.api))
    shown = told.error["kind"] if told.error else f"{told.took_s:.1f} s"
    cells[where] = Cell(shown, False)
    tried.right(told)
    cells[where] = Cell(shown, True)
