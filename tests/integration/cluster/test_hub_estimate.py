"""`name` and `source: hf:org/name` are enough: what a model takes is told before it is pulled."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from agent.cache.errors import SourceError
from agent.cache.hub import HubSource
from agent.weights import skeleton
from runtime.engine.vllm import memory_estimate
from runtime.wire.model_spec import ModelSpec
from tests.kits.checkout import ROOT
from tests.kits.cluster import running
from tests.kits.fake_hub import FakeHub, hub_in_a_thread

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 320,
    "intermediate_size": 128, "max_position_embeddings": 512, "torch_dtype": "bfloat16",
}  # fmt: skip


def safetensors(*names: str, dtype: str = "BF16", padding: int = 0) -> bytes:
    """A file of tensors of 64 x 64; `padding` makes the header longer."""
    size = 64 * 64 * (4 if dtype == "F32" else 2)
    header = {
        name: {"dtype": dtype, "shape": [64, 64], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header | {"__metadata__": {"note": "x" * padding}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(len(names) * size)


def one_file(**more: bytes) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": safetensors("a"),
        **more,
    }


def indexed() -> dict[str, bytes]:
    """Two shards that an index names, one with a header of 200 KB, and a file that it does not."""
    shards = {
        "one.safetensors": safetensors("model.layers.0.q.weight", padding=200_000),
        "two.safetensors": safetensors("model.layers.1.q.weight", "b", dtype="F32"),
    }
    index = {"weight_map": {"model.layers.0.q.weight": "one.safetensors", "b": "two.safetensors"}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": safetensors("c", "d", "e"),
        "tokenizer.json": b"{" + b" " * 500_000 + b"}",
        **shards,
    }


def pickled() -> dict[str, bytes]:
    return {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": os.urandom(30_000)}


@pytest.fixture
async def hub(monkeypatch):
    hub = FakeHub()
    await hub.open()
    # What HF_ENDPOINT sets, which is read only once in a process.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("agent.cache.hub._TRIES", 1)
    yield hub
    await hub.close()


def origin(name="org/m"):
    return HubSource(name, "main")


@pytest.mark.parametrize("files", [one_file(), indexed(), pickled()], ids=["one", "index", "bin"])
@pytest.mark.parametrize("args", [{}, {"enable_lora": True}, {"dtype": "float32"}], ids=str)
async def test_it_is_what_the_whole_files_would_say(hub, tmp_path: Path, files, args) -> None:
    hub.add("org/m", files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    spec = ModelSpec(name="m", source="hf:org/m", engine_args=args)
    expected = memory_estimate.estimate(spec, str(tmp_path), "cpu")
    async with skeleton.fetched(origin()) as folder:
        assert memory_estimate.estimate(spec, str(folder), "cpu") == expected
        kept = folder
    assert not kept.exists()


async def test_no_weights_are_read(hub) -> None:
    big = safetensors(*(f"t{i}" for i in range(200)))  # 1.6 MB
    hub.add("org/m", one_file(**{"model.safetensors": big}))
    read = 0

    class Counting:
        def __getattr__(self, name):
            return getattr(inner, name)

        def read_into(self, file, start, view):
            nonlocal read
            read += len(view)
            inner.read_into(file, start, view)

    inner = origin()
    async with skeleton.fetched(Counting()):
        pass
    assert 0 < read <= 150_000


async def test_a_model_that_the_hub_has_not_is_told(hub) -> None:
    with pytest.raises(SourceError, match="org/none"):
        async with skeleton.fetched(origin("org/none")):
            pass


async def test_a_hub_that_hangs_is_given_up(hub, monkeypatch) -> None:
    hub.add("org/m", one_file())
    asked = asyncio.Event()

    async def hang(path):
        asked.set()
        await asyncio.sleep(3600)

    hub.before_bytes = hang
    monkeypatch.setattr(skeleton, "FETCH_S", 1.0)
    with pytest.raises(SourceError, match="has not said what the model consists of"):
        async with skeleton.fetched(origin()):
            pass
    assert asked.is_set()


@pytest.mark.parametrize(
    ("name", "data"),
    [("model.safetensors", b"\xff" * 2000), ("config.json", b"[]"), ("config.json", b"{" * 5000)],
)
async def test_invalid_files_are_a_reason_and_not_a_crash(hub, name, data) -> None:
    hub.add("org/m", one_file(**{name: data}))
    spec = ModelSpec(name="m", source="hf:org/m")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        async with skeleton.fetched(origin()) as folder:
            memory_estimate.estimate(spec, str(folder), "cpu")


# ------------------------------------------------------------------------- a fresh cluster


def stoker(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *args], cwd=ROOT, capture_output=True, text=True,
        timeout=240, env=clean | {"STOKER_STATE_DIR": str(state)},
    )  # fmt: skip


def test_the_examples_can_be_added_to_a_fresh_cluster(tmp_path: Path) -> None:
    specs = yaml.safe_load((ROOT / "examples/fleet.yaml").read_text())["models"]
    models = {spec["source"].removeprefix("hf:"): indexed() for spec in specs}
    minimal = tmp_path / "minimal.yaml"
    minimal.write_text("name: least\nsource: hf:org/least\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: wrong\nsource: hf:org/mistyped\n")
    with hub_in_a_thread(models | {"org/least": one_file()}) as hub:
        state = tmp_path / "state"
        token = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        with running(state, "--devices", "simulated:4x24GiB", **token):
            done = stoker(state, "model", "add", str(ROOT / "examples/fleet.yaml"), str(minimal))
            assert done.returncode == 0, done.stderr
            assert [line.split()[:2] for line in done.stdout.splitlines() if "added" in line] == [
                ["added", f"{name}:"] for name in (*(spec["name"] for spec in specs), "least")
            ]
            again = stoker(state, "model", "add", str(minimal))
            assert again.stdout.startswith("unchanged least: ")
            minimal.write_text("name: least\nsource: hf:org/least\ndevice_memory_bytes: 8MiB\n")
            less = stoker(state, "model", "add", str(minimal))
            assert less.stdout.startswith("changed least: ")
            assert "it will most likely not start: device_memory_bytes is 0.01 GiB" in less.stdout
            shown = json.loads(stoker(state, "model", "show", "least", "--json").stdout)
            assert shown["estimate"]["total_bytes"] > 0
            refused = stoker(state, "model", "add", str(wrong))
            assert refused.returncode == 1
            assert "has no org/mistyped" in refused.stderr
            assert "device_memory_bytes" in refused.stderr
