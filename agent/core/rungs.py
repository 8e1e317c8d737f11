"""The rungs of one replica: how it falls asleep, wakes, and is pointed at another model.

Rules this file keeps:
- pure, as the whole core is;
- a sleep waits until nothing is in flight and never ends a request: after its grace time the
  replica serves on; a wake that comes before the device memory is touched cancels it;
- so does a re-point; from the moment its engine is told, the replica is the other model's, whatever
  comes of it;
- a sleep, wake or re-point that fails or takes too long costs the engine a restart, and that rung
  is never used again for this model and launch key on this node.
"""

from __future__ import annotations

import msgspec

from agent.core import replica as state
from agent.core.messages import CommandRefused, RepointEnded, SaveDisabled, SleepEnded, WakeEnded
from agent.core.replica import SHELL, Replica, rung_name
from agent.core.transitions import Transitions
from runtime.wire.agent_messages import RepointReplica, SleepReplica, WakeReplica


class RungTransitions(Transitions):
    """What the commands and events of sleep, wake and re-point do to a replica."""

    def _sleep(self, r: Replica, command: SleepReplica, now: float) -> None:
        if r.phase in ("sleeping", "asleep"):
            r.wake_wanted = False  # whoever spoke last is right
        elif r.phase == "draining" and r.sleep:
            return
        elif words := self._why_not(r, command.level):
            self._out.append(CommandRefused(f"{r.command.replica_id} {words}"))
        else:
            r.sleep, r.reason = command, command.reason
            r.deadline = now + command.grace_s
            self._to(r, "draining", now)

    def _why_not(self, r: Replica, level: int) -> str | None:
        """Why it cannot be put to sleep."""
        if r.phase != "ready":
            return f"is {r.phase}: only a ready replica can be put to sleep"
        if r.command.spec.sleep == "off":
            return "may not sleep: its spec says `sleep: off`"
        if level not in r.rungs:
            has = ", ".join(map(str, r.rungs)) or "none"
            return f"has no sleep level {level} on this node (it has: {has})"
        why = self._disabled_of(r).get(rung_name(level))
        return f"does not use {rung_name(level)} any more: {why}" if why else None

    def _wake(self, r: Replica, command: WakeReplica, now: float) -> None:
        if r.phase == "asleep":
            r.reason = command.reason
            self._to(r, "waking", now)
        elif r.at_work and r.phase == "sleeping":
            r.wake_wanted = True
        elif r.phase == "sleeping" or (r.phase == "draining" and r.sleep):
            self._serve_on(r, None, now)
        elif r.phase in ("draining", "stopping", "failed"):
            words = f"{r.command.replica_id} is {r.phase} and cannot be woken; start a new one"
            self._out.append(CommandRefused(words))

    def _on_slept(self, r: Replica, event: SleepEnded, began_at: float) -> None:
        now = event.now
        if event.error is None:
            wake_wanted = r.wake_wanted
            r.sleep_s, r.residue_bytes = now - began_at, event.residue_bytes
            self._to(r, "asleep", now)
            if wake_wanted:
                self._to(r, "waking", now)
        elif event.untouched:
            self._serve_on(r, event.error, now)
        else:
            self._rung_failed(r, event.error, now)

    def _on_woken(self, r: Replica, event: WakeEnded, began_at: float) -> None:
        now = event.now
        if event.error is not None:
            self._rung_failed(r, event.error, now)
            return
        r.wake_s, r.phases, r.reason = now - began_at, event.phases, None
        self._to(r, "ready", now)

    # -------------------------------------------------------------------------- re-point

    def _repoint(self, r: Replica, command: RepointReplica, now: float) -> None:
        replica_id, spec = r.command.replica_id, command.spec
        if (r.repoint or r.command).spec.launch_key() == spec.launch_key():
            return
        why = self.disabled.get(state.launch_name(spec), {}).get(SHELL)
        if r.phase not in ("ready", "asleep"):
            words = f"is {r.phase}: only a ready or sleeping replica is pointed at another model"
            self._out.append(CommandRefused(f"{replica_id} {words}"))
        elif why:
            words = f"is not pointed at {spec.name} any more: {why}"
            self._out.append(CommandRefused(f"{replica_id} {words}"))
        else:
            r.repoint, r.reason = command, command.reason
            r.deadline = now + command.grace_s
            if r.phase == "ready":
                self._to(r, "draining", now)
            else:
                self._become(r, command, now)

    def _become(self, r: Replica, command: RepointReplica, now: float) -> None:
        """Nothing is in flight: from here on it is the other model's."""
        if r.phase != "asleep":
            r.residue_bytes = 0
        r.command = msgspec.structs.replace(
            r.command, spec=command.spec, reason=command.reason, cause=command.cause
        )
        r.start_s, r.wake_s, r.sleep_s, r.died, r.exit_kind = None, None, None, None, None
        r.phases, r.failures = {}, 0
        self._to(r, "waking", now)

    def _on_repointed(self, r: Replica, event: RepointEnded, began_at: float) -> None:
        if event.error is not None:
            self._shell_failed(r, event.error, event.now)
            return
        r.wake_s, r.phases, r.reason = event.now - began_at, event.phases, None
        r.ready_at = event.now
        self._to(r, "ready", event.now)

    def _rung_failed(self, r: Replica, words: str, now: float, kind: str | None = None) -> None:
        """Start its engine again; the rung is not used again."""
        if r.repoint:
            self._shell_failed(r, words, now, kind)
            return
        if r.sleep is None:
            raise AssertionError(f"{r.command.replica_id}: no sleep in phase {r.phase}")
        name = state.launch_name(r.command.spec)
        self.disabled.setdefault(name, {})[state.rung_name(r.sleep.level)] = words
        self._out.append(SaveDisabled())
        kind = kind or ("sleep_failed" if r.phase == "sleeping" else "wake_failed")
        self._fail(r, kind, words, now)

    def _shell_failed(self, r: Replica, words: str, now: float, kind: str | None = None) -> None:
        """Start an engine of its own for the model; none is pointed at it again."""
        self.disabled.setdefault(state.launch_name(r.command.spec), {})[SHELL] = words
        self._out.append(SaveDisabled())
        r.repoint = None
        self._fail(r, kind or "repoint_failed", words, now)
