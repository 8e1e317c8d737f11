"""The family of random workloads: the same for a seed at any time, and within what it says."""

from __future__ import annotations

import pytest

from bench.policies import family, special
from bench.policies.workloads import working_set

SEEDS = [1, 2, 203, 204, 212]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_workload_is_within_the_stated_ranges(seed: int) -> None:
    one = family.draw(seed)
    case = one.case
    assert 10 <= len(case.sizes) <= 300
    assert len(case.workload.models) == len(case.sizes) == len(one.architectures)
    assert 2 <= case.gpus <= 32
    assert case.gpus % one.node_gpus == 0
    assert one.node_gpus in (2, 4, 8)
    assert all(devices <= one.node_gpus for _, devices in case.sizes)
    assert 256 <= one.host_gib <= 1536
    times = [a.at_s for a in case.workload.arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < case.workload.duration_s
    assert sum(at >= case.warm_s for at in times) >= family.LEAST_CALLS
    assert {a.model for a in case.workload.arrivals} <= set(case.workload.models)
    assert min(min(a.prompt_tokens, a.output_tokens) for a in case.workload.arrivals) >= 1


def test_the_same_seed_gives_the_same_workload_and_another_one_another() -> None:
    assert family.draw(204) == family.draw(204)
    assert family.draw(204).case != family.draw(205).case


def test_the_random_draws_are_those_of_the_first_figures() -> None:
    """Figures are compared over months: seed 203 names this workload, whatever is changed."""
    one = family.draw(203)
    assert one.traits == {
        "models": 20, "gpus": 2, "node": 2, "host": 1024, "mix": "bimodal", "over": 2.7,
        "zipf": 1.44, "cv": 6.8, "day": True, "shift": 493, "bursts": 0, "kind": "chat",
        "ws": 0.53, "requests": 831, "disk": "all", "hostshare": 0.29,
    }  # fmt: skip
    first = one.case.workload.arrivals[0]
    assert (first.model, first.prompt_tokens, first.output_tokens) == ("m006", 269, 85)


def test_the_load_is_what_was_drawn_where_the_rate_can_give_it() -> None:
    loads = [working_set(family.draw(seed).case, family.KEEP_S) for seed in SEEDS]
    assert all(0.1 < load < 2.2 for load in loads)


@pytest.mark.parametrize("name", special.NAMES)
def test_a_named_workload_is_drawn_alike_each_time(name: str) -> None:
    one = special.drawn(name)
    assert one == special.drawn(name)
    assert one.name == name
    times = [a.at_s for a in one.case.workload.arrivals]
    assert times == sorted(times)


def test_the_share_of_tunes_changes_the_architectures_only() -> None:
    few, many = special.drawn("tunes-0-30"), special.drawn("tunes-0-90")
    assert few.case.workload == many.case.workload
    assert few.case.sizes == many.case.sizes
    tuned = [sum(not a.startswith("own") for a in one.architectures) for one in (few, many)]
    assert tuned == [24, 72]
    assert {a for a in many.architectures if not a.startswith("own")} == {"a8", "a3", "a14"}
