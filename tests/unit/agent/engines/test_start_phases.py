"""The phases of a start, heard from lines as vLLM 0.32 logs them."""

from __future__ import annotations

import pytest

from agent.engines.start_phases import StartLog

API = "(APIServer pid=1) INFO 11-23 16:47:12 [api_utils.py:347]  version 0.32.0\n"
LOAD = "(Worker pid=3) INFO [cpu_model_runner.py:68] Starting to load model /models/tiny...\n"
WEIGHTS = "(Worker pid=3) INFO [default_loader.py:501] Loading weights took 0.01 seconds\n"
LOADED = "(Worker pid=3) INFO [x.py:1] Model loading took 14.25 GiB memory and 2.100000 seconds\n"
WARM_UP = "(Worker pid=3) INFO [cpu_model_runner.py:87] Warming up model for the compilation...\n"
WARM = "(Worker pid=3) INFO [cpu_model_runner.py:91] Warming up done.\n"
COMPILED = "(EngineCore pid=2) INFO [monitor.py:53] torch.compile took 8.50 s in total\n"
TOGETHER = (
    "(EngineCore pid=2) INFO [m.py:5] torch.compile and initial profiling/warmup run together"
    " took 8.50 s in total\n"
)
CAPTURED = "(EngineCore pid=2) INFO [r.py:9] Graph capturing finished in 3 secs, took 0.50 GiB\n"
ENGINE = (
    "(EngineCore pid=2) INFO [core.py:402] init engine (profile, create kv cache, warmup model)"
    " took 29.31 s\n"
)


def heard(*lines: tuple[float, str]) -> StartLog:
    log = StartLog()
    for at, line in lines:
        log.feed(line, at)
    return log


def test_every_phase_ends_with_its_line_and_they_add_up():
    log = heard(
        (111.0, API), (111.5, "INFO: noise\n"), (118.0, LOAD), (119.0, WEIGHTS), (120.0, LOADED),
        (130.0, COMPILED), (134.0, CAPTURED), (135.0, ENGINE), (136.0, API),
    )  # fmt: skip
    phases = log.phases(100.0, 101.0, 137.0)
    assert phases == {
        "fork": 1.0, "import": 10.0, "init": 7.0, "weights": 2.0, "kv": 3.5, "compile": 8.5,
        "graphs": 3.0, "app": 2.0,
    }  # fmt: skip
    assert sum(phases.values()) == 37.0


def test_compiling_on_a_cpu_is_timed_between_its_lines():
    log = heard(
        (1.0, API), (2.0, LOAD), (3.0, WEIGHTS), (4.0, WARM_UP), (34.0, WARM), (35.0, ENGINE)
    )
    phases = log.phases(0.0, 0.5, 36.0)
    assert (phases["compile"], phases["kv"]) == (30.0, 2.0)


@pytest.mark.parametrize("line", [COMPILED, TOGETHER])
def test_what_a_phase_holds_is_never_more_than_the_phase(line):
    log = heard((1.0, API), (2.0, LOAD), (3.0, WEIGHTS), (4.0, line), (5.0, ENGINE))
    assert log.phases(0.0, 0.5, 6.0) == {
        "fork": 0.5, "import": 0.5, "init": 1.0, "weights": 1.0, "compile": 2.0, "app": 1.0,
    }  # fmt: skip


def test_a_line_may_come_in_pieces():
    log = StartLog()
    log.feed(LOAD[:30], 1.0)
    log.feed(LOAD[30:] + WEIGHTS[:10], 2.0)
    log.feed(WEIGHTS[10:], 3.0)
    assert log.phases(0.0, 0.5, 4.0) == {"fork": 0.5, "init": 1.5, "weights": 1.0, "app": 1.0}


def test_an_unknown_log_leaves_all_of_it_to_other():
    log = heard((1.0, "hello\n"), (2.0, "world\n"))
    assert log.phases(0.0, 0.25, 5.0) == {"fork": 0.25, "other": 4.75}


def test_a_line_seen_late_ends_nothing_after_ready():
    log = heard((1.0, API), (2.0, LOAD), (9.0, ENGINE))
    phases = log.phases(0.0, 0.0, 5.0)
    assert sum(phases.values()) == 5.0
    assert "app" not in phases
