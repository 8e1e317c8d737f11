"""What the core learns and the next leader should know: footprints, arrivals, quarantines.

Rules this file keeps: figures are written by the leader alone, the newest of each, at most once in
SAVE_S; a quarantine is written at once, and again until the registry takes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import tenacity

from runtime.contract.footprint_ledger import Footprint, Key
from runtime.registry.protocol import RegistryError
from scheduler.core.decisions import Core
from scheduler.signals.forecast import StoredArrivals
from scheduler.state import messages as m
from scheduler.store import Store

log = logging.getLogger("stoker.scheduler")

SAVE_S = 5.0


class LearnedState:
    """Collects what `core` learnt, and writes it to the registry."""

    def __init__(self, store: Store, core: Core) -> None:
        self._store = store
        self._core = core
        self._footprints: dict[Key, Footprint] = {}  # not saved yet
        self._sketches: dict[str, StoredArrivals] = {}  # likewise, by model
        self._learned = asyncio.Event()

    def keep_footprint(self, footprint: Footprint) -> None:
        """Have a footprint written."""
        self._footprints[footprint.key] = footprint
        self._learned.set()

    def keep_sketch(self, model: str, sketch: StoredArrivals) -> None:
        """Have it written when a model is called."""
        self._sketches[model] = sketch
        self._learned.set()

    async def keep_quarantine(self, told: m.Quarantined) -> None:
        """So that the next leader knows it too; a registry that is down is told again."""
        key = ("quarantine", told.node_id, told.device_id)
        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(RegistryError),
            wait=tenacity.wait_exponential(multiplier=0.2, max=5),
        )
        if told.reason is None:
            await retry(self._store.delete, *key)
        else:
            registry, reason = self._store.registry, told.reason.encode()
            await retry(registry.put, self._store.key(*key), reason)

    async def keep_saving(self, leads: Callable[[], bool]) -> None:
        """Write what was learnt, at most once in SAVE_S, until cancelled."""
        while True:
            await self._learned.wait()
            self._learned.clear()
            await self._save_footprints(leads)
            await self._save_sketches(leads)
            await asyncio.sleep(SAVE_S)

    async def _save_footprints(self, leads: Callable[[], bool]) -> None:
        unsaved, self._footprints = self._footprints, {}
        for key, footprint in unsaved.items():
            try:
                if leads():
                    await self._store.put(footprint, "footprints", *key.path().split("/"))
            except RegistryError as error:
                log.warning("the footprint of %s was not saved: %s", key.model, error)

    async def _save_sketches(self, leads: Callable[[], bool]) -> None:
        unsaved, self._sketches = self._sketches, {}
        for name, sketch in unsaved.items():
            try:
                if leads() and name in self._core.state.models:
                    await self._store.put(sketch, "arrivals", name)
            except RegistryError as error:
                log.warning("when %s is called was not saved: %s", name, error)
