"""The product's own files, as the rules read them."""

from __future__ import annotations

from tests.kits.checkout import ROOT

PARTS = ("runtime", "scheduler", "agent", "cli")


def sources(*folders: str, but: str = "") -> list[str]:
    """The paths of all Python files below these folders, or of all parts; not the file `but`.

    A rule that looks at no file passes, so each folder has one, and `but` is there.
    """
    found: set[str] = set()
    for folder in folders or PARTS:
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert files, f"{folder} holds no Python file"
        found |= files
    assert not but or (ROOT / but).is_file(), f"there is no {but}"
    return sorted(found - {but})


def text(path: str) -> str:
    """What a file holds, by its path from `sources`."""
    return (ROOT / path).read_text(encoding="utf-8")
