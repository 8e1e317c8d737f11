"""Which models' floors change: by their schedules, and by what operators asked. Pure.

Rules this file keeps: wall-clock time comes in as an argument; a floor begins earlier than its time
by what the climb is expected to take, and a margin, since climbs vary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runtime.contract.prewarm import Ask, floor_at
from runtime.wire.names import Floor
from scheduler.policy.ladder import climb_s
from scheduler.policy.warm_value import LEAD
from scheduler.state.cluster import Model


def changed_floors(
    models: Mapping[str, Model], asks: Mapping[str, tuple[Ask, ...]], wall_s: float
) -> Iterator[tuple[str, Floor | None]]:
    """Each model whose floor at unix time `wall_s` is another than it has, and that floor.

    `asks`: of operators, by model. Worked example: a climb of 40 s to be over by 8:00 begins
    1.5 x 40 = 60 s before, at 7:59.
    """
    for name, model in list(models.items()):
        prewarm, wishes = model.spec.prewarm, asks.get(name, ())
        if not (wishes or prewarm.min_warm or prewarm.schedule or model.floor):
            continue
        floor = floor_at(prewarm, wishes, wall_s, LEAD * climb_s(model, 0))
        if floor != model.floor:
            yield name, floor
