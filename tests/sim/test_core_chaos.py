"""Random clusters under random faults, but for the seeds of the quick tests."""

from __future__ import annotations

import pytest

from tests.kits.scheduler_chaos import OTHER_SEEDS, live_through


@pytest.mark.parametrize("seed", OTHER_SEEDS)
def test_whatever_happens_the_rules_hold_and_demand_is_met_in_the_end(seed: int) -> None:
    live_through(seed)
