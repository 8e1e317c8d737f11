"""What every benchmark promises to who reads its output: one JSON object, and exit status 0."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agent.devices.nvml import NvmlSource, NvmlUnavailable
from bench.lib.report import Row, print_report
from tests.kits.checkout import ROOT

KEYS = {"metric", "ours", "baseline", "baseline_name", "ratio", "target", "met"}


@pytest.mark.parametrize(
    ("ours", "target", "met"),
    [(1.0, "<= 0.2", False), (0.1, "<= 0.2", True), (0.1, ">= 0.2", False), (0.1, None, None)],
)
def test_a_row_says_whether_its_target_is_met(
    ours: float, target: str | None, met: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report("b", [Row("m", ours, 1.0, "plain", target)], True)
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "b"
    assert "note" not in report
    (row,) = report["rows"]
    assert row.keys() == KEYS
    assert row["met"] is met


def test_without_a_gpu_the_sleep_benchmark_says_so_and_ends_well() -> None:
    try:
        NvmlSource().close()
    except NvmlUnavailable:
        pass
    else:
        pytest.skip("there is a GPU here: the benchmark would measure it")
    argv = [sys.executable, str(ROOT / "bench" / "gpu_sleep.py"), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    report = json.loads(done.stdout)
    assert report["rows"] == []
    assert "no NVIDIA GPU here" in report["note"]
