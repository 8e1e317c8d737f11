"""How a command finds its cluster: options, a running `stoker up`, a config file, or an error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cli.cluster import UP_FILE, UpFile
from runtime.contract.config import Config, RegistryConfig
from runtime.registry.open import open_registry
from scheduler.admin import views
from tests.kits.cli_runner import TOKEN, FakeServer, replica, serving, stoker


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        server.replies["GET /admin/replicas"] = views.Replicas(replicas=(replica(),))
        yield server


def write_up_file(folder: Path, url: str) -> None:
    up = UpFile(admin=url, router=url, token=TOKEN, pid=os.getpid())
    (folder / UP_FILE).write_bytes(msgspec.json.encode(up))


def test_a_running_up_of_the_state_dir(fake: FakeServer, tmp_path: Path) -> None:
    write_up_file(tmp_path, fake.url)
    done = stoker(None, "ps", env={"STOKER_STATE_DIR": str(tmp_path)})
    assert "m-1-1" in done.output


def test_a_running_up_of_this_folder(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".stoker").mkdir()
    write_up_file(tmp_path / ".stoker", fake.url)
    monkeypatch.chdir(tmp_path)
    assert "m-1-1" in stoker(None, "ps", env={"STOKER_STATE_DIR": None}).output


def test_an_option_wins_over_a_running_up(fake: FakeServer, tmp_path: Path) -> None:
    write_up_file(tmp_path, "http://127.0.0.1:9")
    done = stoker(None, "--admin", fake.url, "ps", env={"STOKER_STATE_DIR": str(tmp_path)})
    assert "m-1-1" in done.output


def test_an_unreadable_up_file_is_named(tmp_path: Path) -> None:
    (tmp_path / UP_FILE).write_text("{")
    done = stoker(None, "ps", env={"STOKER_STATE_DIR": str(tmp_path)})
    assert done.exit_code == 1
    assert str(tmp_path / UP_FILE) in done.stderr


# Else it would win over the file's state_dir.
NO_UP: dict[str, str | None] = {"STOKER_STATE_DIR": None}


def config_file(folder: Path) -> Path:
    path = folder / "stoker.toml"
    path.write_text(f'state_dir = "{folder}"\ncluster_token = "{TOKEN}"\n')
    return path


def test_the_leader_that_the_configs_registry_names(fake: FakeServer, tmp_path: Path) -> None:
    async def lead() -> None:
        registry = open_registry(Config(state_dir=str(tmp_path), registry=RegistryConfig()))
        holder = msgspec.json.encode({"url": fake.url, "term": 1})
        assert await registry.acquire("stoker/leader", holder, 60)
        await registry.close()

    asyncio.run(lead())
    assert "m-1-1" in stoker(None, "--config", str(config_file(tmp_path)), "ps", env=NO_UP).output


def test_a_config_whose_registry_knows_no_leader(tmp_path: Path) -> None:
    done = stoker(None, "--config", str(config_file(tmp_path)), "ps", env=NO_UP)
    assert done.exit_code == 1
    assert "no scheduler leads in this cluster" in done.stderr
    done = stoker(None, "--config", str(config_file(tmp_path)), "invoke", "m", "hi", env=NO_UP)
    assert "no router runs in this cluster" in done.stderr


def test_a_bad_config_is_a_usage_error_that_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[router]\nprot = 1\n")
    done = stoker(None, "--config", str(path), "ps")
    assert done.exit_code == 2
    assert "router.prot" in done.stderr
    assert stoker(None, "--config", "/no/such.toml", "ps").exit_code == 2


@pytest.mark.skipif(
    Path("/etc/stoker/stoker.toml").exists(), reason="this host has a Stoker config"
)
def test_nothing_runs_and_nothing_is_named() -> None:
    done = stoker(None, "ps")
    assert done.exit_code == 1
    assert "Start one with `stoker up`, or name one with --admin URL" in done.stderr


def test_a_part_without_a_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stoker.toml"
    path.write_text(f'state_dir = "{tmp_path}"\n')
    done = stoker(None, "agent", "--config", str(path))
    assert done.exit_code == 2
    assert "cluster_token is empty" in done.stderr


def test_a_token_on_the_command_line_works_and_is_warned_of(fake: FakeServer) -> None:
    done = stoker(None, "--admin", fake.url, "--token", TOKEN, "ps")
    assert done.exit_code == 0, done.output
    assert "--token-file" in done.stderr
    assert TOKEN not in done.output
    assert "Warning" not in stoker(fake, "ps").stderr


@pytest.mark.parametrize("content", [TOKEN, f"{TOKEN}\n", f"  {TOKEN}\r\n"])
def test_a_token_in_a_file(fake: FakeServer, tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    by: list[tuple[tuple[str, ...], dict[str, str | None]]] = [
        (("--token-file", str(path)), {}),
        ((), {"STOKER_TOKEN_FILE": str(path)}),
    ]
    for args, env in by:
        done = stoker(None, "--admin", fake.url, *args, "ps", env=env)
        assert done.exit_code == 0, done.output
        assert done.stderr == ""


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"x" * 5000])
def test_a_file_without_a_token_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    for named in (path, tmp_path / "none"):
        done = stoker(None, "--admin", "http://127.0.0.1:9", "--token-file", str(named), "ps")
        assert done.exit_code == 2
        assert str(named) in done.stderr


@pytest.mark.parametrize("option", ["--admin", "--router"])
def test_an_address_without_a_scheme_is_refused_with_the_fix(option: str) -> None:
    done = stoker(None, option, "127.0.0.1:8081", "ps")
    assert done.exit_code == 2
    assert "'127.0.0.1:8081' is not a URL; write http://HOST:PORT" in done.stderr
    assert option in done.stderr
