"""The pages of the documentation, and what they name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.kits.checkout import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob(".github/**/*.md"),
        *ROOT.glob("ansible/**/*.md"),
    ]
)
_FOLDERS = "runtime|scheduler|agent|cli|tests|bench|docs|scripts|ansible|examples|requirements"
_NAMED = re.compile(rf"`((?:{_FOLDERS})/[\w./*<>{{}},-]*)(?:: ([\w.]+))?`")


def text(page: str) -> str:
    """What a page holds, by its path from `PAGES`."""
    return (ROOT / page).read_text(encoding="utf-8")


def named(page: str) -> Iterator[tuple[str, str]]:
    """(path, definition or "") of each `folder/file.py` and `folder/file.py: Class.method`."""
    words = re.sub(r"\s+", " ", text(page))
    return ((path, name) for path, name in _NAMED.findall(words) if not set(path) & set("*<>{}"))


def links(page: str) -> list[str]:
    """The paths of a page's links to files of this repository, relative to its folder."""
    found = re.findall(r"\]\(([^)\s]+)\)", text(page))
    return [link.partition("#")[0] or "." for link in found if "://" not in link]


def defines(source: str, name: str) -> bool:
    """Whether `Class.method`, a function, a class or a constant is defined in a file."""
    body = ast.parse(source).body
    for part in name.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return {getattr(node, "name", "")}
