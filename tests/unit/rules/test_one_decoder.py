"""Bytes from outside become objects in `runtime/outside.py` alone, by the sources.

So their depth, size and encoding are bounded, and all that can be wrong with them is expected.
"""

from __future__ import annotations

import ast

import pytest

from tests.unit.rules.product import sources, text

PLACE = "runtime/outside.py"
_DECODERS = {
    "json.load", "json.loads", "json.JSONDecoder", "tomllib.load", "tomllib.loads", "yaml.load",
    "yaml.safe_load", "yaml.load_all", "yaml.safe_load_all", "pickle.load", "pickle.loads",
    "marshal.loads", "ast.literal_eval",
    *(f"msgspec.{kind}.{name}" for kind in ("json", "msgpack", "yaml", "toml")
      for name in ("decode", "Decoder")),
}  # fmt: skip
_MODULES = {name.rpartition(".")[0] for name in _DECODERS}
_OF_REQUESTS = {"json", "post", "multipart"}  # aiohttp's own decoders: `await request.json()`

# How often each may, and why: the bytes are our own, or a person's own file.
EXCEPTIONS = {
    "agent/weights/adapters.py": 1,  # written by an earlier agent
    "agent/cache/store.py": 1,  # written by an earlier agent
    "agent/engines/launcher.py": 1,  # from our own fork server
    "agent/records.py": 1,  # written by an earlier agent
    "agent/engines/process_snapshot.py": 1,  # what the installed vLLM prints
    "cli/part_process.py": 1,  # from a part that we started
    "cli/showcase.py": 1,  # from the router that we started
    "cli/cluster.py": 1,  # written by `stoker up`
    "runtime/contract/config.py": 1,  # the operator's configuration
    "runtime/registry/embedded.py": 1,  # our own table of services
    "runtime/engine/adapter_index.py": 2,  # inside vLLM; catches what a file of a model does
    "runtime/engine/guard.py": 1,  # inside vLLM, standard library only; behind the control key
    "runtime/engine/fork_server.py": 1,  # from the agent that started it
    "runtime/engine/stub/server.py": 1,  # from the agent that started it
    "runtime/engine/stub/protocols.py": 1,  # an answer that it made itself
    "runtime/engine/vllm/arguments.py": 2,  # what the installed vLLM prints; a word is only tried
    "runtime/engine/vllm/preload.py": 1,  # from the agent that started it
    "runtime/router/jobs/store/batch_rows.py": 1,  # a column that was written encoded
    "runtime/router/control/workers.py": 1,  # from a worker that we started
    "scheduler/sim/traces.py": 1,  # the operator's trace
}


def violations(source: str) -> list[str]:
    """Every place that decodes, in words."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in _MODULES:
            names = {f"{node.module}.{name.name}" for name in node.names} & _DECODERS
            found += [f"line {node.lineno}: imports {name}" for name in names]
        elif isinstance(node, ast.Import):
            odd = [n.name for n in node.names if n.asname and n.name.split(".")[0] in _MODULES]
            found += [f"line {node.lineno}: imports {name} by another name" for name in odd]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in _DECODERS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Await) and isinstance(node.value, ast.Call):
            call = node.value
            bare = isinstance(call.func, ast.Attribute) and call.func.attr in _OF_REQUESTS
            if bare and not call.args and not call.keywords:
                found.append(f"line {node.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("path", sources(but=PLACE))
def test_outside_bytes_are_decoded_in_one_place(path: str) -> None:
    found = violations(text(path))
    assert len(found) == EXCEPTIONS.get(path, 0), f"use runtime.outside: {found}"


def test_what_the_rule_names_is_there() -> None:
    assert violations(text(PLACE))
    assert set(EXCEPTIONS) <= set(sources())


@pytest.mark.parametrize(
    "planted",
    [
        "msgspec.json.decode(await request.read(), type=Spec)",
        "read = msgspec.json.Decoder(Head).decode",
        "json.loads(body)",
        "json.load(file)",
        "from json import loads",
        "from msgspec.json import decode",
        "import json as j",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader)",
        "tomllib.loads(text)",
        "pickle.loads(body)",
        "async def f(request):\n    return await request.json()",
        "async def f(request):\n    return await request.post()",
        "async def f(request):\n    return await request.multipart()",
    ],
)
def test_a_planted_second_decoder_is_found(planted: str) -> None:
    assert violations(planted)


@pytest.mark.parametrize(
    "allowed",
    [
        "outside.decode(body, Spec)",
        "json.dumps(body)",
        "msgspec.json.encode(body)",
        "text = body.decode()",
        "async def f(session):\n    await session.post(url, json=body)",
    ],
)
def test_what_decodes_nothing_from_outside_is_allowed(allowed: str) -> None:
    assert violations(allowed) == []
