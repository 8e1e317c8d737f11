"""A stand-in for NVIDIA's library: built with the C compiler, driven by a text file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.kits.checkout import ROOT

HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path, *flags: str) -> Path:
    """Compile libnvidia-ml.so.1 into `folder`, and return `folder`."""
    command = [compiler() or "cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *flags]
    source = HERE / "libnvidia-ml.c"
    subprocess.run([*command, "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


class Reader:
    """`agent.devices.inventory` in a process of its own, with `library` on its loader path."""

    def __init__(self, library: Path, state: Path, setting: str = "nvml") -> None:
        environ = {
            **os.environ,
            "LD_LIBRARY_PATH": str(library),
            "NVML_STUB_STATE": str(state),
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "reader.py"), setting],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.opened = self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self, pids: Mapping[str, list[int]] | None = None) -> dict[str, Any]:
        """{"reports": [DeviceReport as JSON], "replica_bytes": {…}}"""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(pids or {}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> str:
        """End it; what it wrote to stderr."""
        _, errors = self._process.communicate(timeout=30)
        return errors

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the reader died: {self.close()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
