"""Seconds of each climb and descent: from the ledger where it has them, else by profile. Pure.

Rules this file keeps: a measured step wins over the profile; bytes that several replicas fetch at
once are not timed here but by the pipe they share (runtime/sim/pipe.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from runtime.contract.footprint_ledger import Footprint
from runtime.sim import profile as p
from runtime.sim.profile import Gpu, Host, ModelFacts
from runtime.wire.model_spec import ModelSpec

_RUNGS = ("cached", "staged", "remote")
_NOT_FIXED = ("fetch", "stage", "pull", "weights", "canary")  # timed apart, or after it serves


@dataclass(frozen=True)
class Timings:
    """Timings of one kind of node. `ledger`: the latest footprint of each model."""

    gpu: Gpu
    host: Host
    facts: Mapping[str, ModelFacts]
    ledger: Mapping[str, Footprint] = field(default_factory=dict)

    def of(self, spec: ModelSpec) -> ModelFacts:
        """The model's facts; without them, 70 % of what it books are weights."""
        known = self.facts.get(spec.name)
        if known is not None:
            return known
        booked = spec.booked_bytes() * spec.tensor_parallel_size
        return ModelFacts(weights_bytes=int(0.7 * booked))

    def start_s(self, spec: ModelSpec) -> dict[str, float]:
        """The phases of a start but those that move weights ("pull", "weights"), in order."""
        measured = self._phases(spec.name, self._start(spec.name), but=_NOT_FIXED)
        if measured:
            return measured
        return {
            "fork": p.FORK_S,
            "init": p.INIT_S + p.CUDA_S,
            "kv": p.KV_S,
            "compile": p.COMPILE_S,
            "graphs": p.GRAPHS_S,
        }

    def weights_s(self, spec: ModelSpec, rung: str) -> float | None:
        """Measured seconds of reading the weights from `rung`; None: by the profile's rates."""
        entry = self.ledger.get(spec.name)
        if entry is None:
            return None
        for step in (f"start-{rung}.weights", f"{self._start(spec.name)}.weights"):
            if (seconds := entry.median_s(step)) is not None:
                return seconds
        return None

    def canary_s(self, spec: ModelSpec) -> float:
        """Seconds of a start's canary: as measured, else the profile's."""
        entry = self.ledger.get(spec.name)
        measured = entry.median_s(f"{self._start(spec.name)}.canary") if entry else None
        return p.CANARY_S if measured is None else measured

    def _start(self, model: str) -> str:
        """The ledger's step of a start, from the rung it was measured from most often."""
        entry = self.ledger.get(model)
        steps = [f"start-{rung}" for rung in _RUNGS]
        return max(steps, key=lambda step: _count(entry, step)) if entry else steps[0]

    def copy_s(self, spec: ModelSpec) -> float:
        """From the page cache to the devices, each taking its part at once."""
        rate = min(p.LOAD_BYTES_S, self.gpu.pcie_rate)
        return self.of(spec).weights_bytes / (rate * spec.tensor_parallel_size)

    def wake_s(self, spec: ModelSpec, level: int) -> dict[str, float] | None:
        """A wake's phases; None: level 2 by profile, whose weights come through a pipe."""
        if measured := self._phases(spec.name, f"wake-{level}"):
            return measured
        if level == 2:
            return None
        copy_s = self.of(spec).weights_bytes / (self.gpu.pcie_rate * spec.tensor_parallel_size)
        return {"wake": p.MAP_S + copy_s, "canary": p.CANARY_S}

    def sleep_s(self, spec: ModelSpec, level: int) -> float:
        """Seconds that going to sleep takes: as measured, else by the bytes to copy."""
        entry = self.ledger.get(spec.name)
        measured = entry.median_s(f"sleep-{level}") if entry else None
        if measured is not None:
            return measured
        if level == 2:
            return p.UNMAP_S
        rate = self.gpu.pcie_rate * spec.tensor_parallel_size
        return p.UNMAP_S + self.of(spec).weights_bytes / rate

    def residue_bytes(self, spec: ModelSpec, booked: int) -> int:
        """Held on each device while asleep."""
        entry = self.ledger.get(spec.name)
        measured = entry.residue_bytes if entry else None
        return min(booked, p.RESIDUE_BYTES if measured is None else measured)

    def step_s(self, spec: ModelSpec, batch: int) -> float:
        """Seconds of one decoding step of a batch."""
        return p.step_s(self.gpu, self.of(spec), spec.tensor_parallel_size, batch)

    def prefill_s(self, spec: ModelSpec, tokens: int) -> float:
        """Seconds of reading a prompt of that many tokens."""
        return p.prefill_s(self.gpu, self.of(spec), spec.tensor_parallel_size, tokens)

    def _phases(self, model: str, step: str, but: tuple[str, ...] = ()) -> dict[str, float]:
        """The measured phases of a step, with what no phase accounts for as "other"."""
        entry = self.ledger.get(model)
        total = entry.median_s(step) if entry else None
        if entry is None or total is None:
            return {}
        found = {
            name.removeprefix(f"{step}."): entry.median_s(name) or 0.0
            for name in entry.times
            if name.startswith(f"{step}.")
        }
        rest = total - sum(found.values())
        kept = {name: seconds for name, seconds in found.items() if name not in but}
        if rest > 0:
            kept["other"] = kept.get("other", 0.0) + rest
        return kept or {"other": 0.0}


def by_model(footprints: Iterable[Footprint]) -> dict[str, Footprint]:
    """One entry a model: the one with the most samples of a start."""
    found: dict[str, Footprint] = {}
    for entry in footprints:
        best = found.get(entry.key.model)
        if best is None or _samples(entry) > _samples(best):
            found[entry.key.model] = entry
    return found


def _samples(entry: Footprint) -> int:
    return sum(_count(entry, f"start-{rung}") for rung in _RUNGS)


def _count(entry: Footprint, step: str) -> int:
    return len(entry.times[step].samples) if step in entry.times else 0
