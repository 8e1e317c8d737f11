"""A client's script as a process: calls go in, what it made of the answers comes out."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

CLIENTS = Path(__file__).parent / "clients"
LIMIT_S = 120.0


class Asked(NamedTuple):
    """One call; `speak.py` says what of."""

    base_url: str
    key: str
    model: str
    prompt: str
    max_tokens: int
    stream: bool
    timeout_s: float | None
    api: str


class Told(NamedTuple):
    """What the library told its user."""

    text: str
    pieces: int
    error: dict[str, Any] | None
    took_s: float


class Script:
    """A running script; close it."""

    def __init__(self, argv: list[str], environ: dict[str, str]) -> None:
        clean = {k: v for k, v in os.environ.items() if k.lower() not in _PROXIES}
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**clean, **environ}, cwd=CLIENTS,
        )  # fmt: skip

    def ask(self, asked: Asked) -> Told:
        """Make one call. Raises AssertionError where the script ends or says nothing."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked._asdict()) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        assert ready, f"the client's script said nothing for {LIMIT_S:g} s"
        line = process.stdout.readline()
        assert line, f"the client's script ended with status {process.wait()}"
        return Told(**json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


_PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
