"""A package index on loopback with a few wheels made here, and a project that needs them."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.kits.checkout import ROOT

# What builds the project: a backend of its own, so that no index must have setuptools.
_BACKEND = """
import zipfile
def get_requires_for_build_editable(config_settings=None): return []
def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "stand_in-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        info = "stand_in-1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: stand-in\\nVersion: 1\\n")
        about = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", about)
        wheel.writestr(f"{info}/RECORD", "")
    return name
build_wheel = build_editable
"""
_PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "stand-in"
version = "1"
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@contextmanager
def index(folder: Path, *wheels: Path) -> Iterator[str]:
    """The URL of an index that has these wheels."""
    for wheel in wheels:
        name = wheel.name.split("-")[0]
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, folder / name / wheel.name)
    folder.mkdir(exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wheel(folder: Path, name: str, version: str, files: dict[str, str] | None = None) -> Path:
    """A wheel of pure Python that holds `files`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as made:
        for inside, text in (files or {f"{name}.py": ""}).items():
            made.writestr(inside, text)
        made.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        made.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{info}/RECORD", "")
    return path


def torch(folder: Path, version: str, cuda: str | None) -> Path:
    """A wheel of torch that says for which CUDA it was built, as the real one does."""
    about = (
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    )
    return wheel(folder, "torch", version, {"torch/__init__.py": "", "torch/version.py": about})


def pin(*wheels: Path) -> str:
    """The lines of a lock file, with hashes."""
    lines = []
    for path in wheels:
        name, version = path.name.split("-")[:2]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        equals = "===" if name == "torch" else "=="  # as scripts/lock.sh writes it
        lines.append(f"{name}{equals}{version} --hash=sha256:{digest}\n")
    return "".join(lines)


class Checkout:
    """A clone that holds scripts/setup.sh, a project and lock files of a few stand-in wheels."""

    def __init__(self, folder: Path, venv: Path, locks: dict[str, str], pytorch_index: str) -> None:
        self.folder = folder
        shutil.copytree(venv, folder / ".venv", symlinks=True)
        (folder / "scripts").mkdir(parents=True)
        (folder / "requirements").mkdir()
        script = (ROOT / "scripts/setup.sh").read_text()
        known = "PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu\n"
        assert known in script
        script = script.replace(known, f"PYTORCH_CPU_INDEX={pytorch_index}\n")
        (folder / "scripts/setup.sh").write_text(script)
        (folder / "pyproject.toml").write_text(_PROJECT)
        (folder / "backend.py").write_text(_BACKEND)
        for name, text in locks.items():
            (folder / f"requirements/{name}.txt").write_text(text)

    def setup(self, index_url: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `scripts/setup.sh engine` with this index as pip's only one."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
        clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index_url, "PIP_RETRIES": "0"}
        return subprocess.run(
            ["bash", str(self.folder / "scripts/setup.sh"), "engine"],
            env=clean | {"ENGINE": "cpu"} | more, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    def version(self, package: str) -> str:
        """The installed one; "" if there is none."""
        found = list(self.folder.glob(f".venv/lib/python3*/site-packages/{package}-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").partition("-")[2] if found else ""
