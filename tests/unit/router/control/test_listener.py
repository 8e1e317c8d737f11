"""What systemd gives a part: a listening socket, and a place to say that it is ready."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from runtime import notify
from runtime.router.control.listener import given_fd, listen, worker_environ


def test_a_given_socket_is_served_and_no_other_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as systemds:
        port = systemds.getsockname()[1]
        for name, value in worker_environ(os.dup(systemds.fileno())).items():
            monkeypatch.setenv(name, value)
        with listen("127.0.0.1", 1, shared=False) as ours:
            assert ours.getsockname()[1] == port


def test_another_process_own_socket_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert given_fd() is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert given_fd() == 3


def test_systemd_hears_that_a_part_is_ready_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify.ready()
        assert systemd.recv(100) == b"READY=1"
        assert "NOTIFY_SOCKET" not in os.environ
        notify.ready()  # without systemd, nothing
