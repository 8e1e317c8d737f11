"""Makes a release: `make release VERSION=0.2.0` shows what it would do, `DO=1` does it.

The version in pyproject.toml, the changelog's newest section (which must say "unreleased") dated,
both as one commit, and an annotated tag whose message is that section. Nothing is pushed.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BRANCH = "main"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_OURS = re.compile(r'(?m)^version = "([^"]+)"$')
_SECTION = re.compile(r"(?m)^## \[([^\]]+)\](?: - (\S+))?\n(.*?)(?=^## \[|\Z)", re.DOTALL)


class CannotRelease(Exception):
    """Says what stands in the way, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Release:
    """The files as they are to be, and what the tag says."""

    version: str
    project: str
    changelog: str
    notes: str


def prepare(version: str, project: str, changelog: str, today: str) -> Release:
    """Work out a release from pyproject.toml and CHANGELOG.md. Raises CannotRelease."""
    if not _VERSION.fullmatch(version):
        raise CannotRelease(f"VERSION={version} is not a version: write three numbers, as 0.2.0")
    before, newest = _OURS.search(project), _SECTION.search(changelog)
    if before is None or newest is None:
        raise CannotRelease("pyproject.toml has no version, or CHANGELOG.md no section")
    name, date, body = newest.groups()
    if date is not None and date != "unreleased":
        raise CannotRelease(f"CHANGELOG.md begins with [{name}] of {date}: nothing is unreleased")
    if date is None and name.lower() != "unreleased":
        raise CannotRelease(f"CHANGELOG.md begins with [{name}]: call it [Unreleased]")
    if not body.strip():
        raise CannotRelease("CHANGELOG.md has nothing unreleased: say what changed")
    if _numbers(version) < _numbers(before[1]):
        raise CannotRelease(f"VERSION={version} is less than {before[1]} in pyproject.toml")
    head = f"## [{version}] - {today}\n"
    return Release(
        version,
        project=_OURS.sub(f'version = "{version}"', project, count=1),
        changelog=changelog[: newest.start()] + head + changelog[newest.start(3) :],
        notes=f"Stoker {version}\n\n{body.strip()}\n",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split("."))) if _VERSION.fullmatch(version) else ()


def git(*words: str, given: str | None = None) -> str:
    """What git says. Raises CannotRelease."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotRelease(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def check_tree(version: str) -> None:
    """Raises CannotRelease where git is not ready for it."""
    if (branch := git("branch", "--show-current").strip()) != BRANCH:
        raise CannotRelease(f"the branch is {branch!r}: releases are made of {BRANCH}")
    if changed := git("status", "--porcelain").strip():
        raise CannotRelease(f"there is what is not committed; commit or remove it:\n{changed}")
    if git("tag", "--list", f"v{version}").strip():
        raise CannotRelease(f"there is a tag v{version} already: choose the next version")


def carry_out(release: Release) -> None:
    """Write, commit and tag. Raises CannotRelease."""
    (ROOT / "pyproject.toml").write_text(release.project, encoding="utf-8")
    (ROOT / "CHANGELOG.md").write_text(release.changelog, encoding="utf-8")
    git("add", "pyproject.toml", "CHANGELOG.md")
    git("commit", "--quiet", "--message", f"release {release.version}")
    # The changelog's headings begin with #, which git would take for comments.
    git("tag", f"v{release.version}", "--cleanup=verbatim", "--file=-", given=release.notes)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def main() -> None:
    """Show a release, or make it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("version", help="as 0.2.0")
    parser.add_argument("--do", action="store_true", help="do it (default: only show it)")
    asked = parser.parse_args()
    try:
        project, changelog = map(_read, ("pyproject.toml", "CHANGELOG.md"))
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        release = prepare(asked.version, project, changelog, today)
        check_tree(asked.version)
        if asked.do:
            carry_out(release)
    except CannotRelease as error:
        parser.exit(1, f"release: {error}\n")
    print(f"pyproject.toml, CHANGELOG.md: {release.version}\ncommit: release {release.version}")
    print(f"tag v{release.version}:\n\n{release.notes}")
    if asked.do:
        print(f"Done. Look at it, then: git push origin {BRANCH} v{release.version}")
    else:
        print(f"Nothing was changed. To do it: make release VERSION={release.version} DO=1")


if __name__ == "__main__":
    main()
