"""How long things take on a node, where no ledger says: GPUs, hosts, models. Pure.

Every constant names its source: [ds] the vendor's datasheet; [facts] measured with vLLM 0.32 on
this project's CPU host, or read in vLLM's docs (docs/simulator.md says which); [log] start-up
logs in vLLM's own tracker; [as] an assumption. Rates are what software gets, not what the plug
could carry.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.sizes import GIB

GB = 10**9

# Seconds of one forked start that do not depend on the model's size.
FORK_S = 0.4  # [facts] a fork from the pre-imported parent, its processes and their sockets
INIT_S = 1.9  # [facts] 3.9 s for a tiny model, less weights, KV and fork: arguments, config, app
CUDA_S = 1.5  # [as] CUDA context and NCCL
KV_S = 1.6  # [facts] KV cache and warm-up
COMPILE_S = 7.0  # [log] torch.compile from its cache: 6.97, 7.35 s (vllm-project/speculators#166)
GRAPHS_S = 3.3  # [log] 67 CUDA graphs of about 0.05 s each (vllm-project/vllm#23184)
CANARY_S = 0.1  # [as] one token, and the calls around it
BESIDE = 1.2  # [as] times as long, of a start beside another one on its device: CPU and kernels
UNMAP_S = 0.3  # [as] beside copying: unmapping device memory, seeing it free by NVML
MAP_S = 0.3  # [as] beside copying: mapping device memory
TERM_S = 0.5  # [as] from SIGTERM to the exit of an engine without requests
REAP_S = 0.3  # [as] from SIGKILL until the memory is seen free
RESIDUE_BYTES = GIB  # [facts] about 1 GB a GPU stays behind in a sleeping engine
PROCESS_BYTES = 3 * GIB  # [as] host memory of one engine's processes

# The share of a peak figure that vLLM reaches.
DECODE_SHARE = 0.6  # [as] of the memory bandwidth, when it decodes
PREFILL_SHARE = 0.45  # [as] of the dense bf16 rate, when it prefills
STEP_S = 0.004  # [as] of one decoding step: scheduling, sampling, kernel launches
LOAD_BYTES_S = 8.0 * GB  # [as] page cache to device through safetensors, one device
MAX_BATCH = 256  # vLLM's default --max-num-seqs on these GPUs


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of device. Rates in bytes or operations per second."""

    name: str
    memory_bytes: int
    memory_rate: float
    pcie_rate: float
    flops: float  # dense bf16
    compute_capability: float


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of host; the rates are shared by all its devices."""

    memory_bytes: int = 1024 * GIB
    disk_bytes: int = 7 * 10**12
    disk_rate: float = 6.0 * GB  # [ds] PCIe 4.0 NVMe (Samsung PM9A3: 6.5 GB/s sequential reads)
    store_rate: float = 2.5 * GB  # [as] a shared store over a 25 Gbit/s card, less overhead
    budget_share: float = 0.5  # [as] of its memory, for sleepers and staged weights


GPUS = {
    # [ds] 80 GB SXM, 2039 GB/s, PCIe 4.0 x16 (32 GB/s each way; 25 in practice), 312 TFLOPS
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 2039 * GB, 25 * GB, 312e12, 8.0),
    # [ds] 80 GB SXM, 3350 GB/s, PCIe 5.0 x16 (64 GB/s each way; 50 in practice), 989 TFLOPS
    "H100": Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 3350 * GB, 50 * GB, 989e12, 9.0),
    # [ds] 141 GB, 4800 GB/s, otherwise an H100
    "H200": Gpu("NVIDIA H200", 141 * 10**9, 4800 * GB, 50 * GB, 989e12, 9.0),
    # [ds] 48 GB GDDR6, 864 GB/s, PCIe 4.0 x16, 362 TFLOPS
    "L40S": Gpu("NVIDIA L40S", 48 * GIB, 864 * GB, 25 * GB, 362e12, 8.9),
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the timings need to know of a model. `active_bytes`: read for one token (MoE).

    Engines of models of one `architecture` and size are shells for each other; "": nobody's.
    """

    weights_bytes: int
    active_bytes: int = 0  # 0: all of them
    max_batch: int = MAX_BATCH
    architecture: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        return self.active_bytes or self.weights_bytes


def gpu(name: str) -> Gpu:
    """A profile by name. Raises ValueError naming those there are."""
    try:
        return GPUS[name]
    except KeyError:
        raise ValueError(f"there is no GPU profile {name!r}; use {', '.join(GPUS)}") from None


def step_s(kind: Gpu, facts: ModelFacts, tensor_parallel: int, batch: int) -> float:
    """Seconds of one decoding step of `batch` sequences: the weights are read once for all.

    Worked example, 16 GB on one H100, one sequence: 16e9 / (3350e9 x 0.6) + 0.004 = 12 ms, so 83
    tokens/s; each further sequence adds 2 % (its KV cache is read too, an assumption).
    """
    read_s = facts.read_bytes / tensor_parallel / (kind.memory_rate * DECODE_SHARE)
    return (read_s + STEP_S) * (1 + 0.02 * (batch - 1))


def prefill_s(kind: Gpu, facts: ModelFacts, tensor_parallel: int, tokens: int) -> float:
    """Seconds to read a prompt: 2 operations a parameter (2 bytes) and token.

    Worked example, 16 GB (8e9 parameters) on one H100: 2 x 8e9 x 1000 / (989e12 x 0.45) = 36 ms
    for 1000 tokens.
    """
    parameters = facts.read_bytes / 2
    return 2 * parameters * tokens / (kind.flops * PREFILL_SHARE * tensor_parallel)
