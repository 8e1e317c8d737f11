"""The files of a `stoker up`: its lock, the parts' config, and where others find it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from cli.cluster import UP_FILE, ClusterAccess, UpFile
from runtime.private import keep_private

if TYPE_CHECKING:
    from runtime.contract.config import Config

CONFIG_FILE = "up.toml"


def make_config(cluster: ClusterAccess, state_dir: Path, overrides: Mapping[str, Any]) -> Config:
    """The settings of every part: the user's, with free ports but the router's, and a token."""
    fixed: dict[str, Any] = {
        "state_dir": str(state_dir.resolve()),
        "scheduler.port": 0,
        "agent.port": 0,
    }
    settings = {**fixed, **overrides}
    config = cluster.load_config(settings)
    if not config.cluster_token:
        settings["cluster_token"] = secrets.token_urlsafe(32)
    if config.router.port == 0:
        # Chosen here, not by the router: one that is started again must keep its address.
        settings["router.port"] = _free_port(config.router.host)
    return cluster.load_config(settings)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as server:
        port: int = server.getsockname()[1]
        return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def claim(state_dir: Path) -> Iterator[None]:
    """Hold the state dir. Raises click.ClickException if another `stoker up` has it."""
    with _private(state_dir), _lock_file(state_dir) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(
                f"a `stoker up` runs already with the state dir {state_dir}; stop it, or choose"
                " another with --state-dir"
            ) from None
        try:
            yield
        finally:
            (state_dir / UP_FILE).unlink(missing_ok=True)
            (state_dir / CONFIG_FILE).unlink(missing_ok=True)


@contextmanager
def _private(state_dir: Path) -> Iterator[None]:
    try:
        before = keep_private(state_dir)
    except OSError as error:
        raise _no_use(state_dir, error) from None
    try:
        yield
    finally:
        os.umask(before)


def _lock_file(state_dir: Path) -> IO[str]:
    try:
        return (state_dir / "up.lock").open("a+")
    except OSError as error:
        raise _no_use(state_dir, error) from None


def _no_use(state_dir: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"can't use the state dir {state_dir}: {error}")


def check_port(host: str, port: int) -> None:
    """Raises click.ClickException that names the port and the option, if the port is taken."""
    if port == 0:
        return
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        raise click.ClickException(
            f"the router can't listen on {host}:{port}: {os.strerror(error.errno or 0)};"
            " choose another port with --port (0: any free one)"
        ) from None


def write_config(config: Config, state_dir: Path) -> Path:
    """The parts' config file, readable for this user only: it holds the token."""
    return _write_private(state_dir / CONFIG_FILE, toml_text(config).encode())


def write_up_file(state_dir: Path, up: UpFile) -> None:
    """Tell other commands where the parts are."""
    _write_private(state_dir / UP_FILE, msgspec.json.encode(up))


def toml_text(config: Config) -> str:
    """A config as TOML; None is left out."""
    sections: dict[str, dict[str, Any]] = {"": {}}
    _flatten(msgspec.to_builtins(config), "", sections)
    blocks = []
    for name, values in sections.items():
        lines = [f"[{name}]"] if name else []
        lines += [f"{_toml_value(key)} = {_toml_value(value)}" for key, value in values.items()]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _toml_value(value: object) -> str:
    """JSON's texts, numbers and booleans are TOML's, but for DEL and for surrogate pairs."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flatten(values: dict[str, Any], name: str, sections: dict[str, dict[str, Any]]) -> None:
    mine = sections.setdefault(name, {})
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(value, f"{name}.{key}" if name else key, sections)
        elif value is not None:
            mine[key] = value


def _write_private(path: Path, content: bytes) -> Path:
    temporary = path.with_suffix(".tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    temporary.replace(path)
    return path
