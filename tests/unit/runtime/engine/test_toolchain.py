"""What a host lacks for an engine that compiles, said before the first start."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from runtime.engine import toolchain


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose headers belong into `tmp_path/include`."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho {tmp_path}/include\n")
    script.chmod(0o755)
    return script


def compiler(folder: Path) -> str:
    """A PATH with a compiler on it."""
    folder.mkdir()
    (folder / "g++").write_text("#!/bin/sh\n")
    (folder / "g++").chmod(0o755)
    return str(folder)


def test_a_host_without_compiler_and_headers_is_told_both_and_the_fix(tmp_path, python) -> None:
    said = toolchain.missing(str(python), "/nothing/here")
    assert said is not None
    assert f"no g++ on the PATH /nothing/here and no {tmp_path}/include/Python.h" in said
    assert "apt-get install g++ python3-dev" in said


def test_only_what_is_missing_is_named(tmp_path, python) -> None:
    path = compiler(tmp_path / "bin")
    said = toolchain.missing(str(python), path)
    assert said is not None
    assert "g++ on the PATH" not in said
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    assert toolchain.missing(str(python), path) is None
    said = toolchain.missing(str(python), "")
    assert said is not None
    assert "Python.h" not in said


def test_the_cpu_build_without_libnuma_is_told(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho {sysconfig.get_paths()['include']}\necho libnuma.so.1\n")
    script.chmod(0o755)
    said = toolchain.missing(str(script), compiler(tmp_path / "bin"))
    assert said is not None
    assert "needs libnuma.so.1, and it is not here" in said
    assert said.endswith("apt-get install libnuma1)")


def test_an_interpreter_that_cannot_be_asked_is_no_missing_header(tmp_path) -> None:
    assert toolchain.missing(str(tmp_path / "none"), compiler(tmp_path / "bin")) is None


def test_this_interpreters_own_headers_are_looked_for_where_they_belong(tmp_path) -> None:
    said = toolchain.missing(sys.executable, compiler(tmp_path / "bin"))
    folder = Path(sysconfig.get_paths()["include"])
    assert (said is None) == (folder / "Python.h").is_file()
