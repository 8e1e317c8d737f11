"""The diagrams of docs/states.md are what the transition tables say."""

from __future__ import annotations

import pytest

from scheduler.state import stages
from scripts.state_diagrams import TABLES, current, diagram
from tests.unit.docs import mermaid
from tests.unit.docs.pages import text

PAGE = text("docs/states.md")


def test_the_page_has_a_diagram_of_each_table() -> None:
    assert len(mermaid.diagrams(PAGE)) == len(TABLES)
    assert all(f"<!-- states: {name} -->" in PAGE for name in TABLES)


def test_the_diagrams_are_current() -> None:
    assert current(PAGE) == PAGE, "run `make states`"


@pytest.mark.parametrize("name", TABLES)
def test_a_diagram_has_each_transition_once_and_no_other(name: str) -> None:
    first, table = TABLES[name]
    drawn = list(mermaid.edges(diagram(first, table)))
    told = {(state, other or "[*]") for state, following in table.items() for other in following}
    assert sorted(drawn) == sorted({("[*]", first)} | told)


def test_a_diagram_that_is_out_of_date_is_found() -> None:
    for old in (PAGE.replace("draining --> ready\n", ""), PAGE.replace("--> ready", "--> asleep")):
        assert old != PAGE
        assert current(old) == PAGE


def test_what_the_scheduler_s_diagram_leaves_out_is_what_the_page_says() -> None:
    left_out = {a for a, following in stages.EDGES.items() if "unknown" not in following}
    assert left_out == stages.LEAVING | {"planned", "unknown"}
    assert "unknown" not in dict(mermaid.edges(diagram(*TABLES["scheduler"])))
