"""Tests tell where they belong: short files, helpers in a kit, folders like the product's.

A file of tests has under 500 lines; what two of them need is in tests/kits (or a conftest.py), as
none of them imports another one; a folder of tests/unit is named as the folder that it tests.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.kits.checkout import ROOT

MOST_LINES = 499
TESTS = ROOT / "tests"
# The folder of a tested part, where it is not at the checkout's top.
PARTS = {"router": "runtime/router"}
NO_PARTS = ("docs", "rules")  # what is tested there is not a folder of the product


def faults(path: Path, source: str) -> list[str]:
    """What is wrong with a file of tests/."""
    found = []
    lines = source.count("\n")
    if lines > MOST_LINES:
        found.append(f"{path}: {lines} lines: split it by subject, {MOST_LINES} are the most")
    for node in ast.walk(ast.parse(source)):
        for line, module in _imported(node):
            if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_"):
                found.append(f"{path}:{line}: imports {module}: move that to tests/kits")
    return found


def _imported(node: ast.AST) -> list[tuple[int, str]]:
    if isinstance(node, ast.Import):
        return [(node.lineno, name.name) for name in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        modules = [module, *(f"{module}.{name.name}" for name in node.names)]
        return [(node.lineno, module) for module in modules]
    return []


def strays(folders: set[str]) -> list[str]:
    """Folders below tests/unit that no folder of the product has the name of."""
    return [folder for folder in sorted(folders) if not _of_the_product(folder).is_dir()]


def _of_the_product(folder: str) -> Path:
    part, *rest = Path(folder).parts
    return ROOT.joinpath(PARTS.get(part, part), *rest)


def test_files_are_short_and_import_no_other_test_file() -> None:
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        found += faults(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    assert found == []


def test_a_folder_of_unit_tests_is_named_as_the_folder_that_it_tests() -> None:
    unit = TESTS / "unit"
    folders = {path.parent.relative_to(unit).as_posix() for path in unit.rglob("test_*.py")}
    folders -= {".", *NO_PARTS}
    assert "router/front" in folders
    assert strays(folders) == []


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ("a = 1\n" * 500, "500 lines"),
        ("from tests.unit.cli.test_a import b\n", "imports tests.unit.cli.test_a: move"),
        ("from tests.unit.cli import test_a\n", "imports tests.unit.cli.test_a: move"),
        ("def f():\n    import tests.sim.test_a\n", ":2: imports tests.sim.test_a: move"),
    ],
)
def test_a_planted_fault_is_found(planted: str, fault: str) -> None:
    assert any(fault in words for words in faults(Path("tests/x.py"), planted))


def test_a_planted_folder_is_found() -> None:
    assert strays({"router/front", "agent/attic", "front"}) == ["agent/attic", "front"]


def test_what_is_right_is_let_be() -> None:
    assert faults(Path("tests/x.py"), "a = 1\n" * 499 + "from tests.kits import cluster") == []
