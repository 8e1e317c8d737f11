"""Dedicated replicas, LRU keep-alive, Knative's KPA, ServerlessLLM's locality. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bench.policies.base import Baseline
from scheduler.policy.autoscale import floor
from scheduler.policy.choices import Scale
from scheduler.policy.ladder import climb_s
from scheduler.policy.placement import Fit
from scheduler.signals.windows import Mean
from scheduler.state.cluster import ClusterState, Demand, Model

STOP_S = 1.0  # what a stop adds to a start in this world: TERM and reaping


class Dedicated(Baseline):
    """One replica of every model, always (its specs say min_replicas: 1); first fit.

    bench/policy.py gives it as many devices as that takes.
    """

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """The first devices with room."""
        for node in self._able(state, model):
            devices = self._free(node, model)
            if devices:
                return Fit(node.node_id, devices)
        return None


class Lru(Baseline):
    """As Ollama (OLLAMA_KEEP_ALIVE 5 min) and llama-swap (ttl): a model stays for a fixed time
    after its last request (its spec's idle_s); without room the one idle longest is unloaded. One
    replica a model. Where: free room first, then where the last victim is the oldest."""

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        best: tuple[float, Fit] | None = None
        for node in self._able(state, model):
            devices = self._free(node, model)
            if devices:
                return Fit(node.node_id, devices, rung=node.start_rung(model.spec.source))
            cleared = self._cleared(state, node, model, now)
            if cleared is not None and (best is None or cleared[2] < best[0]):
                best = cleared[2], Fit(node.node_id, cleared[0], cleared[1])
        return best[1] if best else None


class Locality(Baseline):
    """As ServerlessLLM (Fu et al., OSDI 2024): the server with the least estimated time until the
    model is loaded, from DRAM, SSD or remote, its loading queue included; keep-alive, LRU idle
    eviction, no sleep rung. Live migration of running requests is left out."""

    alike_s = 0.1  # waits that differ by less are alike: then by what goes

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """The least wait; of those alike free room, then the first to go by `_order`."""
        fits = []
        for node in self._able(state, model):
            rung = node.start_rung(model.spec.source)
            load_s = climb_s(model, 0, rung)
            devices = self._free(node, model)
            if devices:
                wait_s = load_s + self._turn_s(state, node, model, devices, now)
                fit = Fit(node.node_id, devices, rung=rung, wait_s=wait_s)
                fits.append((wait_s, float("-inf"), fit))
            cleared = self._cleared(state, node, model, now)
            if cleared is not None and cleared[1]:
                devices, ways, last = cleared
                wait_s = load_s + self._turn_s(state, node, model, devices, now) + STOP_S
                fit = Fit(node.node_id, devices, ways, rung=rung, wait_s=wait_s)
                fits.append((wait_s, last, fit))
        best = min(fits, key=lambda f: (round(f[0] / self.alike_s), f[1]), default=None)
        if best is not None:
            self._chosen(best[1])
        return best[2] if best else None

    def _chosen(self, last: float) -> None:
        """Take note of the order of the last one that goes for a choice; -inf: none goes."""


STABLE_S, PANIC_S, PANIC_AT = 60.0, 6.0, 2.0  # Knative's defaults
UTILIZATION = 0.7  # container-concurrency-target-percentage
DOWN_RATE, UP_RATE = 2.0, 1000.0  # max-scale-down-rate, max-scale-up-rate


@dataclass
class _Kpa:
    stable: Mean = field(default_factory=Mean)
    panic: Mean = field(default_factory=Mean)
    panic_until: float = -math.inf
    most: int = 0  # while in panic nothing goes down


class Knative(Baseline):
    """Knative's pod autoscaler over first fit: mean concurrency within the stable window (60 s)
    over 70 % of target_concurrency, the panic window (6 s) where that is twice what is ready; a pod
    that finds no room stays pending (Kubernetes evicts nobody of the same priority); to zero when a
    stable window was empty (its spec's idle_s is that)."""

    def __init__(self) -> None:
        super().__init__()
        self._kpa: dict[str, _Kpa] = {}

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        for node in self._able(state, model):
            devices = self._free(node, model)
            if devices:
                return Fit(node.node_id, devices, rung=node.start_rung(model.spec.source))
        return None

    def scale(self, state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
        """By the autoscaler; at once for the first one, which the activator asks for.

        The core takes a start that nobody waits for back where another model waits for its turn;
        the mean of the last minute does not ask for it again, or the two would go on by turns.
        """
        least = floor(model, now)[0]
        wanted = max(self._wish(model, demand, now), least)
        if demand.waiting:
            wanted = max(1, wanted)
        elif not (demand.in_flight or model.coming()):
            wanted = least
        return Scale(wanted, "KPA", keep=wanted or None)

    def _wish(self, model: Model, demand: Demand, now: float) -> int:
        kpa = self._kpa.setdefault(model.name, _Kpa())
        load = (demand.waiting + demand.in_flight) / (UTILIZATION * model.spec.target_concurrency)
        ready = max(1, len(model.ready()))
        stable = math.ceil(kpa.stable.push(now, load, STABLE_S) - 1e-9)
        panic = math.ceil(kpa.panic.push(now, load, PANIC_S) - 1e-9)
        stable = max(stable, math.floor(ready / DOWN_RATE)) if model.ready() else stable
        if panic >= PANIC_AT * ready:
            kpa.panic_until = now + STABLE_S
        if now < kpa.panic_until:
            kpa.most = max(kpa.most, stable, panic)
            stable = kpa.most
        else:
            kpa.most = 0
        return min(stable, int(ready * UP_RATE), model.spec.max_replicas)
