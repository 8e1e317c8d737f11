"""What `make wheel` builds holds every file of the product, and says that it is typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.kits.checkout import ROOT
from tests.unit.rules.product import PARTS, sources


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build leaves folders behind in its own
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("stoker_serve-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {*sources(), *(f"{part}/py.typed" for part in PARTS)}
