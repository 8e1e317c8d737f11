"""Finds the cluster a command talks to, and runs the command's question against it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import msgspec
from msgspec import Struct

from runtime import outside

if TYPE_CHECKING:
    from cli.client import Admin
    from runtime.contract.config import Config

UP_STATE_DIR = ".stoker"
UP_FILE = "up.json"
MAX_TOKEN_CHARS = 4096

T = TypeVar("T")


class UpFile(Struct, frozen=True, kw_only=True):
    """What a running `stoker up` leaves in its state dir for other commands (mode 0600)."""

    admin: str
    router: str
    token: str
    pid: int


class _Leader(Struct):
    """The value of the leader key."""

    url: str


def up_state_dir() -> Path:
    """Where `stoker up` keeps its state: $STOKER_STATE_DIR, else ./.stoker."""
    return Path(os.environ.get("STOKER_STATE_DIR") or UP_STATE_DIR)


def read_token(path: str) -> str:
    """The token in a file, or on standard input for "-". Raises click.UsageError."""
    try:
        with click.open_file(path, encoding="utf-8") as file:
            token = str(file.read(MAX_TOKEN_CHARS + 1)).strip()
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--token-file: can't read {path}: {error}") from None
    if not token or len(token) > MAX_TOKEN_CHARS or not (token.isascii() and token.isprintable()):
        raise click.UsageError(f"--token-file: {path} holds no token; write it there on one line")
    return token


def read_up_file(state_dir: Path) -> UpFile | None:
    """The running `stoker up` of a state dir, or None. Raises click.ClickException."""
    path = state_dir / UP_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpFile)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"can't read {path}: {error}") from None


@dataclass(frozen=True)
class ClusterAccess:
    """The global options; what they leave open is looked up when it is needed."""

    config: str | None = None
    admin: str | None = None
    router: str | None = None
    token: str | None = None

    def load_config(self, overrides: dict[str, object] | None = None) -> Config:
        """The settings. Raises click.UsageError that names each bad key."""
        from runtime.contract.config import load
        from runtime.contract.schema import SchemaError

        try:
            return load(self.config, overrides=overrides)
        except (SchemaError, OSError) as error:
            raise click.UsageError(f"config: {error}") from None

    def ask(self, question: Callable[[Admin], Awaitable[T]]) -> T:
        """Run `question` with a client of the admin API. Raises click.ClickException."""

        async def run() -> T:
            async with await self.admin_client() as admin:
                return await question(admin)

        return asyncio.run(run())

    async def admin_client(self) -> AbstractAsyncContextManager[Admin]:
        """A client of the admin API, to be entered with `async with`."""
        from cli.client import open_admin

        up = None if self.admin and self.token else self._up_file()
        token = self.token or (up.token if up else self._config_token())
        admin = self.admin or (up.admin if up else await self._registered("admin"))
        return open_admin(admin, token)

    async def router_url(self) -> str:
        """A router's address, without a slash at its end. Raises click.ClickException."""
        up = None if self.router else self._up_file()
        url = self.router or (up.router if up else await self._registered("router"))
        return url.rstrip("/")

    def _up_file(self) -> UpFile | None:
        if self.config or os.environ.get("STOKER_CONFIG"):
            return read_up_file(Path(self.load_config().state_dir))
        return read_up_file(up_state_dir())

    def _config_token(self) -> str:
        return "" if self.admin and not self._has_config() else self.load_config().cluster_token

    def _has_config(self) -> bool:
        from runtime.contract.config import DEFAULT_FILE

        return bool(self.config or os.environ.get("STOKER_CONFIG")) or Path(DEFAULT_FILE).exists()

    async def _registered(self, what: str) -> str:
        """The URL of the leading scheduler, or of a router, as the config's registry has it."""
        if not self._has_config():
            raise click.ClickException(
                f"no cluster found: nothing runs in {up_state_dir()}, and there is no config file."
                f" Start one with `stoker up`, or name one with --{what} URL and"
                " --token-file FILE"
            )
        from runtime import places
        from runtime.registry.open import open_registry
        from runtime.registry.protocol import RegistryError

        config = self.load_config()
        registry = open_registry(config)
        try:
            if what == "admin":
                entry = await registry.get(places.key(config.registry.prefix, "leader"))
                if entry is not None:
                    return outside.decode(entry.value, _Leader).url
            else:
                services, _ = await registry.services("stoker-router")
                if services:
                    return places.base_url(services[0].address, services[0].port)
        except RegistryError as error:
            raise click.ClickException(f"can't ask the registry: {error}") from None
        finally:
            await registry.close()
        part = {"admin": "scheduler leads", "router": "router runs"}[what]
        raise click.ClickException(f"no {part} in this cluster; start one, or give --{what} URL")
