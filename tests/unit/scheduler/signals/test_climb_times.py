"""Seconds of climbs, pooled over models."""

from __future__ import annotations

from random import Random

import pytest

from scheduler.signals.climb_times import LEAST_BESIDE, PRIOR_SLOWDOWN, ClimbTimes

GB = 10**9


def learned(*pairs: tuple[float, float], kind: str = "nvml") -> ClimbTimes:
    """`pairs`: (GB, seconds) of starts from the disk, without company."""
    times = ClimbTimes()
    for weights_gb, seconds in pairs:
        times.learn(kind, "start-cached", int(weights_gb * GB), seconds, False)
    return times


def test_the_worked_example() -> None:
    times = learned((10, 10), (20, 12), (30, 14), (20, 60))
    assert times.expect_s("start-cached", 15 * GB) == pytest.approx(11.0)


def test_too_few_say_nothing_and_another_step_or_kind_neither() -> None:
    assert learned((10, 10), (20, 12)).expect_s("start-cached", GB) is None
    times = learned((10, 10), (20, 12), (30, 14))
    assert times.expect_s("wake-2", GB) is None
    assert times.expect_s("start-cached", GB, "cpu") is None


def test_models_of_one_size_are_expected_to_take_their_median() -> None:
    times = learned((16, 20), (16, 30), (16, 22))
    assert times.expect_s("start-cached", 16 * GB) == pytest.approx(22.0)


def test_smaller_weights_never_take_longer_and_no_climb_takes_nothing() -> None:
    falling = learned((10, 30), (20, 20), (30, 10))
    assert falling.expect_s("start-cached", 40 * GB) == falling.expect_s("start-cached", GB)
    steep = learned((10, 10), (20, 20), (30, 30))
    assert steep.expect_s("start-cached", 0) == pytest.approx(5.0)


def test_the_error_of_its_expectations() -> None:
    """Starts of 15 s and 0.3 s a GB, each up to a quarter off and one in ten three times as long:
    the median error stays below 15 %, where the prior is off by more than half."""
    random, times = Random(7), ClimbTimes()
    errors, prior = [], []
    for _ in range(300):
        weights = random.choice([1, 3, 6, 16, 28, 64]) * GB
        true = (15 + 0.3 * weights / GB) * random.uniform(0.8, 1.25)
        if random.random() < 0.1:
            true *= 3
        expected = times.expect_s("start-cached", weights)
        if expected is not None:
            errors.append(abs(expected - true) / true)
            prior.append(abs(45 + weights / GB / 2 - true) / true)
        times.learn("nvml", "start-cached", weights, true, False)
    assert sorted(errors)[len(errors) // 2] < 0.15
    assert sorted(prior)[len(prior) // 2] > 0.5


def test_company_is_a_prior_until_it_was_measured() -> None:
    times = learned(*((16, 20.0) for _ in range(12)))
    assert times.slowdown("nvml") == PRIOR_SLOWDOWN["nvml"]
    for _ in range(LEAST_BESIDE):
        times.learn("nvml", "start-cached", 16 * GB, 32.0, True)
    assert times.slowdown("nvml") == pytest.approx(1.6)
    assert times.slowdown("simulated") == 1.0


def test_company_never_makes_quicker() -> None:
    times = learned(*((16, 20.0) for _ in range(12)))
    for _ in range(LEAST_BESIDE):
        times.learn("nvml", "start-cached", 16 * GB, 10.0, True)
    assert times.slowdown("nvml") == 1.0
