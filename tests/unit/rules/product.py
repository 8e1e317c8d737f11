"""The product's own files, as the rules read them."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parents[3]
PARTS = ("runtime", "scheduler", "agent", "cli")


def sources(*folders: str, but: str = "") -> list[str]:
    """The paths of all Python files below these folders, or of all parts; not the file `but`."""
    files = (path for folder in folders or PARTS for path in (_ROOT / folder).rglob("*.py"))
    return sorted({path.relative_to(_ROOT).as_posix() for path in files} - {but})


def text(path: str) -> str:
    """What a file holds, by its path from `sources`."""
    return (_ROOT / path).read_text(encoding="utf-8")
