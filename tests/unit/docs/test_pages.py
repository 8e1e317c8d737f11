"""Files and definitions that pages name exist; diagrams can be drawn; lines are short."""

from __future__ import annotations

import re

import pytest

from tests.kits.checkout import ROOT
from tests.unit.docs import mermaid
from tests.unit.docs.pages import PAGES, defines, links, named, text


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_what_a_page_names_is_there(page: str) -> None:
    for path, name in named(page):
        assert (ROOT / path).exists(), f"{page}: there is no {path}"
        if name:
            assert defines((ROOT / path).read_text("utf-8"), name), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page: str) -> None:
    for link in links(page):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: there is no {link}"


def test_pages_do_name_files_and_have_links() -> None:
    """Else the two tests above pass for a pattern that finds nothing."""
    assert sum(len(list(named(page))) for page in PAGES) > 200
    assert sum(len(links(page)) for page in PAGES) > 40


def test_the_journey_names_a_file_at_each_step() -> None:
    steps = re.split(r"\n(?=\d+\. )", text("docs/journey.md"))[1:]
    assert len(steps) > 25
    for step in steps:
        assert re.search(r"`\w+/[\w/]+\.py", step), f"names no file: {step.splitlines()[0]}"


def test_the_journey_has_a_diagram_for_each_of_its_three_parts() -> None:
    assert len(mermaid.diagrams(text("docs/journey.md"))) == 3


@pytest.mark.parametrize("page", [page for page in PAGES if mermaid.diagrams(text(page))])
def test_diagrams_can_be_drawn(page: str) -> None:
    for diagram in mermaid.diagrams(text(page)):
        mermaid.check(diagram)


@pytest.mark.parametrize(
    "lines",
    [
        "sequenceDiagram",
        "flowchart TD\na --> b",
        "sequenceDiagram\nparticipant A\nA->>B: a message to nobody",
        "sequenceDiagram\nparticipant A\nA=>A: an arrow of its own kind",
        "sequenceDiagram\nparticipant A\nA->>A: one; two",
        "sequenceDiagram\nparticipant A\nloop forever\nA->>A: hello",
        "sequenceDiagram\nparticipant A\nA->>A: hello\nend",
        "stateDiagram-v2\na -> b",
        "stateDiagram-v2\na --> b : c : d",
    ],
)
def test_a_diagram_that_can_not_be_drawn_is_found(lines: str) -> None:
    with pytest.raises(mermaid.Malformed):
        mermaid.check(lines)


def test_a_definition_that_is_not_there_is_found() -> None:
    source = "A: int = 1\nB = 2\nclass C:\n    def d(self): ...\nasync def e(): ..."
    assert all(defines(source, name) for name in ("A", "B", "C", "C.d", "e"))
    assert not any(defines(source, name) for name in ("d", "C.e", "F", "A.b"))


CHECKLISTS = re.split(r"\n### ", text("CONTRIBUTING.md").partition("## Checklists")[2])[1:]


@pytest.mark.parametrize("checklist", CHECKLISTS, ids=lambda words: words.splitlines()[0])
def test_a_checklist_names_files_and_tests(checklist: str) -> None:
    files = re.findall(r"`(\w+/[\w/.]+)[`:]", checklist)
    assert any(file.startswith("tests/") for file in files)
    assert len([file for file in files if not file.startswith("tests/")]) >= 3


def test_there_is_a_checklist_for_what_is_added_most() -> None:
    titles = " ".join(words.splitlines()[0] for words in CHECKLISTS)
    for thing in ("route of the router", "message", "setting", "engine", "policy"):
        assert thing in titles


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_under_120_characters(page: str) -> None:
    """But for tables, whose rows can't be broken."""
    long = [line for line in text(page).splitlines() if len(line) >= 120 and line[0] != "|"]
    assert long == []
