"""Where an engine finds the LoRA adapters of its model: a file that its agent keeps.

The file is JSON: {"model": "m", "adapters": {"m:sql": {"source": …, "path": …, "error": …}}}, where
`path` or `error` or both are null.

Rules this file keeps:
- an adapter that is declared is never "not found": who asks waits while it is being fetched, and is
  then told when to come back;
- one of a higher rank than the engine has room for waits for the engine that replaces it;
- the file is read when an adapter is first asked for, so nothing has to be told to an engine, and
  one that was restarted knows all there is;
- standard library only: it is imported inside vLLM.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX_ENV = "STOKER_ADAPTERS"
RANK_ENV = "STOKER_MAX_LORA_RANK"
WAIT_S = 30.0  # for an adapter that is being fetched
UNHEARD_S = 5.0  # for one that the agent may hear of in a second
RETRY_AFTER_S = 5
_POLL_S = 0.1


class NotYet(Exception):
    """A declared adapter is not to be had now; the message says why."""


def environment(path: str, max_rank: object) -> dict[str, str]:
    """What an engine is started with, for `from_environment`."""
    return {INDEX_ENV: path, RANK_ENV: str(max_rank)}


def from_environment(environ: Mapping[str, str]) -> Index | None:
    """The engine's own index; None for one that takes no adapters."""
    path, rank = environ.get(INDEX_ENV), environ.get(RANK_ENV, "")
    return Index(path, int(rank) if rank.isdigit() else sys.maxsize) if path else None


class Index:
    """The file at `path`, as it is at each call; adapters of up to `max_rank` can be had."""

    def __init__(self, path: str, max_rank: int = sys.maxsize) -> None:
        self._path = Path(path)
        self._max_rank = max_rank

    async def find(self, name: str, wait_s: float = WAIT_S) -> str | None:
        """The folder of the adapter that callers name `name`; None where the model can't have it.

        Raises NotYet after `wait_s`.
        """
        began = time.monotonic()
        while True:
            index = self._read()
            if not name.startswith(f"{index['model']}:"):
                return None
            entry = index["adapters"].get(name)
            if entry and entry["path"]:
                return self._with_room(name, str(entry["path"]))
            if entry and entry["error"]:
                raise NotYet(f"adapter {name} can't be had: {entry['error']}")
            if time.monotonic() - began >= (wait_s if entry else min(wait_s, UNHEARD_S)):
                why = "is still being fetched" if entry else "is not known to this node yet"
                raise NotYet(f"adapter {name} {why}")
            await asyncio.sleep(_POLL_S)

    def _with_room(self, name: str, folder: str) -> str:
        try:
            text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
            config: dict[str, Any] = json.loads(text)
            rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NotYet(f"adapter {name} can't be read: {error!r}") from None
        if rank > self._max_rank:
            here = f"this engine has room for {self._max_rank}, and is being replaced"
            raise NotYet(f"adapter {name} has rank {rank}: {here}")
        return folder

    def _read(self) -> dict[str, Any]:
        try:
            index: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            return index
        except (OSError, ValueError):
            raise NotYet(f"{self._path} can't be read") from None
