"""Hears that this (spot) machine is about to be taken away: from a file, or from a URL.

A cloud's own sources are such URLs. AWS: `…/latest/meta-data/spot/instance-action` answers 404,
then `{"action": "terminate", "time": "2026-11-25T02:00:00Z"}` (no IMDSv2 token is sent: where one
is demanded, let a script write the file). GCP: `…/instance/preempted` answers FALSE, then TRUE.

Rules this file keeps:
- a source that does not answer is no notice;
- a notice holds until its source takes it back; its end never moves back by being heard again;
- `read_notice` is all that is decided; the rest looks and counts down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from msgspec import Struct

from runtime import outside
from runtime.contract.config import AgentConfig

log = logging.getLogger("stoker.agent")

_POLL_S = 2.0
_TIMEOUT = aiohttp.ClientTimeout(total=1.5)
_MOST_BYTES = 4096
_HEADERS = {"Metadata-Flavor": "Google"}  # GCP answers nothing without it; others ignore it
_NO = {"false", "none", "no"}


class _Action(Struct):
    time: str = ""


def read_notice(text: str, grace_s: float, now: datetime) -> float | None:
    """Seconds that are left by what a source says; None where that is not a notice.

    "TRUE" or nothing: `grace_s`. "90": 90. AWS's JSON: until its time, 0 if that is past.
    "FALSE": no notice.
    """
    words = text.strip()
    if words.lower() in _NO:
        return None
    try:
        return max(0.0, float(words))
    except ValueError:
        pass
    try:
        until = datetime.fromisoformat(outside.decode(words, _Action).time)
    except ValueError:
        return grace_s
    return max(0.0, ((until if until.tzinfo else until.replace(tzinfo=UTC)) - now).total_seconds())


class Preemption:
    """The notices of one machine."""

    def __init__(
        self, config: AgentConfig, session: aiohttp.ClientSession, changed: Callable[[], None]
    ) -> None:
        """`changed` is called when a notice comes or goes. Raises ValueError for a bad URL."""
        self._config = config
        self._session = session
        self._changed = changed
        self._ends_at: dict[str, float] = {}  # by source
        url = config.preemption_url
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(
                f"agent.preemption_url = {url!r} is not an http:// or https:// address; write the"
                " address of the cloud's metadata service, or leave it out"
            )

    @property
    def preemptible(self) -> bool:
        """Whether it is told, or shows by a source, that it may be taken away."""
        config = self._config
        return bool(config.preemptible or config.preemption_file or config.preemption_url)

    def left_s(self) -> float | None:
        """Until the machine goes; None while there is no notice."""
        if not self._ends_at:
            return None
        return max(0.0, min(self._ends_at.values()) - time.monotonic())

    async def run(self) -> None:
        """Look until cancelled; return at once where there is nothing to look at."""
        config = self._config
        while config.preemption_file or config.preemption_url:
            if config.preemption_file:
                text = await asyncio.to_thread(_read, Path(config.preemption_file))
                self._heard(f"file {config.preemption_file}", text)
            if config.preemption_url:
                self._heard(f"url {config.preemption_url}", await self._get(config.preemption_url))
            await asyncio.sleep(_POLL_S)
        await asyncio.Event().wait()

    def _heard(self, source: str, text: str | None) -> None:
        grace_s, now = self._config.preemption_grace_s, datetime.now(UTC)
        left_s = None if text is None else read_notice(text, grace_s, now)
        if left_s is None:
            if self._ends_at.pop(source, None) is not None:
                log.warning("this machine is not taken away any more, says %s", source)
                self._changed()
            return
        ends_at = time.monotonic() + left_s
        known = self._ends_at.get(source)
        self._ends_at[source] = ends_at if known is None else min(known, ends_at)
        if known is None:
            log.warning("this machine is taken away in %.0f s, says %s", left_s, source)
            self._changed()

    async def _get(self, url: str) -> str | None:
        try:
            async with self._session.get(url, headers=_HEADERS, timeout=_TIMEOUT) as reply:
                if reply.status != 200:
                    return None
                return (await reply.content.read(_MOST_BYTES)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return None
