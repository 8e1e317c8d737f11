"""Which load format a start gets, what is learnt of it, and what is not risked."""

from __future__ import annotations

import sys

import msgspec
import pytest

from agent.metrics import Metrics
from agent.records import Records
from agent.weights.load_format_policy import (
    MODULES,
    WORTH_S,
    Choice,
    Known,
    begun,
    choose,
    failed,
    measured,
    usable,
)
from agent.weights.load_formats import LoadFormats, importable
from runtime.wire.model_spec import ModelSpec

ALL = ("auto", "fastsafetensors", "runai_streamer")
MODULE_NAMES = tuple(MODULES.values())
SLOW = WORTH_S * 4


def known(**seconds):
    return Known(seconds={f"{name}/cached": tuple(times) for name, times in seconds.items()})


@pytest.mark.parametrize(
    ("kind", "modules", "files", "parallel", "expected"),
    [
        ("nvml", MODULE_NAMES, ["model.safetensors"], 1, ALL),
        ("nvml", (), ["model.safetensors"], 1, ("auto",)),
        ("cpu", MODULE_NAMES, ["model.safetensors"], 1, ("auto", "runai_streamer")),
        ("nvml", MODULE_NAMES, ["pytorch_model.bin"], 1, ("auto",)),
        ("nvml", (), ["model-rank-0-part-0.safetensors"], 1, ("auto",)),
        ("nvml", (), [f"model-rank-{i}-part-0.safetensors" for i in (0, 1)], 2,
         ("auto", "sharded_state")),
        ("nvml", (), ["model-rank-0-part-0.safetensors"], 2, ("auto",)),
    ],
)  # fmt: skip
def test_what_can_work_here(kind, modules, files, parallel, expected):
    assert usable(kind, modules, files, parallel) == expected


def test_the_specs_own_wins():
    assert choose(known(auto=(SLOW, SLOW)), ALL, "cached", "dummy") == Choice(None, "override")


@pytest.mark.parametrize(
    "seen", [known(), known(auto=(SLOW,)), known(auto=(WORTH_S - 1, WORTH_S - 1))]
)
def test_nothing_is_tried_before_it_is_worth_it(seen):
    assert choose(seen, ALL, "cached", None) == Choice("auto", "default")


def test_each_alternative_is_tried_once_and_then_the_fastest_is_used():
    seen, chosen = known(auto=(40.0, 38.0)), []
    for took_s in (12.0, 20.0, 13.0, 12.0):
        choice = choose(seen, ALL, "cached", None)
        chosen.append((choice.format, choice.why))
        seen = measured(begun(seen, choice), choice.format, "cached", took_s)
    assert chosen == [
        ("fastsafetensors", "trial"),
        ("runai_streamer", "trial"),
        ("fastsafetensors", "fastest"),
        ("fastsafetensors", "fastest"),
    ]


def test_a_trial_that_was_never_measured_is_not_repeated():
    seen = known(auto=(SLOW, SLOW))
    for _ in ALL[1:]:
        seen = begun(seen, choose(seen, ALL, "cached", None))
    assert choose(seen, ALL, "cached", None) == Choice("auto", "fastest")


def test_one_that_failed_is_not_used_again():
    seen = failed(known(auto=(SLOW, SLOW)), "fastsafetensors", "no such symbol")
    assert choose(seen, ALL, "cached", None).format == "runai_streamer"


def test_one_that_became_slow_gives_way_to_the_default():
    seen = Known(
        seconds={"auto/cached": (SLOW, SLOW), "fastsafetensors/cached": (1.0, 99.0, 99.0)},
        tried=ALL[1:],
    )
    assert choose(seen, ALL, "cached", None) == Choice("auto", "fastest")


def test_loads_from_the_page_cache_say_nothing_of_loads_from_the_disk():
    seen = measured(measured(Known(), "auto", "staged", SLOW), "auto", "staged", SLOW)
    assert choose(seen, ALL, "staged", None).why == "trial"
    assert choose(seen, ALL, "cached", None).why == "default"


def test_only_the_last_measurements_count():
    seen = Known()
    for took_s in range(9):
        seen = measured(seen, "auto", "cached", float(took_s))
    assert seen.seconds == {"auto/cached": (4.0, 5.0, 6.0, 7.0, 8.0)}


# ------------------------------------------------------------------------------ the node's memory


FILES = ("config.json", "model.safetensors")


def spec(**engine_args):
    return ModelSpec(name="m", source="m", device_memory_bytes=1, engine_args=engine_args)


def open_formats(records):
    formats = LoadFormats("nvml", records.load_formats(), records.save_load_formats, Metrics())
    formats.modules = MODULE_NAMES
    return formats


def test_what_was_measured_outlives_the_agent(tmp_path):
    for _ in range(2):
        records = Records(str(tmp_path / "state"))
        formats = open_formats(records)
        assert formats.choose("r-1", spec(), FILES, "cached") is None
        formats.measured("r-1", SLOW)
        records.close()
    records = Records(str(tmp_path / "state"))
    formats = open_formats(records)
    assert formats.choose("r-2", spec(), FILES, "cached") == "fastsafetensors"
    assert formats.failed("r-2", "no such symbol")
    assert formats.choose("r-3", spec(), FILES, "cached") == "runai_streamer"
    assert formats.choose("r-4", spec(**{"load-format": "dummy"}), FILES, "cached") is None
    assert not formats.failed("r-4", "it is the spec's own")
    records.close()
    text = (tmp_path / "state" / "load-formats.json").read_bytes()
    (kept,) = msgspec.json.decode(text)["launches"].values()
    assert kept["failed"] == {"fastsafetensors": "no such symbol"}


def test_a_stub_loads_nothing(tmp_path):
    records = Records(str(tmp_path / "state"))
    stub = msgspec.structs.replace(spec(), engine="stub")
    assert open_formats(records).choose("r", stub, FILES, "cached") is None
    records.close()


def test_modules_are_looked_for_in_the_engines_interpreter(tmp_path):
    (tmp_path / "fastsafetensors.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert importable(str(python)) == ("fastsafetensors",)
    assert importable(str(tmp_path / "none")) == ()
