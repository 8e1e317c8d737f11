"""Cells of the family in a file: asked for by words, run once, gone on with after an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.lib.family_runs import (
    Cell,
    Mistake,
    Variant,
    cells,
    check_name,
    parse_settings,
    read,
    run_all,
    variants,
)


def fake(cell: Cell) -> dict[str, Any]:
    """A cell's line without a simulation; run in another process, so it can't count calls."""
    return {
        "workload": cell.workload, "policy": cell.variant.label, "seed": cell.seed,
        "settings": cell.settings, "mean_s": 1.0, "p99_s": 2.0, "unanswered": 0, "cpu_s": 0.0,
    }  # fmt: skip


def wanted(runs: int, *labels: str) -> list[Cell]:
    return cells(["f1", "f2"], [Variant(label, "ours") for label in labels], runs, {})


def test_cells_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    run_all(wanted(1, "ours"), out, 1, fake)
    first = out.read_text()
    assert [c["workload"] for c in read(out)] == ["f1", "f2"]
    run_all(wanted(2, "ours", "lru"), out, 1, fake)
    assert out.read_text().startswith(first)
    keys = [(c["workload"], c["policy"], c["seed"]) for c in read(out)]
    assert len(keys) == len(set(keys)) == 8


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    run_all(wanted(1, "ours"), out, 1, fake)
    out.write_text(out.read_text()[:-20])
    assert len(read(out)) == 1
    run_all(wanted(1, "ours"), out, 1, fake)
    assert sorted(c["workload"] for c in read(out)) == ["f1", "f2"]


def test_other_settings_under_a_label_that_is_there_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    run_all(wanted(1, "ours"), out, 1, fake)
    other = cells(["f1"], [Variant("ours", "ours", {"stand_by": True})], 1, {})
    with pytest.raises(Mistake, match="another label"):
        run_all(other, out, 1, fake)


def test_the_first_seed_of_all_workloads_comes_first() -> None:
    assert [cell.seed for cell in wanted(2, "a", "b")] == [1, 1, 1, 1, 2, 2, 2, 2]


def test_variants_get_settings_of_the_core_and_of_specs() -> None:
    found = variants("lru,ours", "min_dwell_s=3", ["ours-sb:stand_by=true,spec.forecast=off"])
    lru, ours, stand_by = found
    assert [one.label for one in found] == ["lru", "ours", "ours-sb"]
    assert lru.settings == {}
    assert ours.contender().settings == {"min_dwell_s": 3}
    assert stand_by.contender().settings == {"min_dwell_s": 3, "stand_by": True}
    assert stand_by.contender().spec == {"forecast": "off"}


@pytest.mark.parametrize(
    ("policies", "more", "says"),
    [
        ("lru,mine", [], "there is no policy 'mine'"),
        ("lru", ["stand_by=true"], "is not LABEL"),
        ("lru", ["a:stand_bye=true"], "is not a setting of this tree"),
        ("ours", ["ours:stand_by=true"], "two policies are called 'ours'"),
    ],
)
def test_what_can_not_be_run_is_told(policies: str, more: list[str], says: str) -> None:
    with pytest.raises(Mistake, match=says):
        variants(policies, None, more)


def test_a_workload_that_is_not_there_is_told() -> None:
    check_name("f17")
    check_name("arena-4")
    with pytest.raises(Mistake, match="there is no workload 'f'"):
        check_name("f")


def test_values_are_json_or_words() -> None:
    found = parse_settings("stand_by=false,min_dwell_s=2.5,spec.sleep=off")
    assert found == {"stand_by": False, "min_dwell_s": 2.5, "spec.sleep": "off"}
    assert json.dumps(found)
