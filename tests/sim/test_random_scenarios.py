"""Random clusters under random faults, over the production cores: `make sim` runs far more."""

from __future__ import annotations

import time

from cli.simulation import make_node
from scheduler.sim.rule_checker import Violation
from scheduler.sim.scenarios import run_random

BUDGET_S = 45.0
LEAST = 20


def test_whatever_happens_the_rules_hold_and_demand_is_met_in_the_end() -> None:
    """As many seeds as fit into the time, but a few at least."""
    began, seed = time.monotonic(), 0
    while seed < LEAST or time.monotonic() - began < BUDGET_S:
        try:
            run_random(seed, make_node)
        except Violation as violation:
            raise AssertionError(
                f"{violation}\nreplay: stoker simulate --scenario random --seed {seed}"
            ) from violation
        seed += 1
    print(f"{seed} scenarios")


def test_a_start_that_is_done_may_go_while_its_leader_has_not_heard_of_it() -> None:
    """Seed 20415: nobody waits for it any more, and messages are slow."""
    run_random(20415, make_node)
