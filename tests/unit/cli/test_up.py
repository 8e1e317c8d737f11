"""The files of `stoker up`, its checks before it starts, and what the demo plans."""

from __future__ import annotations

import socket
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.cluster import ClusterAccess
from cli.showcase import plan
from cli.upfiles import check_port, claim, make_config, toml_text, write_config
from runtime.contract.config import AgentConfig, Config, RegistryConfig, RouterConfig, load
from runtime.wire.agent_messages import DeviceReport
from runtime.wire.names import NODE_PATTERN
from tests.kits.cli_runner import GIB, stoker

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    st.from_regex(r"[!-~]{16,40}", fullmatch=True) | st.just(""),
    st.from_regex(f"^$|{NODE_PATTERN}"),
    st.none() | text,
    st.dictionaries(text, text, max_size=3),
)
def test_a_written_config_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    token: str,
    node: str,
    url: str | None,
    labels: dict[str, str],
) -> None:
    config = Config(
        cluster_token=token,
        registry=RegistryConfig(consul_url=url),
        router=RouterConfig(port=0, drain_s=1.5),
        agent=AgentConfig(node_id=node, labels=labels),
    )
    path = tmp_path_factory.mktemp("config") / "up.toml"
    path.write_text(toml_text(config), encoding="utf-8")
    assert load(path, environ={}) == config


def test_the_configs_file_is_for_its_owner_only(tmp_path: Path) -> None:
    assert write_config(Config(cluster_token="secret"), tmp_path).stat().st_mode & 0o777 == 0o600


def test_every_up_has_a_token_of_its_own(tmp_path: Path) -> None:
    first, second = (make_config(ClusterAccess(), tmp_path, {}).cluster_token for _ in range(2))
    assert len(first) >= 32
    assert first != second


def test_a_token_that_is_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_CLUSTER_TOKEN", "mine, a long one")
    assert make_config(ClusterAccess(), tmp_path, {}).cluster_token == "mine, a long one"


def test_a_state_dir_belongs_to_one_up(tmp_path: Path) -> None:
    with (
        claim(tmp_path),
        pytest.raises(click.ClickException, match="runs already"),
        claim(tmp_path),
    ):
        pass
    with claim(tmp_path):
        pass


def test_a_state_dir_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(click.ClickException, match="can't use the state dir"),
        claim(tmp_path / "file"),
    ):
        pass


def test_a_taken_port_is_named_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(click.ClickException, match=rf"127\.0\.0\.1:{port}.*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", 0)


def test_up_refuses_a_bad_models_file_before_it_starts_anything(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("{name: a}")
    state = tmp_path / "state"
    done = stoker(None, "up", "--state-dir", str(state), "--models", str(path))
    assert done.exit_code == 1
    assert "source: is required" in done.stderr
    assert not state.exists()


def test_up_refuses_a_state_dir_in_use(tmp_path: Path) -> None:
    with claim(tmp_path):
        done = stoker(None, "up", "--state-dir", str(tmp_path), "--port", "0")
    assert done.exit_code == 1
    assert "--state-dir" in done.stderr


def device(total_bytes: int, foreign_bytes: int = 0) -> DeviceReport:
    return DeviceReport(
        device_id="d", index=0, kind="nvml", name="d", memory_total_bytes=total_bytes,
        memory_used_bytes=foreign_bytes, foreign_bytes=foreign_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("foreign_bytes", [0, 5 * GIB])
def test_the_demo_plans_exactly_one_model_too_many(count: int, foreign_bytes: int) -> None:
    devices = [device(24 * GIB, foreign_bytes)] * count
    models, book_bytes = plan(devices)
    room = sum((d.memory_total_bytes - d.foreign_bytes) // book_bytes for d in devices)
    assert models == room + 1
    assert models >= 3


def test_the_demo_without_a_device_says_so() -> None:
    with pytest.raises(click.ClickException, match="no healthy device"):
        plan([])
