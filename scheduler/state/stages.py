"""The stages of a replica's life as the scheduler sees it, and which may follow which. Pure.

Rules this file keeps:
- `Replica.move` refuses what is in neither table;
- EDGES is what the scheduler decides and what it then expects to hear; docs/states.md says when;
- FOUND is what an agent's word may bring besides: the scheduler is level-triggered, so a heartbeat
  that was lost, or a leader before this one, may have left a replica anywhere.
"""

from __future__ import annotations

import enum


class Stage(enum.StrEnum):
    """Where a replica is in its life."""

    PLANNED = "planned"  # committed; waits for room or for its turn
    SENT = "sent"  # its agent was told to start it
    STARTING = "starting"
    READY = "ready"
    # asleep; committed to wake as soon as its memory is free; or idle, and to be pointed at another
    # model as soon as no router sends it requests
    RISING = "rising"
    WAKING = "waking"  # its agent was told to wake it
    ASLEEP = "asleep"
    SLEEPING = "sleeping"  # its agent was told to put it to sleep
    UNROUTING = "unrouting"  # out of the table; routers have not all confirmed yet
    STOPPING = "stopping"  # its agent was told to stop it
    BACKOFF = "backoff"  # it died; its agent will start it again
    UNKNOWN = "unknown"  # its node is lost


# On the way down: to nothing, or to sleep.
LEAVING = frozenset({Stage.UNROUTING, Stage.STOPPING, Stage.SLEEPING})
# Those that serve or will, without the scheduler deciding anything more.
COMING = frozenset(
    {
        Stage.PLANNED, Stage.SENT, Stage.STARTING, Stage.READY, Stage.BACKOFF,
        Stage.RISING, Stage.WAKING,
    }
)  # fmt: skip
# Their memory moves; how many may at once on a device: scheduler/policy/device_turns.py.
BUSY = frozenset({Stage.SENT, Stage.STARTING, Stage.WAKING})
# Committed, but its agent was not told yet.
PLANS = frozenset({Stage.PLANNED, Stage.RISING})

# What an agent may say that a replica does, as stages.
SAID = frozenset(
    {
        Stage.STARTING, Stage.READY, Stage.BACKOFF, Stage.SLEEPING, Stage.ASLEEP, Stage.WAKING,
        Stage.STOPPING,
    }
)  # fmt: skip

# stage -> the stages that may follow it (None: forgotten)
EDGES: dict[Stage, frozenset[Stage | None]] = {
    Stage.PLANNED: frozenset({Stage.SENT, None}),
    Stage.SENT: frozenset({Stage.STARTING, Stage.READY, Stage.STOPPING, Stage.UNKNOWN}),
    Stage.STARTING: frozenset({Stage.READY, Stage.BACKOFF, Stage.STOPPING, Stage.UNKNOWN}),
    Stage.READY: frozenset(
        {
            Stage.UNROUTING,
            Stage.BACKOFF,
            Stage.STARTING,
            Stage.STOPPING,
            Stage.UNKNOWN,
            Stage.RISING,
        }
    ),
    Stage.UNROUTING: frozenset({Stage.SLEEPING, Stage.STOPPING}),
    Stage.SLEEPING: frozenset({Stage.ASLEEP, Stage.READY, Stage.STOPPING}),
    Stage.ASLEEP: frozenset({Stage.RISING, Stage.STOPPING, Stage.UNKNOWN}),
    Stage.RISING: frozenset(
        {Stage.WAKING, Stage.ASLEEP, Stage.READY, Stage.STOPPING, Stage.UNKNOWN}
    ),
    Stage.WAKING: frozenset(
        {
            Stage.READY,
            Stage.BACKOFF,
            Stage.STARTING,
            Stage.STOPPING,
            Stage.UNKNOWN,
        }
    ),
    Stage.STOPPING: frozenset({None}),
    Stage.BACKOFF: frozenset({Stage.STARTING, Stage.READY, Stage.STOPPING, Stage.UNKNOWN}),
    Stage.UNKNOWN: SAID | {Stage.SENT, None},
}
_OPEN = SAID | {None}
_LEFT_OUT: dict[Stage, frozenset[Stage | None]] = {
    **dict.fromkeys(LEAVING, SAID),  # what the scheduler has begun to move it goes on to move
    Stage.WAKING: frozenset({Stage.ASLEEP}),  # its agent has not begun yet: it is told again
}
# The same: what else an agent's word may bring. One that has a replica no more is always believed.
FOUND: dict[Stage, frozenset[Stage | None]] = {
    stage: _OPEN - _LEFT_OUT.get(stage, frozenset()) - edges - {stage}
    for stage, edges in EDGES.items()
}
