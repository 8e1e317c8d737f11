"""The part of a change to another model that EngineCore and its worker do: see `shell`.

`runtime.engine.vllm.preload` puts both methods into the classes of a forked engine; one that was
started plainly has none of them, and is never changed.

Rules this file keeps:
- a reset of the prefix cache that succeeds comes first: nothing that the first model computed is
  left, and no request is;
- `model_config` is replaced in place, since many hold on to it. A later wake from sleep level 2
  loads from the folder that it names;
- each weight of the model was loaded, or the change failed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import time
from typing import Any

TESTED_VERSIONS = ("0.32.0",)
# Of a model's config.json: renewed with `model_config`, or nothing is made of it.
HF_MAY_DIFFER = frozenset(
    {
        "_name_or_path", "transformers_version", "unsloth_version", "unsloth_fixed", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id",
    }
)  # fmt: skip
_CACHING = (
    "vllm.tokenizers", "vllm.transformers_utils", "vllm.renderers", "vllm.utils.func_utils",
)  # fmt: skip
IDLE, CHANGE = "stoker_idle", "stoker_change"  # the methods' names


def install() -> None:
    """Put the methods where an API server can call them."""
    core = vars(importlib.import_module("vllm.v1.engine.core"))["EngineCore"]
    worker = vars(importlib.import_module("vllm.v1.worker.worker_base"))["WorkerBase"]
    setattr(core, IDLE, _idle)
    setattr(core, CHANGE, _change_core)
    setattr(worker, CHANGE, _change_worker)


def adopt(model_config: Any, fresh: Any) -> None:
    """Make `model_config` what `fresh` is, for all who hold it."""
    own = vars(model_config)
    own.clear()
    own.update(vars(fresh))


def _idle(self: Any) -> bool:
    """Whether EngineCore has nothing to do; then its prefix cache is empty."""
    if self.scheduler.has_requests() or self.batch_queue:
        return False
    return bool(self.reset_prefix_cache())


def _change_core(self: Any, packed: bytes) -> dict[str, float]:
    """Everything in EngineCore and its worker is of the model whose pickled config this is."""
    began = time.monotonic()
    if not _idle(self):
        raise RuntimeError("EngineCore is not idle")
    adopt(self.vllm_config.model_config, _unpack(packed))
    structured = importlib.import_module("vllm.v1.structured_output")
    loading = self.model_executor.collective_rpc(CHANGE, args=(packed,), non_block=True)
    # Meanwhile: tokenizer, grammar backend and its bitmask. A backend is made when first needed.
    self.structured_output_manager.clear_backend()
    clear_path_caches()
    manager = structured.StructuredOutputManager(self.vllm_config)
    self.structured_output_manager = self.scheduler.structured_output_manager = manager
    renewed = time.monotonic()
    loading.result()
    self.reset_mm_cache()
    self.reset_encoder_cache()
    gc.collect()
    if not _idle(self):
        raise RuntimeError("EngineCore did not stay idle")
    return {"core_renew": renewed - began, "reload": time.monotonic() - began}


def _change_worker(self: Any, packed: bytes) -> None:
    """The worker's weights are those of the model whose pickled config this is."""
    adopt(self.vllm_config.model_config, _unpack(packed))
    model = self.model_runner.get_model()
    loaded: list[set[str] | None] = []
    load_weights = model.load_weights

    def watched(weights: Any) -> Any:
        loaded.append(load_weights(weights))
        return loaded[-1]

    model.load_weights = watched
    try:
        self.reload_weights()
    finally:
        del model.load_weights
    # vLLM only logs this where it reloads.
    names = {name for name, _ in model.named_parameters()}
    if len(loaded) != 1 or loaded[0] is None or names - loaded[0]:
        missing = sorted(names - (loaded[0] or set()) if loaded else names)
        raise RuntimeError(f"weights that were not loaded: {', '.join(missing[:3])}")


def clear_path_caches() -> None:
    """Forget what was read from models' folders: one may have been replaced since.

    And what holds tokenizers by their methods (`func_utils`), tens of MB each.
    """
    cached = type(functools.lru_cache(len))
    for name, module in list(sys.modules.items()):
        if name.startswith(_CACHING):
            for value in list(vars(module).values()):
                if isinstance(value, cached):
                    value.cache_clear()
    if hf := sys.modules.get("vllm.renderers.hf"):
        for table in ("_PROCESSOR_CHAT_TEMPLATES", "_CONTENT_FORMATS"):
            vars(hf)[table].clear()


def _unpack(packed: bytes) -> Any:
    # From the API server of this engine, as the whole config was when it started.
    return importlib.import_module("cloudpickle").loads(packed)
