"""Which engines can be changed to which models in place (`shell`): the key that they share.

The key holds all that a process keeps of its first model and a change does not renew. What `shell`
renews is not in it: names, keys, ports, the folder, tokenizer, chat template, generation config.

Rules this file keeps:
- only what was tried is allowed: architectures, arguments and load formats that are not on a list
  here, and whatever `why_not` names, are never changed;
- files are read, a checkpoint's headers only; a folder that can't be read has no key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from runtime import outside
from runtime.checkpoints import weight_headers
from runtime.engine.contract import LaunchContext
from runtime.engine.vllm import memory_estimate
from runtime.engine.vllm.arguments import flat_args
from runtime.engine.vllm.shell_core import HF_MAY_DIFFER, TESTED_VERSIONS
from runtime.wire.model_spec import ModelSpec

# Changed and found equal to fresh engines. Mixtures of experts (Mixtral, Qwen3-MoE) were tried too:
# after a change in place vLLM 0.32 answers as neither model.
ARCHITECTURES = frozenset(
    {
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }
)  # fmt: skip
# Of these loaders it is known that they load in place; None is vLLM's own choice.
LOAD_FORMATS = (None, "auto", "safetensors")
# Nothing that they make outlives a change, or it is the same for both models.
ARGS = frozenset(
    {
        "async_scheduling", "attention_backend", "block_size", "chat_template",
        "chat_template_content_format", "compilation_config", "cudagraph_capture_sizes",
        "default_chat_template_kwargs", "disable_cascade_attn", "disable_log_stats", "dtype",
        "enable_auto_tool_choice", "enable_chunked_prefill", "enable_force_include_usage",
        "enable_log_requests", "enable_prefix_caching", "enable_prompt_tokens_details",
        "enable_sleep_mode", "enforce_eager", "generation_config", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "load_format", "logprobs_mode", "max_cudagraph_capture_size",
        "max_log_len", "max_logprobs", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
        "num_gpu_blocks_override", "optimization_level", "override_generation_config",
        "response_role", "return_tokens_as_token_ids", "scheduling_policy", "seed",
        "stream_interval", "tool_call_parser", "uvicorn_log_level",
    }
)  # fmt: skip


def shell_key(spec: ModelSpec, ctx: LaunchContext, version: str | None) -> str | None:
    """See `Engine.shell_key`."""
    if why_not(spec, ctx, version):
        return None
    folder = Path(ctx.model_path)
    args = flat_args(spec.engine_args)
    try:
        config = memory_estimate.read_config(folder)
        files = weight_headers.shards(folder)
        tensors = [t for file in files for t in weight_headers.read_header(file)]
        # vLLM's limit comes from there too, where no other is given.
        longest = None if "max_model_len" in args else _tokenizer_limit(folder)
    except (OSError, ValueError, AttributeError):
        return None
    if not tensors or not _is_known(folder, config):
        return None
    kept = {
        "engine": ["vllm", version],
        "config": {name: value for name, value in config.items() if name not in HF_MAY_DIFFER},
        "weights": sorted((t.name, t.dtype, t.shape) for t in tensors),
        "longest": longest,
        "args": args,
        "media_domains": spec.media_domains,
        "sleep": spec.sleep,
        "device": [ctx.device_kind, ctx.device_total_bytes, ctx.device_bytes, ctx.kv_bytes],
    }
    text = json.dumps(msgspec.to_builtins(kept), sort_keys=True)  # NaN, as such files may hold
    return hashlib.sha256(text.encode()).hexdigest()


def why_not(spec: ModelSpec, ctx: LaunchContext, version: str | None) -> str | None:
    """Why no engine launched so is ever changed; None: its files decide."""
    args = flat_args(spec.engine_args)
    load_format = args.get("load_format", ctx.load_format)
    unknown = sorted({name.partition(".")[0] for name in args} - ARGS)
    reasons = {
        f"version {version} of vLLM was not tried": version not in TESTED_VERSIONS,
        "adapters are kept by name": bool(spec.adapters or ctx.adapter_index),
        "an environment of its own keeps it from being forked": bool(spec.env),
        "it spans several devices": spec.tensor_parallel_size > 1,
        f"arguments that were not tried: {', '.join(unknown)}": bool(unknown),
        f"load format {load_format} can't load in place": load_format not in LOAD_FORMATS,
        "its longest sequence is fitted to memory": args.get("max_model_len") in ("auto", -1, "-1"),
        "its KV cache is quantized": args.get("kv_cache_dtype", "auto") != "auto",
        "simulated devices run no vLLM": ctx.device_kind == "simulated",
        "it was not tried on a GPU yet": ctx.device_kind == "nvml",
    }
    return next((words for words, holds in reasons.items() if holds), None)


def _is_known(folder: Path, config: dict[str, Any]) -> bool:
    """Whether its files hold nothing but what was tried."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        return False
    return (
        architectures[0] in ARCHITECTURES
        and not memory_estimate.is_quantized(config)
        and not config.get("auto_map")  # code of its own
        # Mistral's own format, which vLLM prefers, and NVIDIA's note of a quantization.
        and not (folder / "params.json").exists()
        and not (folder / "hf_quant_config.json").exists()
    )


def _tokenizer_limit(folder: Path) -> Any:
    try:
        config = outside.model_json((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return None
    return config.get("model_max_length")
