"""Where the sockets of a router's workers are, however deep its state dir lies."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from runtime.router.control import other_workers
from runtime.router.control.other_workers import Siblings, socket_folder

DEEP = "d" * 146


def test_a_short_state_dir_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_workers, "_PATH_BYTES", 4096)
    assert socket_folder(tmp_path) == tmp_path


def test_a_long_state_dir_has_a_private_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        long = Path("/tmp") / DEEP
        folder = socket_folder(long)
        assert folder.parent == Path(short)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert socket_folder(long) == folder  # every worker finds the same
        assert socket_folder(Path("/tmp") / (DEEP + "2")) != folder
        assert len(str(Siblings(long, 1, 2).socket)) <= 107
        folder.chmod(0o777)
        with pytest.raises(PermissionError, match="not a folder of this user alone"):
            socket_folder(long)


def test_where_both_are_too_long_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/" + DEEP)
    with pytest.raises(ValueError, match=r"state_dir = .*at most 107 bytes.*TMPDIR"):
        socket_folder(Path("/tmp") / DEEP)
