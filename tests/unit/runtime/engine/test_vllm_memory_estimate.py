"""Memory estimates from model files; big ones are sparse files with a true header."""

import json
import struct
from typing import Any

import pytest

from runtime.checkpoints import weight_headers
from runtime.engine.vllm import memory_estimate
from runtime.engine.vllm.memory_estimate import estimate, kv_shape, weights_bytes
from runtime.sizes import GIB
from runtime.wire.model_spec import ModelSpec

LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B_WEIGHTS = 16_060_522_496


def write_shard(file, sizes, dtype="BF16", metadata=True):
    """A safetensors file whose tensors have `sizes` bytes; the data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    offset = 0
    for i, size in enumerate(sizes):
        header[f"w{i}"] = {"dtype": dtype, "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(text) + offset)


@pytest.fixture
def model(tmp_path):
    def write(config, sizes=(1024,), dtype="BF16"):
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_shard(tmp_path / "model.safetensors", sizes, dtype)
        return tmp_path

    return write


def spec(**more):
    return ModelSpec(name="m", source="x", **more)


def test_the_worked_example(model):
    found = estimate(spec(), model(LLAMA_8B, [LLAMA_8B_WEIGHTS]))
    assert found.weights_bytes == LLAMA_8B_WEIGHTS
    assert found.kv_bytes == (16 * 2048 + 128) * 131072
    assert found.overhead_bytes == 2 * GIB + LLAMA_8B_WEIGHTS // 20
    assert found.total_bytes == found.weights_bytes + found.kv_bytes + found.overhead_bytes
    assert 21.6 < found.total_bytes / GIB < 21.8
    assert "max_model_len 8192" in found.explanation


def test_a_long_context_needs_one_full_sequence(model):
    folder = model({**LLAMA_8B, "max_position_embeddings": 131072})
    assert estimate(spec(), folder).kv_bytes == (131072 + 128) * 131072
    shorter = spec(engine_args={"max-model-len": "4k"}, target_concurrency=1)
    assert estimate(shorter, folder).kv_bytes == (4096 + 128) * 131072  # 4000, in blocks


@pytest.mark.parametrize("value", [-1, "auto", None])
def test_auto_max_model_len_is_the_models_own(value):
    assert kv_shape(LLAMA_8B, {"max_model_len": value}).max_model_len == 8192


def test_mla_keeps_one_latent_a_token():
    config = {
        **LLAMA_8B, "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    }  # fmt: skip
    assert kv_shape(config, {}).token_bytes() == 61 * 576 * 2
    assert kv_shape(config, {}).token_bytes(8) == 61 * 576 * 2 * 8


def test_a_multimodal_models_text_part_counts():
    config = {"torch_dtype": "bfloat16", "text_config": {**LLAMA_8B, "head_dim": 256}}
    shape = kv_shape(config, {})
    assert (shape.layers, shape.head_size, shape.max_model_len) == (32, 256, 8192)


def test_kv_heads_are_copied_where_there_are_fewer_than_devices():
    shape = kv_shape({**LLAMA_8B, "num_key_value_heads": 2}, {})
    assert shape.token_bytes(8) == 4 * shape.token_bytes(2)
    assert shape.token_bytes(1) == shape.token_bytes(2)


def test_older_names_are_known():
    config = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    shape = kv_shape(config, {})
    assert (shape.layers, shape.kv_heads, shape.head_size) == (12, 12, 64)


@pytest.mark.parametrize(
    ("args", "value_bytes"),
    [({}, 2), ({"kv_cache_dtype": "fp8"}, 1), ({"kv_cache_dtype": "bfloat16"}, 2),
     ({"dtype": "float32"}, 4), ({"kv_cache_dtype": "auto", "dtype": "float32"}, 4)],
)  # fmt: skip
def test_kv_value_type(args, value_bytes):
    assert kv_shape(LLAMA_8B, args).value_bytes == value_bytes


def test_weights_count_in_the_type_they_are_loaded_as(model):
    folder = model(LLAMA_8B, [4000, 400], dtype="F32")
    assert weights_bytes(folder, LLAMA_8B) == 2200
    assert weights_bytes(folder, LLAMA_8B, "float32") == 4400
    quantized = {**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}
    assert weights_bytes(folder, quantized) == 4400
    assert weights_bytes(model(LLAMA_8B, [100], dtype="F8_E4M3"), LLAMA_8B) == 100


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", 7, ["x"]])
def test_an_index_names_only_files_of_its_own_folder(model, name):
    """It is the word of whoever made the checkpoint."""
    folder = model(LLAMA_8B)
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not a path inside|not a safetensors index|is missing"):
        [weight_headers.read_header(file) for file in weight_headers.shards(folder)]


def test_an_index_decides_which_files_count(model):
    folder = model(LLAMA_8B, [100])
    write_shard(folder / "model-1.safetensors", [300])
    write_shard(folder / "consolidated.safetensors", [7000])
    assert weights_bytes(folder, LLAMA_8B) == 400
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_bytes(folder, LLAMA_8B) == 300
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors is missing"):
        weights_bytes(folder, LLAMA_8B)


def test_pickled_weights_count_by_size(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"x" * 500)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"x" * 200)
    assert weights_bytes(tmp_path, LLAMA_8B) == 700


def test_cpu_engines_cost_their_processes(model):
    folder = model(LLAMA_8B, [10_000])
    assert estimate(spec(), folder, "cpu").overhead_bytes == 2 * GIB + 1000
    two = spec(tensor_parallel_size=2)
    assert estimate(two, folder, "cpu").overhead_bytes == 3 * GIB + 1000
    assert estimate(two, folder, "nvml").overhead_bytes == 4 * GIB + 500


def test_what_is_missing_is_named_with_the_way_out(model, tmp_path):
    def refusal(folder, **more):
        with pytest.raises(ValueError, match="declare device_memory_bytes") as caught:
            estimate(spec(**more), folder)
        return str(caught.value)

    assert "is not a folder" in refusal(tmp_path / "none")
    assert "it has no folder" in refusal(None)
    assert "no files to size it by" in refusal(tmp_path, engine="stub")
    assert "no config.json" in refusal(tmp_path)
    folder = model({k: v for k, v in LLAMA_8B.items() if k != "num_hidden_layers"})
    assert "names no num_hidden_layers" in refusal(folder)
    folder = model(LLAMA_8B)
    assert "engine_args.max_model_len" in refusal(folder, engine_args={"max_model_len": "long"})
    (folder / "model.safetensors").unlink()
    assert "neither *.safetensors nor" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
     struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 10) + b'{"a": {}} ',
     struct.pack("<Q", 20) + b"{}"],
)  # fmt: skip
def test_files_that_are_no_safetensors_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        weights_bytes(tmp_path, LLAMA_8B)


def test_a_half_downloaded_file_is_told_from_a_whole_one(model):
    folder = model(LLAMA_8B, [4096])
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(2048)
    with pytest.raises(ValueError, match="is cut off"):
        weights_bytes(folder, LLAMA_8B)


def test_only_headers_are_read(model, monkeypatch):
    folder = model(LLAMA_8B, [64 * GIB])  # reading it would take minutes
    assert memory_estimate.weights_bytes(folder, LLAMA_8B) == 64 * GIB


# ------------------------------------------------------------------------- what is known to fail


def warned(folder, **more):
    one = spec(**more)
    try:
        found = estimate(one, folder)
    except ValueError:
        found = None
    return memory_estimate.warnings(one, folder, found)


def test_a_declared_size_below_the_estimate_is_warned_of(model):
    folder = model(LLAMA_8B, [LLAMA_8B_WEIGHTS])
    (words,) = warned(folder, device_memory_bytes=GIB // 2)
    assert "device_memory_bytes is 0.50 GiB, but it is estimated to need 21.7" in words
    assert warned(folder, device_memory_bytes=24 * GIB) == []
    assert warned(folder) == []


def test_a_model_without_weights_is_warned_of(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    (words,) = warned(tmp_path, device_memory_bytes=GIB)
    assert "no weights" in words


def test_a_model_without_a_config_is_warned_of(tmp_path):
    (words,) = warned(tmp_path, device_memory_bytes=GIB)
    assert "has no config.json" in words


def test_a_length_over_the_models_own_is_warned_of(model):
    (words,) = warned(model(LLAMA_8B), engine_args={"max_model_len": 9000})
    assert "max_model_len is 9000, but its config.json goes to 8192" in words
    assert warned(model(LLAMA_8B), engine_args={"max_model_len": 8192}) == []
    stretched = {**LLAMA_8B, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert warned(model(stretched), engine_args={"max_model_len": 32768}) == []
