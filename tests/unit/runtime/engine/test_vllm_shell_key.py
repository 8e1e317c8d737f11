"""Which vLLM engines share a shell key, what splits it, and what has none. Starts no vLLM."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.engine import guard
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm import shell_key
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "dtype": "bfloat16",
    "tie_word_embeddings": False, "eos_token_id": 7, "_name_or_path": "base",
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
}  # fmt: skip
WEIGHTS = {"embed": ("BF16", [8, 4]), "head": ("BF16", [4, 8])}
VERSION = "0.32.0"


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    weights: dict[str, Any] = WEIGHTS,
    limit: int = 4096,
    fill: bytes = b"\0",
) -> str:
    """A model's folder; `fill` is what its weights are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    header, at = {}, 0
    for name, (dtype, shape) in weights.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + fill * at
    (folder / "model.safetensors").write_bytes(data)
    return str(folder)


class World:
    """Keys of models that differ from one in what a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.base = write(folder / "base")
        self.key = self.of()

    def of(
        self, version: str | None = VERSION, ctx: dict[str, Any] | None = None, **spec: Any
    ) -> str | None:
        context = LaunchContext(
            replica_id="r", host="127.0.0.1", port=1, route_key="k", control_key="c",
            device_kind="cpu", device_ids=("GPU-1",), device_indexes=(0,), device_bytes=8 * GIB,
            device_total_bytes=80 * GIB, model_path=self.base, revision=None,
            python=sys.executable, cache_dir="/c", kv_bytes=GIB,
        )  # fmt: skip
        model = ModelSpec(name="m", source="x", engine_args={"dtype": "auto"})
        return get_engine("vllm").shell_key(
            msgspec.structs.replace(model, **spec),
            msgspec.structs.replace(context, **ctx or {}),
            version,
        )

    def other(self, args: dict[str, Any] | None = None, **files: Any) -> str | None:
        """Of a model with other files."""
        self.count += 1
        path = write(self.folder / str(self.count), **files)
        spec: dict[str, Any] = {} if args is None else {"engine_args": args}
        return self.of(ctx={"model_path": path}, **spec)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_fine_tune_shares_the_key_of_its_base(world: World) -> None:
    assert world.key is not None
    assert int(world.key, 16) >= 0
    tuned = {
        "_name_or_path": "tuned", "transformers_version": "9", "eos_token_id": [8, 9],
        "bos_token_id": 1, "pad_token_id": 2, "use_cache": False, "unsloth_version": "1",
    }  # fmt: skip
    assert world.other(config=tuned, fill=b"\1") == world.key
    assert world.of(name="other", aliases=("a",), source="y", idle_s=5.0) == world.key
    where = {"replica_id": "q", "port": 2, "route_key": "z", "control_key": "y", "cache_dir": "/d"}
    assert world.of(ctx=where) == world.key
    assert world.of(ctx={"device_ids": ("GPU-2",), "device_indexes": (1,)}) == world.key
    assert world.of(ctx={"load_format": "safetensors"}) == world.key


def test_another_order_of_the_same_words_is_the_same_key(world: World) -> None:
    turned = dict(reversed(CONFIG.items()))
    assert world.other(config=turned, weights=dict(reversed(WEIGHTS.items()))) == world.key
    one = world.of(engine_args={"max_model_len": 64, "seed": 1})
    assert one == world.of(engine_args={"seed": 1, "--max-model-len": 64}) is not None


def test_everything_that_a_process_keeps_splits_the_key(world: World) -> None:
    head = WEIGHTS["head"]
    keys = [
        world.key,
        world.of(ctx={"device_bytes": 9 * GIB}),
        world.of(ctx={"device_total_bytes": 40 * GIB}),
        world.of(ctx={"kv_bytes": 2 * GIB}),
        world.of(ctx={"kv_bytes": None}),
        world.of(engine_args={"dtype": "float16"}),
        world.of(engine_args={"dtype": "auto", "max_num_seqs": 4}),
        world.of(engine_args={}),
        world.of(sleep="off"),
        world.of(media_domains=("a.org",)),
        world.other(config={"hidden_size": 512}),
        world.other(config={"dtype": "float16"}),
        world.other(config={"tie_word_embeddings": True}),
        world.other(config={"architectures": ["Qwen2ForCausalLM"]}),
        world.other(config={"rope_scaling": {"factor": 4.0, "rope_type": "llama3"}}),
        world.other(config={"something_new": 1}),
        world.other(weights={**WEIGHTS, "bias": ("BF16", [1, 8])}),
        world.other(weights={"embed": WEIGHTS["embed"]}),
        world.other(weights={**WEIGHTS, "head": ("F16", head[1])}),
        world.other(weights={**WEIGHTS, "head": ("BF16", [8, 4])}),
        world.other(weights={"embed": WEIGHTS["embed"], "lm_head": head}),
        world.other(limit=2048),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_the_tokenizers_limit_counts_only_where_the_spec_gives_none(world: World) -> None:
    args = {"max_model_len": 512}
    assert world.other(args=args) == world.other(args=args, limit=2048) is not None


def test_what_was_not_tried_has_no_key(world: World) -> None:
    nothing = [
        world.of(version=None),
        world.of(version="0.33.0"),
        world.of(adapters={"sql": "/a"}),
        world.of(ctx={"adapter_index": "/i"}),
        world.of(env={"NCCL_P2P_DISABLE": "1"}),
        world.of(tensor_parallel_size=2),
        world.of(ctx={"device_kind": "simulated"}),
        world.of(ctx={"device_kind": "nvml"}),
        world.of(ctx={"load_format": "runai_streamer"}),
        world.other(config={"architectures": ["LlavaForConditionalGeneration"]}),
        world.other(config={"architectures": ["MixtralForCausalLM"]}),
        world.other(config={"architectures": ["LlamaForCausalLM", "Other"]}),
        world.other(config={"architectures": None}),
        world.other(config={"quantization_config": {"quant_method": "fp8"}}),
        world.other(config={"auto_map": {"AutoModel": "own.Model"}}),
    ]
    assert nothing == [None] * len(nothing)


@pytest.mark.parametrize(
    "args",
    [
        {"speculative_config": {"model": "x"}},
        {"quantization": "fp8"},
        {"enable_lora": True},
        {"trust_remote_code": True},
        {"runner": "pooling"},
        {"load_format": "sharded_state"},
        {"max_model_len": "auto"},
        {"max_model_len": -1},
        {"kv_cache_dtype": "fp8"},
        {"kv_transfer_config": {}},
        {"kv_offloading_size": 1},
        {"reasoning_parser": "qwen3"},
        {"tokenizer": "/other"},
        {"hf_overrides": {"a": 1}},
        {"a_later_option": 1},
        {"speculative_config.model": "x"},
    ],
)
def test_an_argument_that_was_not_tried_leaves_no_key(world: World, args: dict[str, Any]) -> None:
    assert world.of(engine_args=args) is None


def test_a_folder_that_cannot_be_read_has_no_key(world: World, tmp_path: Path) -> None:
    assert world.of(ctx={"model_path": "org/name"}) is None
    for broken in ("config.json", "model.safetensors", "tokenizer_config.json"):
        path = Path(write(tmp_path / f"no-{broken}"))
        (path / broken).write_text("[")
        assert world.of(ctx={"model_path": str(path)}) is None
    bare = Path(write(tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert world.of(ctx={"model_path": str(bare)}) is None
    mistral = Path(write(tmp_path / "mistral"))
    (mistral / "params.json").write_text("{}")
    assert world.of(ctx={"model_path": str(mistral)}) is None


def test_a_reason_is_told_in_words(tmp_path: Path) -> None:
    spec = ModelSpec(name="m", source="x", engine_args={"enable_lora": True})
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=1, route_key="k", control_key="c",
        device_kind="cpu", device_ids=("c",), device_indexes=(0,), device_bytes=GIB,
        device_total_bytes=GIB, model_path="/b", revision=None, python="p", cache_dir="/c",
    )  # fmt: skip
    assert shell_key.why_not(spec, ctx, VERSION) == "arguments that were not tried: enable_lora"
    body = get_engine("vllm").repoint(spec, ctx)
    assert guard.read_repoint(json.dumps(body).encode()) == guard.Repoint("/b", ("m",), "k")
