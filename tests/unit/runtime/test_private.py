"""What is kept on a host is its own user's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.private import keep_private


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


def test_what_is_made_from_then_on_is_for_the_user_alone(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    keep_private(state)
    (state / "file").write_text("")
    (state / "folder").mkdir()
    assert [mode(p) for p in (state, state / "file", state / "folder")] == [
        "0o700",
        "0o600",
        "0o700",
    ]


def test_what_an_earlier_version_left_open_is_closed(tmp_path: Path) -> None:
    for name in ("logs", "replicas", "adapters", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("secret")
    for name in ("jobs.db", "registry.db", "agent.lock"):
        (tmp_path / name).write_text("")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("")
    (tmp_path / "link").symlink_to(outside)
    tmp_path.chmod(0o755)
    keep_private(tmp_path)
    assert mode(tmp_path) == "0o750", "its group is the operator's choice"
    for name in ("jobs.db", "registry.db", "agent.lock", "logs/x", "replicas/x", "adapters/x"):
        assert mode(tmp_path / name) == "0o600", name
    assert mode(tmp_path / "logs") == "0o700"
    assert mode(tmp_path / "models") == "0o755", "what is large is not walked"
    assert mode(outside) == "0o644", "no link is followed"


def test_where_it_fails_the_process_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        keep_private(tmp_path / "file" / "state")
    assert os.umask(0o022) == 0o022
