"""The arithmetic of the family's table, on cells written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.lib.family_table import Named, Results, against, by_workload, table


def cell(
    workload: str, policy: str, mean_s: float, p99_s: float, seed: int = 1, unanswered: int = 0
) -> dict[str, Any]:
    return {
        "workload": workload, "policy": policy, "seed": seed, "mean_s": mean_s, "p99_s": p99_s,
        "unanswered": unanswered, "violations": 1 if unanswered else 0, "traits": {"gpus": 4},
    }  # fmt: skip


CELLS = [
    cell("f1", "lru", 4.0, 40.0), cell("f1", "gdsf", 2.0, 60.0), cell("f1", "belady", 1.0, 20.0),
    cell("f1", "ours", 1.0, 20.0),
    cell("f2", "lru", 1.0, 10.0), cell("f2", "gdsf", 2.0, 20.0), cell("f2", "belady", 2.0, 10.0),
    cell("f2", "ours", 2.0, 10.0, unanswered=3),
]  # fmt: skip


def rows(text: str) -> dict[str, list[str]]:
    """The table's cells by the policy's label."""
    found = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {row[0]: row[1:] for row in found}


def test_a_row_has_ratios_to_the_best_simple_baseline_of_each_workload() -> None:
    (n, *mean), (*p99,), *_ = _ours(table([Named("", Results(CELLS))]))
    assert n == "2"
    assert mean == ["1.25", "1.00", "2.00", "50 %"]  # 1.0 / 2.0 and 2.0 / 1.0
    assert p99 == ["0.75", "0.71", "1.00", "100 %"]  # 20 / 40 and 10 / 10


def test_a_row_has_the_bound_what_was_unanswered_and_violations() -> None:
    *_, (bound, within), _, (unanswered, more, violations) = _ours(
        table([Named("", Results(CELLS))])
    )
    assert (bound, within) == ("1.00", "100 %")
    assert (unanswered, more, violations) == ("3", "1", "1")


def _ours(text: str, label: str = "ours") -> list[list[str]]:
    row = rows(text)[label]
    return [row[:5], row[5:9], row[9:11], row[11:13], row[13:]]


def test_a_baseline_is_compared_with_the_best_of_the_others() -> None:
    ratios = against(Results(CELLS), "lru", [(Results(CELLS), "gdsf")])
    assert [(one.workload, one.mean) for one in ratios] == [("f1", 2.0), ("f2", 0.5)]
    assert rows(table([Named("", Results(CELLS))]))["lru"][1] == "1.25"


def test_of_several_seeds_the_median_counts_and_only_of_seeds_that_all_have() -> None:
    lines = [cell("f1", "lru", 1.0, 1.0, seed) for seed in (1, 2, 3)]
    lines += [cell("f1", "ours", mean_s, 1.0, seed) for seed, mean_s in enumerate((1, 9, 3), 1)]
    lines += [cell("f1", "ours", 99.0, 1.0, seed=4)]
    (one,) = against(Results(lines), "ours", [(Results(lines), "lru")])
    assert one.mean == 3.0


def test_a_workload_that_a_baseline_has_not_run_does_not_count() -> None:
    lines = [*CELLS, cell("f3", "lru", 1.0, 1.0), cell("f3", "ours", 9.0, 9.0)]
    assert rows(table([Named("", Results(lines))]))["ours"][0] == "2"


def test_two_trees_are_compared_policy_by_policy() -> None:
    new = [cell("f1", "ours", 0.5, 10.0), cell("f2", "ours", 1.0, 5.0)]
    found = rows(table([Named("base", Results(CELLS)), Named("new", Results(new))]))
    assert found["new:ours"][0] == "2"  # by the baselines of the first tree: it has none itself
    assert found["new:ours"][1] == "0.62"
    assert found["new:ours"][11:13] == ["0.50", "0.50"]
    assert found["base:ours"][11:13] == ["", ""]


def test_every_policy_is_compared_with_the_one_that_is_named() -> None:
    found = rows(table([Named("", Results(CELLS))], compare="gdsf"))
    assert found["ours"][11:13] == ["0.75", "0.71"]
    assert found["gdsf"][11:13] == ["", ""]


def test_workloads_are_listed_in_the_order_of_their_numbers() -> None:
    lines = [cell(name, "lru", 1.0, 1.0) for name in ("f10", "f9", "arena-4")]
    text = by_workload([Named("", Results(lines))])
    assert [line.split(":")[0] for line in text.splitlines()[::2]] == ["arena-4", "f9", "f10"]
    assert "lru 1.00 / 1.0" in text


@pytest.mark.parametrize("lines", [[], CELLS[:1]])
def test_a_file_without_enough_cells_is_a_table_without_ratios(lines: list[dict[str, Any]]) -> None:
    assert all(row[0] == "0" for row in rows(table([Named("", Results(lines))])).values())
