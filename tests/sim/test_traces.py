"""Traces and generators: what they read, and that the rates come out."""

from __future__ import annotations

import gzip
import itertools
import statistics
from pathlib import Path
from random import Random

import pytest

from scheduler.sim import trace_files, traces
from tests.kits.azure_trace import AZURE

MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}
{"timestamp": 2500, "input_length": 7322, "output_length": 490, "hash_ids": [0]}
"""
FUNCTIONS = """app,func,end_timestamp,duration
a,f,10.5,0.5
a,f,20.0,1.0
b,g,30.0,30.0
"""
SERVEGEN = """model,client,start_s,rate_rps,cv,dist,p1,p2
m-large,0,0,2.0,3.0,Weibull,0.5,0.25
m-large,0,600,4.0,1.0,Gamma,1.0,0.25
m-small,7,600,1.0,2.0,Gamma,0.25,4.0
m-small,7,90000,1.0,2.0,Gamma,0.25,4.0
"""


def test_azure_llm_times_count_from_the_first_row() -> None:
    assert traces.azure_llm(AZURE.splitlines()) == [
        (0.0, 4808, 10), (0.5, 3180, 8), (6.0, 110, 27)
    ]  # fmt: skip


def test_mooncake_times_are_milliseconds() -> None:
    calls = traces.mooncake(MOONCAKE.splitlines())
    assert calls == [(0.0, 6758, 500), (2.5, 7322, 490)]


def test_a_functions_call_begins_its_duration_before_its_end() -> None:
    assert traces.azure_functions(FUNCTIONS.splitlines()) == {"f": [10.0, 19.0], "g": [0.0]}


def test_servegen_takes_the_windows_of_the_part_that_is_asked_for() -> None:
    rates = traces.servegen(SERVEGEN.splitlines(), 600.0, 600.0)
    assert [(r.client, r.start_s, r.rate) for r in rates] == [
        ("m-large-0", 0.0, 4.0), ("m-small-7", 0.0, 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (traces.azure_llm, AZURE + "2023-11-16 18:17:10,x,1\n", "line 5"),
        (traces.azure_llm, FUNCTIONS, "TIMESTAMP"),
        (traces.mooncake, MOONCAKE + "{}\n", "line 3"),
        (traces.azure_functions, FUNCTIONS + "a,f,soon,1\n", "line 5"),
        (lambda lines: traces.servegen(lines, 0, 600), SERVEGEN.replace("Gamma", "Zipf"), "Zipf"),
    ],
)
def test_what_cannot_be_read_is_named(read, text: str, words: str) -> None:
    if words == "Zipf":
        text = text.replace(",600,", ",0,")
    with pytest.raises(ValueError, match=words):
        read(text.splitlines())


def test_a_burst_stays_with_one_model_and_a_scale_drops_whole_bursts() -> None:
    calls = [traces.Call(10.0 * burst + 0.1 * i, 10, 1) for burst in range(400) for i in range(5)]
    load = traces.split_bursts(calls, 20, Random(1), duration_s=4000.0, rate_scale=0.5)
    bursts: dict[int, set[str]] = {}
    for arrival in load.arrivals:
        bursts.setdefault(int(arrival.at_s / 10), set()).add(arrival.model)
    assert all(len(models) == 1 for models in bursts.values())
    assert len(load.arrivals) == 5 * len(bursts)
    assert len(bursts) == pytest.approx(200, abs=40)


def test_more_models_than_functions_turn_the_patterns() -> None:
    calls = traces.azure_functions(FUNCTIONS.splitlines())
    load = traces.from_functions(calls, 5, Random(1), duration_s=200.0)
    by_model = {name: [a.at_s for a in load.arrivals if a.model == name] for name in load.models}
    assert all(by_model.values())
    assert by_model["m0"][:2] == [10.0, 19.0]  # f, as recorded; after 20 s it begins again
    assert by_model["m0"][2] == pytest.approx(30.0)
    assert by_model["m2"] != by_model["m0"]


@pytest.mark.parametrize("dist", ["Gamma", "Weibull"])
def test_servegen_rates_come_out(dist: str) -> None:
    rates = [traces.Rate("c", 600.0 * i, 2.0, dist, 0.6) for i in range(50)]
    load = traces.from_servegen(rates, Random(3), duration_s=30_000.0, rate_scale=0.5)
    assert len(load.arrivals) / 30_000 == pytest.approx(1.0, rel=0.06)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_generated_gaps_have_their_rate_and_their_variation(cv: float) -> None:
    load = traces.generate(1, 2.0, Random(5), duration_s=40_000.0, cv=cv)
    times = [a.at_s for a in load.arrivals]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.15)


def test_popularity_is_a_power_law() -> None:
    assert traces.popularity(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_a_diurnal_load_has_a_trough_in_each_models_own_day() -> None:
    load = traces.generate(1, 5.0, Random(2), duration_s=10_000.0, diurnal=1.0, day_s=10_000.0)
    tenths = [0] * 10
    for arrival in load.arrivals:
        tenths[int(arrival.at_s / 1000)] += 1
    assert max(tenths) > 8 * max(1, min(tenths))
    assert len(load.arrivals) == pytest.approx(25_000, rel=0.1)


def test_a_file_is_recognised_and_unpacked(tmp_path: Path) -> None:
    packed = tmp_path / "rates.csv.gz"
    packed.write_bytes(gzip.compress(SERVEGEN.encode()))
    assert trace_files.guess(packed) == "servegen"
    load = trace_files.load(packed, "servegen", Random(1), duration_s=1200.0)
    assert load.models == ("m-large-0", "m-small-7")
    unknown = tmp_path / "x.csv"
    unknown.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="name its format"):
        trace_files.guess(unknown)
    with pytest.raises(ValueError, match=r"x\.csv"):
        trace_files.load(unknown, "azure-llm", Random(1), duration_s=10.0)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    one, other = (traces.generate(20, 3.0, Random(7), duration_s=600.0, cv=2.0) for _ in range(2))
    assert one == other
    assert one != traces.generate(20, 3.0, Random(8), duration_s=600.0, cv=2.0)
