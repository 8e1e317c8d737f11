"""Models that no known node could ever run. Pure.

Rules this file keeps: "no node can" is said only while nodes are known, and taken back as soon as
one can.
"""

from __future__ import annotations

from scheduler.core.turn import Turn
from scheduler.policy.feasibility import suits, why_never
from scheduler.state.cluster import Model


class Refusals:
    """Judges whether a model could run at all."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def nodes_known(self) -> bool:
        """Whether "no node can" is worth saying: some node reports, or none has for a while."""
        return any(node.live for node in self._turn.state.nodes.values())

    def refuse(self, model: Model, reason: str, cause: str, now: float) -> None:
        """Note that no node could ever run it; say so once."""
        if self._set(model, reason):
            self._turn.record("refuse", model.name, reason, now, cause=cause)

    def judge(self, model: Model) -> None:
        """Whether it could ever run, as far as the nodes are known."""
        self._set(model, why_never(self._turn.state, model) if self.nodes_known() else None)

    def recheck(self) -> None:
        """Judge again those that no node could run."""
        for model in self._turn.state.models.values():
            if model.unfit is None:
                continue
            self._set(model, why_never(self._turn.state, model))

    def _set(self, model: Model, reason: str | None) -> bool:
        """Whether that is news."""
        state = self._turn.state
        final = reason is not None and not any(
            suits(node, model.spec, model.booked_bytes()) for node in state.nodes.values()
        )
        if (reason, final) == (model.unfit, model.unfit_final):
            return False
        model.unfit, model.unfit_final = reason, final
        self._turn.dirty.add(model.name)
        return True
