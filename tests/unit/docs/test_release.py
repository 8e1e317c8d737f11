"""A release: what it changes, when it is refused, and that a dry run changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import release
from scripts.release import CannotRelease, prepare
from tests.unit.docs.pages import text

PROJECT = '[project]\nname = "a"\nversion = "0.1.0"\n'
CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- this\n\n## [0.1.0] - 2026-01-02\n\n- that\n"
)


def test_the_version_and_the_changelog_change_and_the_tag_says_what_is_new() -> None:
    made = prepare("0.2.0", PROJECT, CHANGELOG, "2026-03-04")
    assert made.project == PROJECT.replace("0.1.0", "0.2.0")
    assert made.changelog == CHANGELOG.replace("[Unreleased]", "[0.2.0] - 2026-03-04")
    assert made.notes == "Stoker 0.2.0\n\n### Added\n\n- this\n"


def test_the_first_release_of_this_repository_could_be_made() -> None:
    made = prepare("9.0.0", text("pyproject.toml"), text("CHANGELOG.md"), "2026-03-04")
    assert 'version = "9.0.0"' in made.project
    assert "## [9.0.0] - 2026-03-04\n" in made.changelog


@pytest.mark.parametrize(
    ("version", "changelog", "words"),
    [
        ("v1", CHANGELOG, "VERSION=v1 is not a version"),
        ("0.0.9", CHANGELOG, "less than 0.1.0"),
        (
            "0.2.0",
            CHANGELOG.replace("[Unreleased]", "[0.2.0] - 2026-02-02"),
            "nothing is unreleased",
        ),
        ("0.2.0", CHANGELOG.replace("[Unreleased]", "[next]"), r"call it \[Unreleased\]"),
        ("0.2.0", CHANGELOG.replace("### Added\n\n- this\n", ""), "say what changed"),
        ("0.2.0", "# Changelog\n", "no section"),
    ],
)
def test_what_can_not_be_released_is_refused(version: str, changelog: str, words: str) -> None:
    with pytest.raises(CannotRelease, match=words):
        prepare(version, PROJECT, changelog, "2026-03-04")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "a")
        monkeypatch.setenv(f"{name}_EMAIL", "a@example.org")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["release", *words])
    release.main()


def test_a_dry_run_changes_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = release.git("rev-parse", "HEAD")
    run(monkeypatch, "0.2.0")
    assert (
        "Nothing was changed. To do it: make release VERSION=0.2.0 DO=1" in capsys.readouterr().out
    )
    assert release.git("rev-parse", "HEAD") == before
    assert release.git("status", "--porcelain") == release.git("tag") == ""


def test_a_release_is_one_commit_and_a_tag(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "0.2.0", "--do")
    assert release.git("log", "--format=%s") == "release 0.2.0\nfirst\n"
    assert release.git("cat-file", "-t", "v0.2.0") == "tag\n"
    assert "### Added" in release.git("tag", "--list", "--format=%(contents)", "v0.2.0")
    assert release.git("status", "--porcelain") == ""
    assert 'version = "0.2.0"' in (repository / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("prepared", "words"),
    [
        (["tag", "v0.2.0"], "there is a tag v0.2.0 already"),
        (["checkout", "-qb", "other"], "the branch is 'other'"),
    ],
)
def test_a_tree_that_is_not_ready_is_refused(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepared: list[str],
    words: str,
) -> None:
    release.git(*prepared)
    with pytest.raises(SystemExit):
        run(monkeypatch, "0.2.0", "--do")
    assert words in capsys.readouterr().err


def test_what_is_not_committed_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "new.txt").write_text("a")
    with pytest.raises(SystemExit):
        run(monkeypatch, "0.2.0", "--do")
    assert "there is what is not committed" in capsys.readouterr().err
    assert release.git("tag") == ""
