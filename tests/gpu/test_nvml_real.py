"""NVML on a real NVIDIA GPU; skips, and says so, where there is none."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.devices.nvml import NvmlSource
from tests.kits.gpu_engine import a_gpu

pytestmark = pytest.mark.gpu

GIB = 2**30

HOLD = """
import torch
held = torch.zeros(2**30, dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
print("holding", flush=True)
input()
"""


@pytest.fixture
def source() -> Iterator[NvmlSource]:
    with a_gpu() as opened:
        yield opened


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds 1 GiB on the first GPU."""
    torch = pytest.importorskip("torch", reason="needs torch to allocate GPU memory")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    yield process
    process.communicate("\n", timeout=60)


def test_real_figures_are_sane(source: NvmlSource) -> None:
    reports = source.read({})
    assert reports
    for report in reports:
        assert report.kind == "nvml"
        assert report.device_id.startswith("GPU-")
        assert report.name
        assert report.memory_total_bytes > GIB
        assert 0 <= report.memory_used_bytes <= report.memory_total_bytes
        assert report.foreign_bytes == report.memory_used_bytes
        assert report.utilization is None or 0 <= report.utilization <= 1
        assert report.temperature_c is None or 0 < report.temperature_c < 130
        assert report.power_w is None or 0 < report.power_w < 3000
        assert report.healthy, report.unhealthy_reason


def test_a_process_that_allocates_shows_up(
    source: NvmlSource, holder: subprocess.Popen[str]
) -> None:
    """Its bytes are its own and not foreign; or, in a pid namespace, at least not foreign."""
    before = source.read({})
    reports = source.read({"a": [holder.pid]})
    used = sum(r.memory_used_bytes for r in reports)
    assert used >= GIB
    measured = source.replica_bytes()
    if "a" not in measured:
        # `before` was read with the process already there, so it is the figure "without ours"
        assert [r.foreign_bytes for r in reports] == [r.foreign_bytes for r in before]
        pytest.skip("NVML does not list this process here (a pid namespace of its own?)")
    assert GIB <= measured["a"] <= used
    assert sum(r.foreign_bytes for r in reports) == pytest.approx(used - measured["a"], abs=2**26)
