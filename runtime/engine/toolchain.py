"""What a host needs beside vLLM: that compiles parts of a model when it is first loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from runtime.engine.exits import COMPILER_FIX

COMPILER = "g++"  # by this name alone PyTorch looks for it
_INCLUDE_CODE = "import sysconfig; print(sysconfig.get_paths()['include'])"
_ASK_S = 30.0


def missing(python: str, path: str | None = None) -> str | None:
    """What engines of the interpreter `python` lack, with the fix; None if nothing. Blocks.

    `path`: their PATH; None: this process's.
    """
    lacks = []
    if shutil.which(COMPILER, path=path) is None:
        lacks.append(f"no {COMPILER} on the PATH {path or os.environ.get('PATH', '')}")
    folder = _include_folder(python)
    if folder and not (folder / "Python.h").is_file():
        lacks.append(f"no {folder / 'Python.h'}")
    if not lacks:
        return None
    return (
        "vLLM compiles parts of a model when it is first loaded, and can't here: there is"
        f" {' and '.join(lacks)}; {COMPILER_FIX}"
    )


def _include_folder(python: str) -> Path | None:
    """Where that interpreter's headers belong; None if it can't be asked."""
    try:
        done = subprocess.run(
            [python, "-c", _INCLUDE_CODE], cwd="/", capture_output=True, text=True, timeout=_ASK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Path(done.stdout.strip()) if done.returncode == 0 else None
