"""Who sees what really happens in a simulated cluster. Pure.

The parts under test know only what they are told; an observer is told the truth.
"""

from __future__ import annotations

from typing import Protocol

from runtime.wire.agent_messages import ReplicaPhase, StartReplica


class Job(Protocol):
    """One request at an engine. Exactly one of `done`, `broken` and `silent` is called, once."""

    model: str
    prompt_tokens: int
    output_tokens: int
    first_due: float | None  # when its first token comes, as soon as the engine knows

    def done(self, first_at: float) -> object:
        """The whole answer is out; its first token came at `first_at`."""

    def broken(self, first_at: float | None) -> object:
        """The engine died over it; None: before the first token."""

    def silent(self) -> object:
        """The engine's host vanished: nothing more comes, and nobody says so."""


class Observer(Protocol):
    """Told of every change of a node's truth."""

    def phase_changed(
        self,
        node_id: str,
        command: StartReplica,
        phase: ReplicaPhase | None,
        level: int,
        rung: str,
    ) -> None:
        """`level`: of its sleep; `rung`: what its last climb began from; phase None: it is over."""

    def memory_changed(
        self, node_id: str, replica_id: str, model: str, device_ids: tuple[str, ...], held: int
    ) -> None:
        """Note how many bytes a replica really holds on each of these devices now."""

    def cut_off(self, node_id: str, replica_id: str, in_flight: int, why: str) -> None:
        """An engine was told to end while it had requests."""

    def violated(self, words: str) -> None:
        """A rule of the world is broken."""
