"""One seed, one run: every decision and every figure, in any process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from cli.simulation import make_node
from scheduler.sim.scenarios import run_random

SCRIPT = """
import sys
from tests.sim.test_determinism import digest
for seed in map(int, sys.argv[1:]):
    print(digest(seed))
"""


def digest(seed: int) -> str:
    """Of the whole decision log, the TTFTs and the outcomes of a random scenario."""
    report = run_random(seed, make_node)
    assert report.decisions
    told = "\n".join([*report.log(), repr(report.ttft), repr(report.outcomes), repr(report.events)])
    return hashlib.sha256(told.encode()).hexdigest()


def test_two_runs_of_a_seed_decide_the_same_and_two_seeds_do_not() -> None:
    assert digest(5) == digest(5) != digest(6)


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_the_order_of_sets_decides_nothing(hash_seed: str) -> None:
    seeds = [5, 9, 14]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, seeds)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [digest(seed) for seed in seeds]
