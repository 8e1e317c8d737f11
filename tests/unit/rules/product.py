"""The product's own files, as the rules read them."""

from __future__ import annotations

from tests.kits.checkout import ROOT

PARTS = ("runtime", "scheduler", "agent", "cli")


def sources(*folders: str, but: str = "") -> list[str]:
    """The paths of all Python files below these folders, or of all parts; not the file `but`."""
    files = (path for folder in folders or PARTS for path in (ROOT / folder).rglob("*.py"))
    return sorted({path.relative_to(ROOT).as_posix() for path in files} - {but})


def text(path: str) -> str:
    """What a file holds, by its path from `sources`."""
    return (ROOT / path).read_text(encoding="utf-8")
