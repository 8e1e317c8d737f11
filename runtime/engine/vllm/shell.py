"""An engine that changes to another model in place: the part inside vLLM's API server.

vLLM loads it with `--middleware runtime.engine.vllm.shell.Guard`. Read in vLLM 0.32; what a process
keeps of its model, and what becomes of it:

weights            loaded in place from the new folder, every one of them (`shell_core`)
model_config       replaced in place in the API server, EngineCore and the worker by the one that a
                   fresh start makes: path, tokenizer, names, token ids of the HF config, generation
                   config. What a level 2 wake reloads from is in it
all other configs  must be equal to a fresh start's: compared value by value, before anything is
                   touched
args               parsed again from the command line, with the new folder and the new names
tokenizer          loaded again in the API server (renderer, its thread pools, input and output
                   processor) and in EngineCore
chat template      of the new tokenizer; `--chat-template` is an engine argument, so it is equal
generation config  read again: default sampling parameters, end and stop tokens
serving objects    made again by vLLM's own `init_app_state`: names, /v1/models, stored responses,
                   the system fingerprint
grammars           a new StructuredOutputManager, so backend, bitmask and compiled grammars are new
prefix cache       reset before, and found empty after; encoder and multimodal caches are reset
metrics            new collectors with the new name as a label; counters begin at 0 as in a fresh
                   engine. The HTTP server's own have no model's name and go on
caches by path     of tokenizers, configs and templates: forgotten, since a folder may be replaced
compiled graphs    take the weights as arguments, whose memory stays where it is; equal configs have
                   the same graphs. Rotary tables follow from the config
CUDA graphs        hold addresses of weights, which stay

What is not on the list of `shell_key` (adapters, media, pooling, drafts, quantized weights, several
devices, connectors) is never asked for; what slips through differs in the configs, or fails the
canary.

Rules this file keeps:
- up to the moment in which EngineCore is told, nothing is touched and each error is a refusal;
- between that moment and the end nothing is answered: the guard sees to it;
- it imports vLLM only when it is called, so that it can be imported anywhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.engine import guard
from runtime.engine.guard import Repoint, RepointRefused
from runtime.engine.vllm.shell_core import CHANGE, HF_MAY_DIFFER, IDLE, adopt, clear_path_caches

IDLE_TRIES, IDLE_PAUSE_S = 20, 0.05  # for the last step of the last request
# May differ: renewed with `model_config`, or nothing is made of it.
_MODEL = ("model", "tokenizer", "served_model_name")
MAY_DIFFER = frozenset(
    (
        "instance_id",
        *(f"model_config.{name}" for name in _MODEL),
        *(f"model_config.{c}.{n}" for c in ("hf_config", "hf_text_config") for n in HF_MAY_DIFFER),
    )
)


class Guard(guard.Guard):
    """The guard of an engine that can be changed to another model."""

    async def change_to(self, wanted: Repoint, scope: guard.Scope) -> dict[str, float]:
        """See `guard.Guard`."""
        return await change(scope["app"].state, wanted)


async def change(state: Any, wanted: Repoint) -> dict[str, float]:
    """Serve `wanted` from now on; answers what took how long. Raises as `Guard.change_to`."""
    began, client = time.monotonic(), state.engine_client
    await _refuse_unless_idle(client)
    try:
        args, fresh = await asyncio.to_thread(_prepare, client, state, wanted)
    except RepointRefused:
        raise
    except Exception as error:
        raise RepointRefused(f"no config can be made of {wanted.model_path}: {error!r}") from None
    prepared = time.monotonic()
    packed = _module("cloudpickle").dumps(fresh.model_config)
    phases: dict[str, float] = await client.engine_core.call_utility_async(CHANGE, packed)
    reloaded = time.monotonic()
    await _renew(state, args, fresh.model_config)
    state.stoker_fresh_config = fresh
    gc.collect()  # or what was of the first model stays for long: it refers to itself
    done = time.monotonic()
    log = _module("vllm.logger").init_logger("vllm.stoker")  # as all else in an engine's log
    log.info("This engine now serves %s from %s", list(wanted.names), wanted.model_path)
    return {
        "prepare": prepared - began,
        "reload": reloaded - prepared,
        "core_renew": float(phases["core_renew"]),
        "renew": done - reloaded,
    }


async def _refuse_unless_idle(client: Any) -> None:
    if client.output_processor.has_unfinished_requests():
        raise RepointRefused("requests are unfinished")
    for _ in range(IDLE_TRIES):
        try:
            if await client.engine_core.call_utility_async(IDLE):
                return
        except Exception as error:
            # It was started plainly, or is dead.
            raise RepointRefused(f"its EngineCore can't be changed: {error}") from None
        await asyncio.sleep(IDLE_PAUSE_S)
    raise RepointRefused("its EngineCore is busy")


def _prepare(client: Any, state: Any, wanted: Repoint) -> tuple[Any, Any]:
    """(the arguments, the config) of a fresh start. Raises RepointRefused where another config than
    the running one would be needed."""
    if not Path(wanted.model_path).is_dir():
        raise RepointRefused(f"{wanted.model_path} is not a folder here")
    clear_path_caches()
    args = _arguments("--model", wanted.model_path, "--served-model-name", *wanted.names)
    fresh = _config(args)
    # What the running one was before its start changed it: made again, the first time.
    before = getattr(state, "stoker_fresh_config", None) or _config(_arguments())
    if differs := sorted(set(differences(before, fresh))):
        raise RepointRefused(f"another config is needed: {', '.join(differs[:5])}")
    if client.model_config.max_model_len != fresh.model_config.max_model_len:
        raise RepointRefused("its max_model_len was fitted to the memory there was")
    registry = _module("vllm.tokenizers.registry")
    registry.cached_tokenizer_from_config(fresh.model_config)  # refuse what can't be loaded
    return args, fresh


def _arguments(*more: str) -> Any:
    """The command line of this process, parsed again; the last of two equal options wins."""
    parser = _module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    parser = _module("vllm.entrypoints.launchers.cli_args").make_arg_parser(parser)
    return parser.parse_args([*sys.argv[1:], *more])


def _config(args: Any) -> Any:
    engine_args = _module("vllm.engine.arg_utils").AsyncEngineArgs.from_cli_args(args)
    usage = _module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER
    return engine_args.create_engine_config(usage_context=usage)


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """The paths below which two configs are not equal, less MAY_DIFFER."""
    if at in MAY_DIFFER:
        return
    if type(old) is not type(new):
        yield at
    elif isinstance(old, list | tuple):
        if len(old) != len(new):
            yield at
        for index, pair in enumerate(zip(old, new, strict=False)):
            yield from differences(*pair, f"{at}[{index}]")
    elif (fields := _fields(old)) is not None:
        others = _fields(new) or {}
        for name in fields.keys() | others.keys():
            path = f"{at}.{name}" if at else str(name)
            yield from differences(fields.get(name), others.get(name), path)
    elif old != new:
        yield at


def _fields(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, dict):
        return value
    if hasattr(value, "to_dict"):  # of transformers
        return dict(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


async def _renew(state: Any, args: Any, model_config: Any) -> None:
    """Make all that the API server has of its model again, for the config it has by now."""
    client = state.engine_client
    config, old_renderer = client.vllm_config, client.renderer
    adopt(config.model_config, model_config)
    # It waits for the next output of EngineCore, and holds the objects that are made again here.
    client.output_handler.cancel()
    client.renderer = _module("vllm.renderers").renderer_from_config(config)
    processor = _module("vllm.v1.engine.input_processor").InputProcessor
    client.input_processor = processor(config, client.renderer)
    old = client.output_processor
    client.output_processor = type(old)(
        client.renderer.tokenizer,
        log_stats=old.log_stats,
        stream_interval=old.stream_interval,
        tracing_enabled=old.tracing_enabled,
        admission_stats=old.admission_stats,
    )
    if client.logger_manager is not None:
        loggers = _module("vllm.v1.metrics.loggers")
        client.logger_manager = loggers.StatLoggerManager(
            vllm_config=config,
            engine_idxs=client.engine_core.engine_ranks_managed,
            custom_stat_loggers=loggers.load_stat_logger_plugin_factories(),
            enable_default_loggers=not args.disable_log_stats,
        )
        client.logger_manager.log_engine_initialized()
    client.output_handler = None
    client._run_output_handler()
    old_renderer.shutdown()
    tasks = await client.get_supported_tasks()
    init = _module("vllm.entrypoints.launchers.api_server.app_state").init_app_state
    await init(client, state, args, tasks)


def _module(name: str) -> Any:
    return importlib.import_module(name)
