"""A real vLLM engine that changes to another model in place answers as a fresh one of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.tiny_models import write_model
from runtime.engine.vllm.shell_key import ARCHITECTURES
from runtime.wire.model_spec import ModelSpec
from tests.kits.forked_vllm import VLLM, ForkedVllm, VllmForge, context
from tests.kits.other_tokenizer import vary
from tests.kits.tiny_families import FAMILIES, write_family
from tests.kits.vllm_answers import answers

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed"),
    pytest.mark.timeout(1200),
]
ARGS: dict[str, Any] = {
    "enforce_eager": True, "max_model_len": 1024, "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}  # fmt: skip
VERSION = "0.32.0"


def spec(name: str, *aliases: str) -> ModelSpec:
    return ModelSpec(name=name, aliases=aliases, source="x", engine_args=ARGS)


A, B = spec("a", "org/a"), spec("b", "org/b", "bee")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write_model(folder, "a")
    vary(write_model(folder, "b"))
    return folder


@pytest.fixture
async def forge(tmp_path: Path) -> Any:
    forge = VllmForge(tmp_path)
    yield forge
    await forge.close()


def key(model: ModelSpec, folder: Path, engine: ForkedVllm) -> str | None:
    ctx = context(folder, engine.ctx.port, "route", Path(engine.ctx.cache_dir))
    return VLLM.shell_key(model, ctx, VERSION)


async def test_it_answers_as_a_fresh_engine_and_back_again(forge: Any, models: Path) -> None:
    fresh = await forge.start(B, models / "b")
    wanted = await answers(fresh, "b")
    await forge.end(fresh)
    engine = await forge.start(A, models / "a", VLLM_SERVER_DEV_MODE="1")
    assert key(A, models / "a", engine) == key(B, models / "b", engine) is not None
    before = await answers(engine, "a")
    _differ_everywhere(before, wanted)

    status, told = await engine.repoint(B, models / "b", "route-b")
    assert status == 200, told
    assert set(told["phases"]) == {"prepare", "reload", "core_renew", "renew"}
    asked = {"model": "b", "prompt": "the", "max_tokens": 1}
    assert (await engine.call("/v1/completions", asked, key="route"))[0] == 401
    assert (await engine.call("/v1/completions", asked, key="route-b"))[0] == 200
    assert (await engine.call("/v1/completions", {**asked, "model": "a"}))[0] == 404
    _same(await answers(engine, "b"), wanted)
    # As a wake from sleep level 2 does: weights are loaded from the folder that is served by now.
    assert (await engine.call("/collective_rpc", {"method": "reload_weights"}))[0] == 200
    _same(await answers(engine, "b"), wanted)

    status, told = await engine.repoint(A, models / "a", "route")
    assert status == 200, told
    _same(await answers(engine, "a"), before)
    await _refuses_or_ends(engine, models, before)


async def _refuses_or_ends(engine: ForkedVllm, models: Path, before: dict[str, Any]) -> None:
    """What can't be served leaves the engine as it was, or ends it."""
    other = shutil.copytree(models / "b", models / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    bare = shutil.copytree(models / "b", models / "bare")
    (bare / "tokenizer.json").write_text("{")
    for folder, words in (
        (models / "nowhere", "is not a folder"),
        (models, "no config can be made"),
        (other, "another config is needed: model_config.hf_config.rms_norm_eps"),
        (bare, "no config can be made"),
    ):
        status, told = await engine.repoint(B, folder, "route-b")
        assert (status, words in told["error"]) == (409, True), told
        assert (await engine.call("/stoker/open", method="POST"))[0] == 200
    # Nothing of it was touched.
    _same(await answers(engine, "a"), before)
    asked = {"model": "a", "prompt": "the", "max_tokens": 1}
    assert (await engine.call("/v1/completions", asked, key="route"))[0] == 200

    lacking = shutil.copytree(models / "b", models / "lacking")
    _drop_a_weight(lacking / "model.safetensors")
    assert key(B, lacking, engine) != key(A, models / "a", engine)
    status, told = await engine.repoint(B, lacking, "route-b")
    assert (status, "were not loaded" in told["error"]) == (500, True), told
    assert (await engine.call("/stoker/open", method="POST"))[0] == 409
    assert (await engine.call("/v1/completions", asked))[0] == 503


async def test_each_architecture_that_has_a_key(forge: Any, tmp_path: Path) -> None:
    tiny = write_model(tmp_path, "tiny")
    seen = set()
    for family in FAMILIES:
        a = write_family(tmp_path / f"{family}-a", family, 1, tiny)
        b = vary(write_family(tmp_path / f"{family}-b", family, 2, tiny))
        fresh = await forge.start(B, b)
        wanted = await answers(fresh, "b", prompts=6)
        await forge.end(fresh)
        engine = await forge.start(A, a)
        assert key(A, a, engine) == key(B, b, engine) is not None
        before = await answers(engine, "a", prompts=6)
        for model, folder, due in ((B, b, wanted), (A, a, before)):
            status, told = await engine.repoint(model, folder, "route")
            assert status == 200, (family, told)
            _same(await answers(engine, model.name, prompts=6), due)
        await forge.end(engine)
        seen.update(json.loads((a / "config.json").read_text())["architectures"])
    assert seen == ARCHITECTURES


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert {name: found[name] for name in wanted if found[name] != wanted[name]} == {}
    assert set(found) == set(wanted)


def _differ_everywhere(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Else what is compared would show nothing."""
    assert {name for name in one if one[name] == other[name]} == set()
    ends = [other[name]["choices"][0]["finish_reason"] for name in other if "chat " in name]
    assert {"stop", "length"} <= set(ends), "the generation config's ends are to be seen"
    for told in (one, other):
        # A random model may fill what a schema lets it with white space.
        assert told["schema"]["choices"][0]["message"]["content"].startswith("{")
        parsed = json.loads(told["regex"]["choices"][0]["message"]["content"])
        assert set(parsed) == {"a", "b"}
        chosen = told["choice"]["choices"][0]["message"]["content"]
        assert chosen in ("the red one", "the blue one", "neither")


def _drop_a_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
