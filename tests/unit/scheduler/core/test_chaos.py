"""Random clusters under random faults; tests/sim/test_core_chaos.py has the other seeds."""

from __future__ import annotations

import pytest

from tests.kits.scheduler_chaos import QUICK_SEEDS, live_through


@pytest.mark.parametrize("seed", QUICK_SEEDS)
def test_whatever_happens_the_rules_hold_and_demand_is_met_in_the_end(seed: int) -> None:
    live_through(seed)
